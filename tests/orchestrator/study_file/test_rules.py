"""Diagnostics that the data or the network cannot serve are refused before anything is spent, word for word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.errors import PreflightError, StudyError
from orchestrator.planning.preflight import preflight
from orchestrator.study_file.schema import StudySpec
from tests.support.images import write_plain_images
from trainables import strategy_class


def fields(**sections: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": "digits",
        "data": {"source": "digits", "train_fraction": 0.1},
        "model": {"name": "digits_vit"},
        "strategies": ["full"],
    }
    return fields | sections


def invalid(**sections: Any) -> list[str]:
    """What is wrong with the study file by itself."""
    try:
        StudySpec.from_fields(fields(**sections))
    except StudyError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Preflight's problems of a study."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def problems(**sections: Any) -> list[str]:
        try:
            preflight(StudySpec.from_fields(fields(storage=str(tmp_path / "studies"), **sections)))
        except PreflightError as error:
            return [str(problem) for problem in error.problems]
        return []

    return problems


class TestSamples:
    def test_all_references_at_a_tenth_of_the_pool(self) -> None:
        assert invalid(diagnostics={"fsr": ["full", "extrapolated", "oracle"]}) == []

    def test_a_pool_is_no_reference_for_itself(self) -> None:
        assert invalid(data={"source": "digits"}, diagnostics={"fsr": ["extrapolated", "full"]}) == [
            "diagnostics.fsr[1]: the reference 'full' compares a sample with the pool that it is drawn from, but "
            "data.train_fraction is 1: they are the same, and FSR is 1. Lower data.train_fraction, or use extrapolated."
        ]

    @pytest.mark.parametrize(("fractions", "listed"), [([0.5, 0.5], "0.5"), ([], "none")])
    def test_an_extrapolation_needs_three_sizes(self, fractions: list[float], listed: str) -> None:
        assert invalid(diagnostics={"fsr": ["extrapolated"], "fsr_fractions": fractions}) == [
            "diagnostics.fsr_fractions: an extrapolation needs 2 different fractions beside the whole, but got "
            f"{listed}. List another one."
        ]
        assert invalid(diagnostics={"fsr_fractions": fractions}) == []

    def test_beside_other_problems(self) -> None:
        messages = invalid(
            search={"objective": "val_domain:x"}, diagnostics={"fsr": ["full"]}, data={"source": "digits"}
        )
        assert [problem.partition(":")[0] for problem in messages] == ["search.objective", "diagnostics.fsr[0]"]


class TestDomains:
    def test_a_source_is_one_of_the_ood_domains(self, refused: Any) -> None:
        assert refused(diagnostics={"plasticity_source": "printed"}) == []
        assert refused(diagnostics={"plasticity_source": "printd"}) == [
            "diagnostics.plasticity_source: plasticity_source is one of the OOD domains, but got 'printd' and the data "
            "have inverted, rotated, noisy, blurred, printed. Did you mean 'printed'? Leave it out for pairs of "
            "training images."
        ]

    def test_domains_that_the_source_marks_itself_count(self, refused: Any, tmp_path: Path) -> None:
        images = {f"{split}/{label}": 9 for split in ("train", "val", "test", "ood/sketch") for label in ("cat", "dog")}
        data = {"root": str(write_plain_images(tmp_path / "pets", images))}
        assert refused(data=data, diagnostics={"plasticity_source": "sketch", "fsr": ["oracle"]}) == []

    def test_without_ood_domains(self, refused: Any, tmp_path: Path) -> None:
        images = {f"photo/{label}": 9 for label in ("cat", "dog")}
        data = {"root": str(write_plain_images(tmp_path / "pets", images)), "id": ["photo"]}
        assert refused(data=data, diagnostics={"plasticity_source": "photo", "fsr": ["oracle"]}) == [
            "diagnostics.plasticity_source: plasticity_source is one of the OOD domains, but got 'photo' and the data "
            "have none. Leave it out for pairs of training images.",
            "diagnostics.fsr[0]: the reference 'oracle' trains on labelled images of each OOD domain, but the data "
            "have none. List them under data.ood, or leave it out.",
        ]


class TestNetwork:
    def test_fsr_needs_layer_norm(self, refused: Any) -> None:
        assert refused(model={"name": "digits_cnn"}, diagnostics={"fsr": ["extrapolated"]}) == [
            "diagnostics.fsr: FSR is measured by tuning LayerNorms, but digits_cnn has none. Leave it out. `luthier "
            "run` reports the shift of its BatchNorms as bn_shift."
        ]

    def test_plasticity_asks_for_nothing(self, refused: Any) -> None:
        assert refused(model={"name": "digits_cnn"}, diagnostics={"measure": ["plasticity"]}) == []


class TestPackages:
    def test_an_extra_that_is_not_installed(self, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(strategy_class("full"), "packages", {"json": "std", "no_such_package": "lora"})
        assert refused() == [
            "strategies[0]: full needs the package no_such_package, which is not installed here. Install it: "
            'pip install "luthier[lora]", or leave full out.'
        ]


class TestRungs:
    def test_an_evaluation_at_rungs_needs_rungs(self) -> None:
        assert invalid(search={"evaluate_at_rungs": True}) == []
        assert invalid(search={"evaluate_at_rungs": True, "scheduler": "none"}) == [
            "search.evaluate_at_rungs: evaluate_at_rungs needs a scheduler that stops trials at rungs, but got "
            "scheduler: none, with which every trial is evaluated at its end. Leave one of the two out."
        ]


class TestMetricAndLoss:
    def test_metrics_that_select_are_those_of_the_table(self) -> None:
        assert invalid(search={"metric": "balanced_acc"}) == []
        assert invalid(search={"metric": "balanced"}) == [
            "search.metric: the metric that selects is one of acc, balanced_acc, macro_f1, auroc, ap, nll, brier, but "
            "got 'balanced'. Did you mean 'balanced_acc'?"
        ]

    def test_smoothing_and_focal_loss_exclude_each_other(self) -> None:
        assert invalid(loss={"label_smoothing": 0.1, "class_weights": "balanced"}) == []
        assert invalid(loss={"label_smoothing": 0.1, "focal_gamma": 2.0}) == [
            "loss.focal_gamma: the focal loss is defined for one right class, but label_smoothing spreads the target "
            "over all of them, and got focal_gamma 2 and label_smoothing 0.1. Leave one of the two out."
        ]

    def test_weights_and_balanced_sampling_exclude_each_other(self) -> None:
        data = {"source": "digits", "sampling": "balanced"}
        assert invalid(data=data) == []
        assert invalid(data=data, loss={"class_weights": "balanced"}) == [
            "data.sampling: loss.class_weights 'balanced' and sampling 'balanced' both correct for the frequencies of "
            "the classes: together, rare classes would outweigh the others. Leave one of the two out."
        ]

    def test_what_a_strategy_cannot_honour_is_refused_before_anything_is_spent(self, refused: Any) -> None:
        strategies = ["full", "linear_probe", "lp_ft", {"name": "daft", "fixed": {"label_smoothing": 0.2}}]
        assert refused(strategies=strategies, loss={"class_weights": "balanced"}) == []
        (focal, smoothed) = refused(strategies=strategies, loss={"focal_gamma": 2.0})
        assert focal == (
            "strategies[1]: loss.focal_gamma needs a strategy that trains by gradient, but linear_probe solves in "
            "closed form, and got 2.0. Leave one of the two out, or use loss.class_weights: balanced."
        )
        assert smoothed.startswith("strategies[3]: The focal loss is defined for one right class, but daft has")
        (solved, twice) = refused(strategies=strategies, loss={"label_smoothing": 0.1})
        assert solved.startswith("strategies[1]: loss.label_smoothing needs a strategy that trains by gradient")
        assert twice.startswith("strategies[3]: Label smoothing is set once, but daft has label_smoothing 0.2")
        (message,) = refused(strategies=strategies, data={"source": "digits", "sampling": "balanced"})
        assert message.startswith("strategies[1]: data.sampling needs a strategy that trains by gradient")


@pytest.mark.parametrize(
    ("task", "listed"), [("classification", "flip, crop"), ("segmentation", "flip, crop, scale, jitter")]
)
def test_an_augmentation_is_one_of_the_tasks(task: str, listed: str) -> None:
    data = {"source": "folder", "root": "/data", "augment": ["flipp"]}
    assert invalid(task=task, data=data) == [
        f"data.augment[0]: an augmentation is one of {listed}, but got 'flipp'. Did you mean 'flip'?"
    ]


class TestCorruptions:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (
                "comon",
                "evaluate.corruptions: corruptions is 'common', a list of names, or a folder's path with a / in it, "
                "but got 'comon'. Did you mean 'common'?",
            ),
            (
                "fog",
                "evaluate.corruptions: corruptions is 'common', a list of names, or a folder's path with a / in it, "
                "but got 'fog'. Write [fog].",
            ),
            (
                [],
                "evaluate.corruptions: corruptions is 'common', a list of at least one name, or a folder's path with "
                "a / in it, but got [].",
            ),
            (
                ["fog", "fog"],
                "evaluate.corruptions[1]: a corruption is measured once, but 'fog' is listed again. Leave it out.",
            ),
        ],
    )
    def test_a_value_that_is_none_of_the_three(self, value: Any, message: str) -> None:
        assert invalid(evaluate={"corruptions": value}) == [message]

    def test_an_unknown_name(self) -> None:
        (problem,) = invalid(evaluate={"corruptions": ["fogg"]})
        assert problem.startswith("evaluate.corruptions[0]: a corruption is one of gaussian_noise, ")
        assert problem.endswith("but got 'fogg'. Did you mean 'fog'?")

    @pytest.mark.parametrize("confirm", [{"seeds": 0}, {"top_k": 0}])
    def test_nothing_is_confirmed(self, confirm: dict[str, int]) -> None:
        (key,) = confirm
        assert invalid(evaluate={"corruptions": "common"}, confirm=confirm) == [
            f"evaluate.corruptions: corruptions are measured on confirmed configurations, but confirm.{key} is 0. "
            "Raise it, or leave them out."
        ]
        assert invalid(confirm=confirm) == []

    def test_a_folder_that_does_not_fit_is_refused_before_anything_runs(self, refused: Any, tmp_path: Path) -> None:
        folder = tmp_path / "corrupted"
        assert refused(evaluate={"corruptions": str(folder)}) == [
            f"evaluate.corruptions: {folder} is no folder. Corrupted pictures are in one, as labels.npy and one file "
            "per corruption."
        ]
        folder.mkdir()
        np.save(folder / "fog.npy", np.zeros((50, 8, 8, 3), np.uint8))
        np.save(folder / "labels.npy", np.tile(np.arange(9), 5))
        (problem,) = refused(evaluate={"corruptions": str(folder)})
        assert "must be the study's 10 classes, 0 to 9 in their order, but are 9 different ones" in problem
        np.save(folder / "labels.npy", np.tile(np.arange(10), 5))
        assert refused(evaluate={"corruptions": str(folder)}) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"crop_pct": 0.9}},
            "data.crop_pct: pictures with masks are scored whole, but got 0.9 and the task is segmentation. Remove it.",
        ),
        (
            {"data": {"interpolation": "bicubic"}},
            "data.interpolation: pictures with masks are scaled linearly, their masks by index, but got 'bicubic' and "
            "the task is segmentation. Remove it.",
        ),
        (
            {"data": {"sampling": "balanced"}},
            "data.sampling: a picture with a mask has no class of its own that could be balanced, but got 'balanced' "
            "and the task is segmentation. Remove it.",
        ),
        (
            {"evaluate": {"corruptions": "/data/CIFAR-10-C"}},
            "evaluate.corruptions: files of corrupted pictures have a label each and no masks, but got "
            "'/data/CIFAR-10-C' and the task is segmentation. Remove it.",
        ),
        ({"evaluate": {"corruptions": "common"}}, None),
    ],
)
def test_keys_of_square_images_are_refused_for_pictures_with_masks(
    sections: dict[str, Any], message: str | None
) -> None:
    data = {"source": "digits_scenes", **sections.get("data", {})}
    problems = invalid(task="segmentation", **{**sections, "data": data})
    assert problems == ([] if message is None else [message])
