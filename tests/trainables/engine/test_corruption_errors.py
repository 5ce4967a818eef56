"""Errors on corrupted pictures at the end of a confirmed trial: which pictures, which numbers, and that resuming keeps
them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.support.synthetic import write_shapes
from tests.support.trials import MakeTrial, same_numbers
from trainables.data.corruptions import corrupt
from trainables.engine.trial import Trial
from trainables.engine.tune_trainable import TuneTrainable
from trainables.specs import fault_injection
from trainables.specs.corruptions import SEVERITIES, CorruptionSettings
from trainables.specs.fault_injection import ENV_FAULTS
from trainables.specs.trial_spec import TrialSpec

NAMES = ("gaussian_noise", "contrast")


def confirmed(make_trial: MakeTrial, settings: CorruptionSettings | None, role: str = "confirm") -> Trial:
    """A trial of one epoch that has not started."""
    trial = make_trial("full", "cnn", seed=5, task={"epochs": 1}, lr_backbone=0.02)
    shared = dataclasses.replace(trial.spec.shared, corruptions=settings)
    return Trial(dataclasses.replace(trial.spec, shared=shared, role=role), store=trial._store, device="cpu")


def result(trial: Trial) -> dict[str, Any]:
    while not trial.finished:
        metrics = trial.step()
    return metrics


@pytest.fixture
def settings() -> CorruptionSettings:
    return CorruptionSettings(names=NAMES, images=10)


def test_errors_are_those_of_a_plain_loop(make_trial: MakeTrial, settings: CorruptionSettings) -> None:
    trial = confirmed(make_trial, settings)
    metrics = result(trial)
    images, targets = next(iter(trial.data.batches("test")))
    pixels = trial.data.pixels_of(images[:10])
    names = trial.data.names("test")[:10]
    errors: dict[str, list[float]] = {}
    trial.model.eval()
    for name in NAMES:
        for severity in SEVERITIES:
            corrupted = trial.data.normalised(corrupt(pixels, name, severity, 0, names))
            with torch.no_grad():
                wrong = trial.model(corrupted).argmax(1) != targets[:10]
            errors.setdefault(name, []).append(100 * wrong.double().mean().item())
    for name in NAMES:
        assert metrics[f"robust/{name}/ce"] == pytest.approx(np.mean(errors[name]), abs=1e-4)
    assert metrics["robust/mce"] == pytest.approx(np.mean([*errors.values()]), abs=1e-4)
    table = metrics["curves"]["corruptions"]["columns"]
    assert table["error"] == pytest.approx([*errors["gaussian_noise"], *errors["contrast"]], abs=1e-4)
    samples = metrics["curves"]["corruption_samples"]["columns"]
    assert samples["sample"] == names
    assert np.mean(samples["contrast"]) == pytest.approx(metrics["robust/contrast/ce"], abs=1e-4)


def test_the_clean_error_is_that_of_the_same_pictures(make_trial: MakeTrial, settings: CorruptionSettings) -> None:
    everything = dataclasses.replace(settings, images=10**6)
    metrics = result(confirmed(make_trial, everything))
    assert metrics["robust/clean_error"] == pytest.approx(100 * (1 - metrics["test/acc"]), abs=1e-4)


def test_pixels_survive_the_normalisation(make_trial: MakeTrial, settings: CorruptionSettings) -> None:
    data = confirmed(make_trial, settings).data
    images, _ = next(iter(data.batches("test")))
    assert torch.equal(data.normalised(data.pixels_of(images)), images)


@pytest.mark.parametrize("role", ["search", "fold", "reference"])
def test_other_trials_are_not_measured(make_trial: MakeTrial, settings: CorruptionSettings, role: str) -> None:
    assert not any(name.startswith("robust/") for name in result(confirmed(make_trial, settings, role)))


def test_nothing_else_changes(make_trial: MakeTrial, settings: CorruptionSettings) -> None:
    measured = result(confirmed(make_trial, settings))
    plain = result(confirmed(make_trial, None))
    kept = {name: value for name, value in measured.items() if not name.startswith("robust/") and name != "curves"}
    assert same_numbers([{name: value for name, value in plain.items() if name != "curves"}], [kept])


def test_a_checkpoint_continues_whatever_is_measured_at_the_end(
    make_trial: MakeTrial, settings: CorruptionSettings
) -> None:
    whole = result(confirmed(make_trial, settings))
    interrupted = confirmed(make_trial, None)
    states: list[Any] = []
    interrupted.after_step = lambda: states.append(interrupted.state())
    interrupted.step()
    resumed = confirmed(make_trial, settings)
    resumed.load_state(states[1])
    assert same_numbers([result(resumed)], [whole])


def test_settings_survive_the_way_into_a_process(make_trial: MakeTrial, settings: CorruptionSettings) -> None:
    spec = confirmed(make_trial, settings).spec
    assert TrialSpec.from_dict(spec.to_dict()) == spec


class TestFiles:
    """A folder as that of CIFAR-10-C."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        random = np.random.default_rng(0)
        for name in NAMES:
            np.save(tmp_path / f"{name}.npy", random.integers(0, 256, (5 * 12, 32, 32, 3), dtype=np.uint8))
        np.save(tmp_path / "labels.npy", np.tile(np.arange(12) % 4, 5).astype(np.uint8))
        return tmp_path

    def test_its_pictures_take_the_place_of_the_studys(self, make_trial: MakeTrial, folder: Path) -> None:
        trial = confirmed(make_trial, CorruptionSettings(names=NAMES, images=8, folder=str(folder)))
        metrics = result(trial)
        pictures = np.load(folder / "contrast.npy")
        labels = torch.arange(8) % 4
        errors = []
        for severity in range(5):
            with torch.no_grad():
                outputs = trial.model(trial.data.view_of(pictures[12 * severity : 12 * severity + 8]))
            errors.append(100 * (outputs.argmax(1) != labels).double().mean().item())
        assert metrics["robust/contrast/ce"] == pytest.approx(np.mean(errors), abs=1e-4)
        assert "robust/clean_error" not in metrics

    def test_what_does_not_fit_is_named(self, make_trial: MakeTrial, folder: Path) -> None:
        settings = CorruptionSettings(names=NAMES, folder=str(folder))
        np.save(folder / "labels.npy", np.tile(np.arange(12) % 3, 5))
        with pytest.raises(
            ValueError, match="must be the study's 4 classes, 0 to 3 in their order, but are 3 different"
        ):
            result(confirmed(make_trial, settings))
        (folder / "contrast.npy").unlink()
        np.save(folder / "labels.npy", np.tile(np.arange(12) % 4, 5))
        with pytest.raises(ValueError, match=r"contrast.npy does not exist. A folder of corrupted pictures has labels"):
            result(confirmed(make_trial, settings))


class TestFaults:
    """A process that fails or dies among the corruptions: the next attempt has every number once, to the last bit."""

    @pytest.fixture
    def config(self, make_trial: MakeTrial, settings: CorruptionSettings, tmp_path: Path) -> dict[str, Any]:
        spec = confirmed(make_trial, settings).spec
        write_shapes(tmp_path / "store")
        shared = dataclasses.replace(spec.shared, store=str(tmp_path / "store"))
        spec = dataclasses.replace(spec, shared=shared)
        return spec.to_dict() | {"_number": 7, "_checkpoints": str(tmp_path / "checkpoints" / "trial-0007")}

    @pytest.fixture
    def whole(self, config: dict[str, Any]) -> dict[str, Any]:
        """The result of a trial that nothing disturbs."""
        return TuneTrainable(config | {"_checkpoints": config["_checkpoints"] + "-whole"}).train()

    @pytest.mark.usefixtures("cpu_only")
    def test_after_an_error_in_the_middle(
        self, config: dict[str, Any], whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(ENV_FAULTS, "phase=in_corruptions,action=io_error")
        fault_injection.reset_faults()
        with pytest.raises(OSError, match="Input/output error"):
            TuneTrainable(config).train()
        again = TuneTrainable(config).train()
        fault_injection.reset_faults()
        assert numbers(again) == numbers(whole)
        assert again["curves"] == whole["curves"]
        # Reported again, not measured again: the driver may have died before it recorded the result.
        repeated = TuneTrainable(config).train()
        assert numbers(repeated) == numbers(whole)

    @pytest.mark.slow
    @pytest.mark.usefixtures("cpu_only")
    def test_after_a_kill_in_the_middle(self, config: dict[str, Any], whole: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        environment = {**os.environ, ENV_FAULTS: "trial=7,phase=in_corruptions,action=kill"}
        command = [sys.executable, "-c", CHILD, str(tmp_path / "config.json")]
        assert subprocess.run(command, env=environment, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
        assert numbers(TuneTrainable(config).train()) == numbers(whole)


ROOT = str(Path(__file__).parents[3])
CHILD = """
import json, sys
from trainables.engine.tune_trainable import TuneTrainable
TuneTrainable(json.load(open(sys.argv[1]))).train()
"""


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """The metrics under corruptions and on the test sets."""
    return {name: value for name, value in result.items() if name.startswith(("robust/", "test/", "ood/", "best/"))}
