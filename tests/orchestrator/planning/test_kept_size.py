"""Size of kept files at plan time, against what a trial writes and against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.synthetic import CLASSES, SIZES, write_images
from orchestrator import Study
from orchestrator.planning.estimates import TrialCounts, space_of
from orchestrator.planning.kept_size import kept_trials, prediction_bytes, weight_bytes
from orchestrator.study_file.schema import StudySpec
from tests.support.trials import MakeTrial, finish
from trainables.storage.kept_weights import save_weights


def spec_of(strategies: list[Any], model: str, tmp_path: Path, **fields: Any) -> StudySpec:
    return StudySpec.from_fields(
        {
            "name": "s",
            "data": {"source": "digits"},
            "model": {"name": model},
            "strategies": strategies,
            "storage": str(tmp_path),
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("strategy", "kind", "hparams"),
    [
        ("linear_probe", "cnn", {}),
        ("full", "cnn", {}),
        ("linear_probe", "vit", {}),
        ("layernorm", "vit", {}),
        ("lora", "vit", {"rank": 4}),
        ("lora", "vit", {"rank": 4, "wise": 0.5}),
        ("bitfit", "vit", {}),
        ("components", "vit", {"kinds": "ln1"}),
        ("daft", "hybrid", {}),
    ],
)
def test_the_estimate_is_what_a_trial_writes(
    make_trial: MakeTrial,
    network: Callable[[str], str],
    strategy: str,
    kind: str,
    hparams: dict[str, Any],
    tmp_path: Path,
) -> None:
    """All but the names in the file; a tensor that training happened to leave as it was is not written."""
    trial = make_trial(strategy, kind, task={"epochs": 1}, **hparams)
    finish(trial)
    written = sum(
        value.nbytes for value in (*trial.kept_weights(0).tensors.values(), *trial.kept_weights(0).adapter.values())
    )
    spec = spec_of([{"name": strategy, "fixed": hparams}], network(kind), tmp_path)
    estimate = weight_bytes(spec, len(CLASSES))[strategy]
    assert written <= estimate <= 1.01 * written
    file = save_weights(tmp_path / "weights", trial.kept_weights(0))
    assert 0 < file.bytes - written < 30_000


def test_trials_that_keep_their_files(tmp_path: Path) -> None:
    counts = TrialCounts(search=20, folds=6, confirm=9, references=0)
    labels = ["linear_probe", "full"]
    expected = {"best": ({"linear_probe": 1, "full": 1}, 9), "confirmed": ({}, 9)}
    expected["all"] = ({"linear_probe": 1, "full": 1}, 33)
    for keep, trials in expected.items():
        spec = spec_of(labels, "digits_vit", tmp_path, keep=keep)
        assert kept_trials(spec, counts, space_of(spec)) == trials


def test_the_plan_has_the_size_and_says_whose_it_is(network: Callable[[str], str], tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    study = Study(
        name="s",
        data={"root": str(images), "id": ["bright", "dim"], "ood": ["inverted", "noisy"]},
        model={"name": network("vit")},
        strategies=["linear_probe", "full"],
        storage=str(tmp_path),
        confirm={"top_k": 1, "seeds": 2},
    )
    plan = study.plan()
    sizes = weight_bytes(study.spec, len(CLASSES))
    predictions = prediction_bytes(plan.splits, len(CLASSES))
    assert plan.kept_bytes == sizes["linear_probe"] + sizes["full"] + 2 * sizes["full"] + 4 * predictions
    held = sum(count for name, count in plan.splits.items() if name != "train")
    assert predictions == held * (4 * 4 + 64)
    assert sum(SIZES.values()) - plan.splits["train"] == held
    (line,) = [line for line in plan.lines() if line.startswith("Kept")]
    assert line.startswith("Kept (keep: best): at most ")
    assert line.endswith(" of weights and predictions, of each entry's best search trial and every confirmed trial.")
