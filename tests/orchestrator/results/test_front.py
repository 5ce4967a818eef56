"""The Pareto front against its definition, on confirmed configurations, and wherever it is shown."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.record.records import TrialRecord
from orchestrator.report.page import page_of
from orchestrator.results.front import cost_warnings, front, front_candidates, non_dominated
from orchestrator.results.front_plot import front_figure
from orchestrator.results.study_results import Results
from orchestrator.results.summary import Summarizer
from trainables.specs.metrics import CLASSIFICATION

SIZE = "cost/trainable_parameters"
SECONDS = "cost/total_seconds"
SPEC = {
    "name": "pets",
    "search": {"objective": "id_val", "objectives": ["id_val", "trainable_parameters"], "scheduler": "none"},
}
coordinates = st.sampled_from([-1e9, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 1e9, math.inf])
"""Few values, so that many are equal."""


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """The definition, coordinate by coordinate."""
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[coordinates] * n), max_size=12)))
def test_it_is_the_front_by_brute_force(points: list[tuple[float, ...]]) -> None:
    assert non_dominated(points) == [not any(dominates(other, point) for other in points) for point in points]


@given(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=8), st.randoms())
def test_neither_order_nor_repetition_matters(points: list[tuple[float, float]], random: Any) -> None:
    members = {point for point, on_front in zip(points, non_dominated(points), strict=True) if on_front}
    assert members, "a finite set has a front"
    shuffled = [*points, *points]
    random.shuffle(shuffled)
    flags = non_dominated(shuffled)
    assert flags == [point in members for point in shuffled]


def test_points_that_cannot_be_compared_are_errors() -> None:
    with pytest.raises(ValueError, match=r"^Points are compared by numbers, but got NaN in 1 coordinates\.$"):
        non_dominated([(1.0, math.nan), (0.0, 0.0)])
    with pytest.raises(ValueError, match="inhomogeneous"):
        non_dominated([(1.0, 2.0), (1.0,)])


def trial(number: int, label: str, val: float, size: float | None, **changes: Any) -> TrialRecord:
    """A complete search trial of a configuration of its own."""
    metrics: dict[str, float] = {"best/val/acc": val, "test/acc": 0.5, "ood/mean/acc": 0.5, "calib/ece": 0.1}
    metrics |= {} if size is None else {SIZE: size}
    metrics |= changes.pop("metrics", {})
    fields: dict[str, Any] = {"trial_id": f"t{number}", "number": number, "strategy": "full", "label": label}
    fields |= {"config_hash": f"h{number}", "state": "complete", "metrics": metrics}
    return TrialRecord(**(fields | changes))


def confirm(number: int, of: int, label: str, val: float, size: float, seed: int, **changes: Any) -> TrialRecord:
    return trial(number, label, val, size, role="confirm", config_hash=f"h{of}", seed=seed, **changes)


SEARCH = [
    trial(0, "probe", 0.70, 1e3),
    trial(1, "lora", 0.80, 1e4),
    trial(2, "lora", 0.79, 5e3),
    trial(3, "full", 0.95, 1e6),
    trial(4, "full", 0.90, 1e6),
]
CONFIRMED = [
    *SEARCH,
    confirm(5, 0, "probe", 0.70, 1e3, 1),
    *(confirm(6 + seed, 1, "lora", 0.82 + seed / 100, 1e4, seed) for seed in range(2)),
    *(confirm(8 + seed, 3, "full", 0.81 + seed / 100, 1e6, seed) for seed in range(2)),
]
"""Full tuning's search trial flatters: on fresh seeds LoRA is better, with fewer parameters."""


def numbers(records: Sequence[TrialRecord], *costs: str) -> list[int]:
    return [member.choice.record.number for member in front(records, costs or ("trainable_parameters",)).members]


class TestWhatIsCompared:
    def test_search_trials_where_nothing_was_confirmed(self) -> None:
        result = front(SEARCH, ["trainable_parameters"])
        assert not result.confirmed
        assert [m.choice.record.number for m in result.members] == [3, 1, 2, 0]
        assert [c.choice.record.number for c in result.configurations] == [3, 1, 2, 0, 4]

    def test_else_confirmed_configurations_by_their_means(self) -> None:
        result = front(CONFIRMED, ["trainable_parameters"])
        assert result.confirmed
        assert [m.choice.record.number for m in result.members] == [1, 0]
        assert [m.choice.value for m in result.members] == pytest.approx([0.825, 0.70])
        assert len(result.configurations) == 3, "what was not confirmed is not compared"

    def test_costs_are_means_over_the_same_seeds(self) -> None:
        records = [trial(0, "full", 0.8, 1e6, metrics={SECONDS: 1000.0})]
        records += [confirm(1 + s, 0, "full", 0.8, 1e6, s, metrics={SECONDS: 10.0 + s}) for s in range(3)]
        assert front(records, ["device_seconds"]).members[0].costs == {"device_seconds": 11.0}

    def test_equals_are_on_the_front_together(self) -> None:
        assert numbers([trial(0, "a", 0.8, 1e3), trial(1, "b", 0.8, 1e3), trial(2, "c", 0.8, 2e3)]) == [0, 1]

    def test_only_complete_trials_count(self) -> None:
        assert numbers([*SEARCH, trial(9, "cheap", 0.99, 1.0, state="pruned")]) == [3, 1, 2, 0]

    def test_a_configuration_without_a_recorded_cost_is_left_out(self) -> None:
        result = front([*SEARCH, trial(9, "old", 0.99, None)], ["trainable_parameters"])
        assert [c.record.number for c in result.left_out] == [9]
        assert result.sentence().endswith("Left out, because a cost was not recorded: trials 9.")

    def test_a_metric_that_is_minimised(self) -> None:
        metrics = CLASSIFICATION.selecting("nll")
        records = [trial(n, "a", 0.5, size, metrics={"best/val/nll": nll}) for n, (nll, size) in enumerate(
            [(0.2, 2e3), (0.3, 1e3), (0.4, 2e3)]
        )]  # fmt: skip
        members = front(records, ["trainable_parameters"], metrics=metrics).members
        assert [m.choice.record.number for m in members] == [0, 1]

    def test_several_costs(self) -> None:
        seconds = {0: 5.0, 1: 1.0, 2: 9.0, 3: 1.0, 4: 0.5}
        records = [trial(r.number, r.label, r.metrics["best/val/acc"], r.metrics[SIZE],
                         metrics={SECONDS: seconds[r.number]}) for r in SEARCH]  # fmt: skip
        scores = [(r.metrics["best/val/acc"], -r.metrics[SIZE], -r.metrics[SECONDS]) for r in records]
        expected = {n for n, s in enumerate(scores) if not any(dominates(other, s) for other in scores)}
        assert set(numbers(records, "trainable_parameters", "device_seconds")) == expected

    def test_gpu_memory_is_not_compared_with_memory_of_the_host(self) -> None:
        gpu = trial(0, "gpu", 0.9, 1e3, metrics={"cost/peak_gpu_bytes": 1e8, "cost/peak_host_bytes": 4e9})
        host = trial(1, "host", 0.8, 1e3, metrics={"cost/peak_host_bytes": 2e9})
        both = front([gpu, host], ["peak_memory"])
        assert [m.costs["peak_memory"] for m in both.members] == [4e9, 2e9]
        assert front([gpu], ["peak_memory"]).members[0].costs == {"peak_memory": 1e8}

    @pytest.mark.parametrize(("costs", "message"), [
        ([], r"^A front needs a list of one or more costs of trainable_parameters, device_seconds, peak_memory"),
        (["parameters"], r"^A cost is one of trainable_parameters, .*, but got 'parameters'\. Did you mean"),
    ])  # fmt: skip
    def test_what_is_no_cost(self, costs: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            front(SEARCH, costs)


class TestCandidates:
    def test_the_best_of_each_label_then_the_front_then_the_rest(self) -> None:
        def chosen(k: int) -> list[int]:
            return [r.number for r in front_candidates(CONFIRMED, k, ["trainable_parameters"])]

        assert chosen(3) == [3, 1, 0]
        assert chosen(4) == [3, 1, 0, 2]
        assert chosen(9) == [3, 1, 0, 2, 4]


class TestWarnings:
    def test_an_objective_that_is_the_same_for_all(self) -> None:
        records = [trial(n, "full", 0.8 + n / 100, 84e3) for n in range(3)]
        assert cost_warnings(records, ["trainable_parameters"]) == [
            "The objective trainable_parameters is 84.0 k in all 3 complete trials of the search: it could not steer "
            "it. Add entries that differ in it, or leave it out of search.objectives."
        ]
        assert cost_warnings(SEARCH, ["trainable_parameters"]) == []

    def test_memory_of_two_kinds(self) -> None:
        gpu = trial(0, "gpu", 0.9, 1e3, metrics={"cost/peak_gpu_bytes": 1e8})
        host = trial(1, "host", 0.8, 1e3, metrics={"cost/peak_host_bytes": 2e9})
        (sentence,) = cost_warnings([gpu, host], ["peak_memory"])
        assert sentence.startswith(
            "The objective peak_memory is cost/peak_gpu_bytes in some trials of the search and cost/peak_host_bytes in "
            "others"
        )


class TestShown:
    def test_as_a_frame(self) -> None:
        table = Results(CONFIRMED, SPEC).front()
        assert table[["number", "seeds", "trainable_parameters", "on_front"]].to_numpy().tolist() == [
            [1, 2, 1e4, True], [0, 1, 1e3, True], [3, 2, 1e6, False],
        ]  # fmt: skip
        seconds = [trial(0, "full", 0.8, 1e6, metrics={SECONDS: 3.0})]
        assert Results(seconds).front("device_seconds")["device_seconds"].tolist() == [3.0]

    def test_on_a_terminal_and_in_markdown(self) -> None:
        out = io.StringIO()
        results = Results(CONFIRMED, SPEC)
        results.render(Console(file=out, width=140))
        sentence = (
            "Pareto front of validation accuracy and trained parameters (means over the confirmed seeds): 2 of 3 "
            "configurations. No other is at least as good in all of these and better in one."
        )
        lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
        assert sentence in " ".join(lines)
        assert any(line.startswith("lora 1 2 82.5 % 10.0 k") for line in lines), out.getvalue()
        assert "| lora | 1 | 2 | 82.5 % | 10.0 k | - |" in results.markdown()

    def test_as_json(self) -> None:
        values = json.loads(json.dumps(Results(CONFIRMED, SPEC).to_dict()))["front"]
        assert values["costs"] == ["trainable_parameters"]
        assert values["confirmed"] is True
        assert [(c["number"], c["on_front"]) for c in values["configurations"]] == [(1, True), (0, True), (3, False)]

    @pytest.mark.parametrize("spec", [{"name": "pets"}, {"name": "pets", "search": {"objectives": None}}])
    def test_not_where_the_study_has_no_costs_among_its_objectives(self, spec: dict[str, Any]) -> None:
        results = Results(CONFIRMED, spec)
        assert results.to_dict()["front"] is None
        assert "Pareto" not in results.markdown()
        assert results.front()["on_front"].tolist() == [True, True, False], "but on request"

    def test_in_the_summary_of_mlflow(self) -> None:
        summary = Summarizer().study({"study": "pets", "spec": SPEC, "state": "complete"}, CONFIRMED, {})
        assert summary.tags["front.objectives"] == "val/acc, trainable_parameters"
        assert summary.tags["front.trials"] == "1, 0"
        assert summary.tags["front.labels"] == "lora, probe"
        lines = summary.files["front.csv"]().decode().splitlines()
        assert lines[0].startswith("label,strategy,number,")
        assert len(lines) == 4
        plain = Summarizer().study({"study": "pets", "spec": {}, "state": "complete"}, CONFIRMED, {})
        assert not any("front" in name for name in (*plain.tags, *plain.files))

    def test_in_the_report(self) -> None:
        header = {"study": "pets", "spec": SPEC, "state": "complete", "first_started": 0.0}
        page = page_of(header, CONFIRMED, {})
        assert "<h2>Accuracy and cost</h2>" in page
        section = page.partition("<h2>Accuracy and cost</h2>")[2].partition("<h2>")[0]
        rows = section.count("<tr>")
        assert rows == 1 + 2
        assert 'src="data:image/svg+xml;base64,' in section
        assert "Accuracy and cost" not in page_of({**header, "spec": {"name": "pets"}}, CONFIRMED, {})

    def test_before_the_first_complete_trial(self) -> None:
        records = [trial(0, "full", 0.5, 1e3, state="running")]
        assert Results(records, SPEC).to_dict()["front"] is None
        header = {"study": "pets", "spec": SPEC, "state": "running", "first_started": 0.0}
        assert "Accuracy and cost" not in page_of(header, records, {})

    @pytest.mark.parametrize("costs", [("trainable_parameters",), ("device_seconds", "trainable_parameters")])
    def test_the_picture_has_the_front_ringed_and_as_a_line_where_it_is_one(self, costs: tuple[str, ...]) -> None:
        values = [(0.7, 1e3), (0.8, 1e4), (0.75, 1e5)]
        records = [trial(n, f"a${n}", val, size, metrics={SECONDS: 3.0}) for n, (val, size) in enumerate(values)]
        for cost in costs:
            figure = front_figure(front(records, costs), cost)
            assert figure is not None
            (axes,) = figure.axes
            assert (axes.get_xscale() == "log") == (cost == "trainable_parameters")
            rings = axes.collections[-1].get_offsets()
            if cost == "trainable_parameters":
                assert rings.tolist() == [[1e3, 70.0], [1e4, 80.0]]
            assert len(axes.lines) == (len(costs) == 1)
        assert front_figure(front(records[:1], costs), costs[0]) is None
