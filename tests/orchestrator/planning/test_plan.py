"""A plan counts what a study would do; the expected numbers are counted by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from rich.console import Console

import search_spaces
from orchestrator.planning.estimates import TRIAL_BYTES
from orchestrator.planning.plan import Plan, make_plan, range_in_words
from orchestrator.study_file.schema import StudySpec
from search_spaces import Hyperparameter
from tests.support.images import write_plain_images


@pytest.fixture
def planned(tmp_path: Path, network: Callable[[str], str]) -> Callable[..., Plan]:
    root = write_plain_images(tmp_path / "pets", {f"{d}/{c}": 4 for d in ("photo", "sketch") for c in ("cat", "dog")})

    def make(**sections: Any) -> Plan:
        fields: dict[str, Any] = {
            "name": "pets",
            "data": {"root": str(root), "id": ["photo"], "ood": ["sketch"], "image_size": 32},
            "model": {"name": network("vit")},
            "strategies": ["linear_probe", "full"],
            "search": {"trials": 20, "epochs": 9},
            "storage": str(tmp_path / "studies"),
        }
        for key, value in sections.items():
            fields[key] = {**fields[key], **value} if isinstance(fields.get(key), dict) else value
        return make_plan(StudySpec.from_fields(fields))

    return make


class TestCounts:
    def test_trials_and_units(self, planned: Callable[..., Plan]) -> None:
        plan = planned()
        assert (plan.search_trials, plan.confirm_trials, plan.fold_trials) == (20, 4, 0)
        assert plan.rungs == (1, 3)
        assert plan.max_units == (20 + 4) * 9

    def test_evaluations_under_corruptions(self, planned: Callable[..., Plan]) -> None:
        plan = planned(evaluate={"corruptions": ["fog", "snow"], "images": 200})
        assert plan.corruptions is not None
        # Two corruptions at five severities on the only test image per class, for four confirmed trials.
        test = plan.splits["test"]
        assert plan.corruptions.evaluations == 2 * 5 * test
        sentence = (
            f"Corruptions: 2 corruptions at 5 severities on {test} images of the ID test: {10 * test} images or 10 "
            f"times the ID test for each of 4 confirmed trials, {40 * test} in all."
        )
        assert sentence in plan.lines()
        assert plan.to_dict()["corruptions"]["names"] == ("fog", "snow")
        assert not any("Corruptions" in line for line in planned().lines())

    def test_with_costs_among_the_objectives_two_are_confirmed_per_entry(self, planned: Callable[..., Plan]) -> None:
        objectives = ["id_val", "trainable_parameters", "device_seconds"]
        plan = planned(search={"objectives": objectives, "scheduler": "none"})
        assert plan.objectives == ("val/acc", "trainable_parameters", "device_seconds")
        assert plan.confirm_trials == 1 + 3 * 3
        assert (
            "Chosen by id_val. The search also minimises trained parameters and seconds; the best trade-offs are in "
            "the Pareto front." in plan.lines()
        )
        assert "Chosen by id_val." in planned().lines()

    def test_without_a_scheduler_nothing_is_stopped(self, planned: Callable[..., Plan]) -> None:
        assert planned(search={"scheduler": "none"}).rungs == ()

    def test_published_sweeps_alone_take_their_own_number_of_trials(self, planned: Callable[..., Plan]) -> None:
        # Papers' sweeps: 8 rates of FT; 10 backbone rates of DAFT, then 4 head rates.
        plan = planned(strategies=["full", "daft"], search={"trials": 50, "sampler": "paper"})
        assert [entry.given for entry in plan.entries] == [8, 14]
        assert plan.search_trials == 22

    def test_leave_one_domain_out_runs_folds(self, planned: Callable[..., Plan]) -> None:
        two = {"id": ["photo", "sketch"], "ood": []}
        assert planned(data=two, search={"objective": "leave_one_domain_out"}).fold_trials == 5 * 2

    def test_domains_that_the_study_does_not_list_are_those_of_the_data(self, planned: Callable[..., Plan]) -> None:
        none = {"id": [], "ood": []}
        assert planned(data=none, search={"objective": "leave_one_domain_out"}).fold_trials == 5 * 2

    def test_disk_is_pixels_and_records(self, planned: Callable[..., Plan]) -> None:
        plan = planned()
        assert plan.images == 16
        assert plan.disk_bytes == int(16 * 32 * 32 * 3 * 1.05) + 24 * TRIAL_BYTES


class TestEntries:
    def test_ranges_and_fixed_values(self, planned: Callable[..., Plan]) -> None:
        entries = [{"name": "full", "label": "slow", "fixed": {"lr_backbone": 1e-3}}, "linear_probe"]
        slow, probe = planned(strategies=entries).entries
        assert (slow.label, slow.strategy, dict(slow.fixed)) == ("slow", "full", {"lr_backbone": 0.001})
        assert list(slow.searched) == ["lr_head"]
        assert probe.searched == {}

    def test_a_preset_shows_its_values(self, planned: Callable[..., Plan]) -> None:
        (entry,) = planned(strategies=[{"name": "full", "preset": "paper"}]).entries
        assert entry.searched == {"lr_backbone": "0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001"}
        assert entry.fixed == {"lr_head": None}


class TestShown:
    @pytest.mark.parametrize(
        ("hyperparameter", "words"),
        [
            (Hyperparameter(3e-3, FloatDistribution(1e-4, 0.3, log=True)), "0.003; 0.0001 to 0.3, log"),
            (Hyperparameter(2, IntDistribution(1, 8)), "2; 1 to 8"),
            (Hyperparameter("sgd", CategoricalDistribution(("sgd", "adamw"))), "sgd; sgd, adamw"),
        ],
    )
    def test_a_range_in_words(self, hyperparameter: Hyperparameter, words: str) -> None:
        assert range_in_words(hyperparameter) == words

    def test_promotion_in_words(self, planned: Callable[..., Plan]) -> None:
        plan = planned(model={"name": "resnet18"}, data={"image_size": 64}, search={"scheduler": "promote"})
        assert (
            "Budget of a trial: 9 units of one epoch; trials are paused, and the best of their entry promoted, after "
            "units 1, 3."
        ) in plan.lines()

    def test_in_words(self, planned: Callable[..., Plan]) -> None:
        measure = {"measure": ["shift", "distortion"]}
        plan = planned(model={"name": "resnet18"}, data={"image_size": 64}, diagnostics=measure)
        assert plan.lines() == [
            f"Network: resnet18. Data: {plan.data}, 16 images in 2 classes.",
            "Images of photo: 4 to train on, 2 for validation, 2 for the ID test; OOD: 8 of sketch.",
            "Equal and nearly equal images will stay in one of the splits that are drawn; they are counted when the "
            "data are read.",
            "View: pictures of 8 px are enlarged to 64 px (bicubic), not cropped, mean 0.485 0.456 0.406, std 0.229 "
            "0.224 0.225.",
            "Trials: 20 search (tpe), 4 confirmation.",
            "Budget of a trial: 9 units of one epoch; the scheduler may stop a trial after units 1, 3.",
            "At most 216 units in all. Each trial gets 1 CPU and a GPU if there is one.",
            "Memory layout: channels last on a GPU, and on a CPU if a measurement at the start finds it faster. "
            "Niceness: 0 above that of this process.",
            "Chosen by id_val.",
            "ID test and OOD domains are evaluated once per trial, at its end; trials that are stopped before are not.",
            "Measured beside accuracy: shift, distortion of each trial.",
            "Disk: about 5 MB for data and records, and a few checkpoints per trial.",
            "Kept (keep: best): at most 224 MB of weights and predictions, of each entry's best search trial and every "
            "confirmed trial.",
            f"Study folder: {plan.folder}",
        ]

    @pytest.mark.parametrize(
        ("address", "resources", "line"),
        [
            ("local", {"channels_last": True, "nice": 5}, "channels last. Niceness: 5 above that of this process."),
            (
                "10.0.0.1:6379",
                {"channels_last": False},
                "contiguous. Niceness: that of the cluster's workers (15, unless it was started with another).",
            ),
            (
                "10.0.0.1:6379",
                {"channels_last": False, "nice": 18},
                "contiguous. Niceness: 18 where the cluster's "
                "workers have less (15, unless it was started with another); trials cannot lower it.",
            ),
        ],
    )
    def test_layout_and_niceness_in_words(
        self,
        planned: Callable[..., Plan],
        address: str,
        resources: dict[str, Any],
        line: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"Memory layout: {line}" in planned(resources=resources).lines()

    @pytest.mark.parametrize(
        ("sections", "line"),
        [
            ({"search": {"scheduler": "none"}}, "."),
            ({"search": {"evaluate_at_rungs": True}}, "; of search trials all of them also after units 1, 3."),
            ({"keep": "all"}, "; of search trials all of them also after units 1, 3."),
            (
                {"data": {"ood": ["sketch", "art"]}, "search": {"objective": "val_domain:sketch"}},
                "; of search trials ood/sketch also after units 1, 3.",
            ),
        ],
    )
    def test_evaluation_in_words(
        self, planned: Callable[..., Plan], sections: dict[str, Any], line: str, tmp_path: Path
    ) -> None:
        write_plain_images(tmp_path / "pets", {f"art/{name}": 4 for name in ("cat", "dog")})
        assert f"ID test and OOD domains are evaluated once per trial, at its end{line}" in planned(**sections).lines()

    def test_diagnostics_in_words(self, planned: Callable[..., Plan]) -> None:
        diagnostics = {"fsr": ["extrapolated", "oracle"], "fsr_seeds": 2, "measure": []}
        plan = planned(diagnostics=diagnostics)
        assert plan.reference_trials == 2 * (1 + 2 + 1)  # the own sample, two shares, one OOD domain
        assert plan.max_units == (20 + 4 + 8) * 9
        assert "Trials: 20 search (tpe), 4 confirmation, 8 reference (FSR)." in plan.lines()
        assert (
            "Measured beside accuracy: nothing of each trial; plasticity of the pretrained network, once at the start."
            in plan.lines()
        )
        unknown = planned(data={"ood": []}, diagnostics=diagnostics)
        assert any(line.endswith("4 confirmation, an unknown number of reference (FSR).") for line in unknown.lines())

    def test_as_json(self, planned: Callable[..., Plan]) -> None:
        fields = json.loads(json.dumps(planned().to_dict()))
        assert fields["max_units"] == 216
        assert fields["entries"][1]["searched"]["lr_backbone"] == range_in_words(
            search_spaces.space("full")["lr_backbone"]
        )

    def test_as_a_table(self, planned: Callable[..., Plan]) -> None:
        out = io.StringIO()
        planned().render(Console(file=out, width=120))
        assert "nothing: one configuration" in out.getvalue()
        assert f"lr_backbone: {range_in_words(search_spaces.space('full')['lr_backbone'])}" in out.getvalue()

    def test_nothing_is_written(self, planned: Callable[..., Plan]) -> None:
        assert not Path(planned().folder).exists()
