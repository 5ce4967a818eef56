"""Selection rules follow their definitions and never read test data that they must not use."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.record.records import TrialRecord
from orchestrator.results import selection


def trial(number: int, val: float | None = None, label: str = "daft", **changes: Any) -> TrialRecord:
    """A complete search trial of a configuration of its own."""
    metrics = changes.pop("metrics", {}) | ({} if val is None else {"best/val/acc": val})
    fields: dict[str, Any] = {"trial_id": f"t{number}", "number": number, "strategy": label, "label": label}
    fields |= {"config_hash": f"h{number}", "state": "complete", "metrics": metrics}
    return TrialRecord(**(fields | changes))


def fold(number: int, of: int, domain: str, accuracy: float, **changes: Any) -> TrialRecord:
    fields = {"role": "fold", "held_out": domain, "config_hash": f"h{of}", "metrics": {"held_out/acc": accuracy}}
    return trial(number, **(fields | changes))


def numbers(choices: list[selection.Choice]) -> list[int]:
    return [choice.record.number for choice in choices]


def test_id_val_ranks_by_best_validation_accuracy_then_nll_then_number() -> None:
    records = [
        trial(0, 0.8, metrics={"val/nll": 0.5}),
        trial(1, 0.9, metrics={"val/nll": 0.5}),
        trial(2, 0.9, metrics={"val/nll": 0.4}),
        trial(3, 0.9, metrics={"val/nll": 0.4}),
        trial(4, 0.9),
    ]
    assert numbers(selection.id_val(reversed(records))) == [2, 3, 1, 4, 0]


def test_p23_p24_only_complete_search_trials_with_a_finite_value_are_candidates() -> None:
    records = [
        trial(0, 0.5),
        trial(1, 0.9, state="pruned"),
        trial(2, 0.9, state="failed"),
        trial(3, 0.9, state="running"),
        trial(4, 0.9, role="confirm"),
        trial(5, 0.9, role="fold", held_out="a"),
        trial(6, math.nan),
        trial(7),
    ]
    assert numbers(selection.id_val(records)) == [0]


def test_a_configuration_that_was_tried_twice_counts_once() -> None:
    records = [trial(0, 0.5, config_hash="same"), trial(1, 0.7, config_hash="same"), trial(2, 0.6)]
    assert numbers(selection.id_val(records)) == [2, 0]


unit = st.floats(0, 1)


@given(st.lists(st.tuples(unit, unit, unit), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_id_val_does_not_depend_on_test_numbers_or_on_the_order_of_records(
    values: list[tuple[float, float, float]], random: Any
) -> None:
    seen = [trial(n, v, metrics={"test/acc": t, "ood/mean/acc": o}) for n, (v, t, o) in enumerate(values)]
    blind = [replace(r, metrics={"best/val/acc": r.metrics["best/val/acc"]}) for r in seen]
    random.shuffle(blind)
    assert numbers(selection.id_val(seen)) == numbers(selection.id_val(blind))


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=8))
def test_regret_is_the_gap_to_the_best_test_number_and_never_negative(values: list[tuple[float, float]]) -> None:
    records = [trial(n, v, metrics={"ood/mean/acc": o}) for n, (v, o) in enumerate(values)]
    chosen = max(range(len(values)), key=lambda n: (values[n][0], -n))
    expected = max(o for _, o in values) - values[chosen][1]
    lost = selection.regret(records)
    assert lost.value == expected
    assert lost.value >= 0
    assert lost.criterion == "ood/mean/acc"


def test_the_oracle_falls_back_to_the_id_test_and_is_marked() -> None:
    records = [trial(0, 0.9, metrics={"test/acc": 0.5}), trial(1, 0.1, metrics={"test/acc": 0.6})]
    best, _ = selection.oracle(records)
    assert (best.record.number, best.criterion, best.oracle) == (1, "test/acc", True)
    assert not selection.select(records).oracle
    assert selection.regret(records).value == pytest.approx(0.1)


def test_leave_one_domain_out_averages_domains_not_runs() -> None:
    records = [
        trial(0, 0.9),
        trial(1, 0.1),
        fold(2, 0, "photo", 0.5),
        fold(3, 0, "sketch", 0.7),
        fold(4, 1, "photo", 0.6),
        fold(5, 1, "photo", 0.8, seed=1),
        fold(6, 1, "sketch", 0.6),
    ]
    ranked = selection.leave_one_domain_out(records)
    assert numbers(ranked) == [1, 0]
    assert [choice.value for choice in ranked] == pytest.approx([((0.6 + 0.8) / 2 + 0.6) / 2, (0.5 + 0.7) / 2])


def test_a_configuration_without_all_its_folds_is_not_ranked() -> None:
    records = [trial(0, 0.9), trial(1, 0.1), fold(2, 0, "photo", 0.5), fold(3, 0, "sketch", 0.7)]
    records.append(fold(4, 1, "photo", 1.0))
    assert numbers(selection.leave_one_domain_out(records)) == [0]


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        (
            [],
            "leave_one_domain_out needs complete folds for at least 2 ID domains, but got 0. List two or more domains "
            "under data.id and set search.objective to leave_one_domain_out, or select by id_val.",
        ),
        (
            [fold(1, 0, "photo", 0.5), fold(2, 0, "sketch", 0.5, state="failed")],
            "leave_one_domain_out needs complete folds for at least 2 ID domains, but got 1 (photo). List two or more "
            "domains under data.id and set search.objective to leave_one_domain_out, or select by id_val.",
        ),
        (
            [fold(1, 0, "photo", 0.5), fold(2, 7, "sketch", 0.5)],
            "leave_one_domain_out needs a configuration with a complete fold for each of photo, sketch, but none has "
            "them all. Run the study again to continue it, or select by id_val.",
        ),
    ],
)
def test_leave_one_domain_out_states_what_is_missing(folds: list[TrialRecord], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        selection.leave_one_domain_out([trial(0, 0.9), *folds])


def test_a_validation_domain_chooses_and_is_no_test_any_more() -> None:
    metrics = [
        {"ood/noisy/acc": 0.9, "ood/blurred/acc": 0.2, "ood/rotated/acc": 0.4, "ood/mean/acc": 0.5},
        {"ood/noisy/acc": 0.1, "ood/blurred/acc": 0.8, "ood/rotated/acc": 0.6, "ood/mean/acc": 0.5},
    ]
    records = [trial(n, 0.5, metrics=m | {"ood/worst/acc": 0.1}) for n, m in enumerate(metrics)]
    rule = "val_domain:noisy"
    assert selection.select(records, rule).record.number == 0
    first, second = selection.without_validation_domain(records, rule)
    assert (first.metrics["ood/mean/acc"], first.metrics["ood/worst/acc"]) == pytest.approx((0.3, 0.2))
    assert second.metrics["ood/mean/acc"] == pytest.approx(0.7)
    assert selection.regret(records, rule).value == pytest.approx(0.7 - 0.3)
    assert selection.without_validation_domain(records, "id_val") == records


def test_candidates_are_the_best_of_each_label_then_the_rest() -> None:
    values = {0: ("full", 0.9), 1: ("full", 0.8), 2: ("daft", 0.7), 3: ("lp_ft", 0.85), 4: ("daft", 0.6)}
    records = [trial(number, value, label) for number, (label, value) in values.items()]
    assert [r.number for r in selection.top_candidates(records, 10)] == [0, 3, 2, 1, 4]
    assert [r.number for r in selection.top_candidates(records, 4)] == [0, 3, 2, 1]
    assert selection.top_candidates(records, 0) == []
    assert {k: c.record.number for k, c in selection.per_label(records).items()} == {"full": 0, "lp_ft": 3, "daft": 2}
    assert selection.select(records, label="daft").record.number == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: selection.rank([], "id_val"),
            "Selection needs at least one complete search trial, but got none at all. Run the study again to continue "
            "it; `luthier status` says why trials failed.",
        ),
        (
            lambda: selection.rank([trial(0, 1.0, state="failed"), trial(1, 1.0, state="pruned")], "oracle"),
            "Selection needs at least one complete search trial, but got 1 failed, 1 pruned. Run the study again to "
            "continue it; `luthier status` says why trials failed.",
        ),
        (
            lambda: selection.rank([trial(0)], "id_val"),
            "The rule id_val needs the metric best/val/acc, but none of the 1 complete trials has a finite one. Choose "
            "another rule.",
        ),
        (
            lambda: selection.rank([trial(0, 1.0)], "id_vall"),
            "A selection rule is one of id_val, leave_one_domain_out, oracle, val_domain:<name>, but got 'id_vall'. "
            "Did you mean 'id_val'?",
        ),
        (
            lambda: selection.select([trial(0, 1.0)], label="full"),
            "A label with a complete trial is one of daft, but got 'full'.",
        ),
        (
            lambda: selection.top_candidates([trial(0, 1.0)], -1),
            "The number of candidates must be 0 or more, but got -1.",
        ),
    ],
)
def test_errors_say_rule_value_and_way_out(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
