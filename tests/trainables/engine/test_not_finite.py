"""P23, P24: a loss that is not finite, in training or in validation alone, ends a trial and is never a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.synthetic import shapes, write_shapes
from trainables.engine import trial as run_module
from trainables.engine.evaluation import validation_scores
from trainables.engine.trial import Trial
from trainables.engine.tune_trainable import TuneTrainable
from trainables.specs.errors import NonFiniteError
from trainables.specs.fault_injection import ENV_FAULTS, reset_faults
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec


@pytest.fixture
def spec(network: Callable[[str], str], one_thread: None, tmp_path: Path) -> TrialSpec:
    store = str(write_shapes(tmp_path / "store"))
    task = SharedTrialSettings(
        store=store, model=ModelSpec(name=network("cnn")), epochs=4, batch_size=16, cache=str(tmp_path / "cache"),
        diagnostics=(),
    )  # fmt: skip
    return TrialSpec(shared=task, strategy="full", hparams={"lr_backbone": 1e-3, "lr_head": 1e-2})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_p24_a_validation_loss_that_is_not_finite_is_named_and_no_result(
    spec: TrialSpec, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = validation_scores

    def scores(*arguments: Any) -> dict[str, float]:
        return {**real(*arguments), **({"val/nll": value} if run.unit == 1 else {})}

    monkeypatch.setattr(run_module, "validation_scores", scores)
    run = Trial(spec, store=shapes(), device="cpu")
    first = run.step()
    with pytest.raises(NonFiniteError) as error:
        run.step()
    assert str(error.value) == (
        f"The validation negative log-likelihood must be finite, but it was {value!r} after unit 2. Lower "
        "learning rates or clip_norm may help."
    )
    assert (run.unit, run.best.unit, run.result) == (1, 1, first)


@pytest.mark.usefixtures("cpu_only")  # on a GPU the loss is read once per unit, so that no step waits for it
def test_p23_a_loss_that_becomes_nan_ends_the_trial_within_the_unit_and_is_not_tried_again(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_FAULTS, "phase=step,trial=5,unit=2,step=1,action=nan")
    reset_faults()
    try:
        trial = TuneTrainable(
            {**spec.to_dict(), "_number": 5, "_checkpoints": str(tmp_path / "checkpoints" / "trial-0005")}
        )
        assert trial.step()["unit"] == 1
        ended = trial.step()
    finally:
        reset_faults()
    assert ended["done"]
    assert "NonFiniteError: The training loss must be finite, but it was nan by step 1 of its unit." in ended["failure"]
    assert "val/acc" not in ended
