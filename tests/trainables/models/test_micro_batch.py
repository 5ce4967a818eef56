"""Out of memory: the gradient and the scores are those of the whole batch, and the record states what happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.support.synthetic import shapes
from trainables.engine.contract import TrainingConfig
from trainables.engine.loop import PhaseSteps, predict, train_unit
from trainables.engine.trial import Trial
from trainables.models.micro_batch import MicroBatch
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.tasks.base import TargetSpec
from trainables.tasks.classification import Classification

LIMIT = 3


def small_memory(model: nn.Module, seen: list[int]) -> Callable[[Tensor], Tensor]:
    """A forward pass for which memory holds three images."""

    def forward(inputs: Tensor) -> Tensor:
        if len(inputs) > LIMIT:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append(len(inputs))
        logits: Tensor = model(inputs)
        return logits

    return forward


def batch(count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def trained(limited: bool, seen: list[int]) -> tuple[Tensor, float, dict[str, float]]:
    """Weights, mean loss and report after two steps."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr": 0.5, "initial_lr": 0.5}], momentum=0.9)
    forward = small_memory(model, seen) if limited else model
    config = TrainingConfig(schedule="constant", clip_norm=0.5)
    task = Classification(TargetSpec(("a", "b", "c")))
    steps = PhaseSteps(
        forward=lambda inputs, _: forward(inputs), optimizer=optimizer, config=config, task=task, total_steps=2
    )
    result = train_unit(steps, [batch(), batch(7)], 0)
    return model.weight.detach(), result.loss, dict(result.observed)


def test_the_step_is_that_of_the_whole_batch() -> None:
    seen: list[int] = []
    weight, loss, observed = trained(True, seen)
    expected, expected_loss, nothing = trained(False, [])
    assert torch.allclose(weight, expected, atol=1e-6)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert seen == [3, 3, 3, 1, 3, 3, 1]  # 10 → 5 → 3, and the size is remembered
    assert observed == {"cost/micro_batch": 3.0}
    assert nothing == {}


def test_predictions_are_those_of_the_whole_batch_and_nothing_is_seen_twice() -> None:
    model = nn.Linear(4, 3)
    seen = list[int]()
    inputs, labels = batch()
    logits, targets = predict(small_memory(model, seen), [(inputs, labels)])
    assert torch.allclose(logits, model(inputs), atol=1e-6)
    assert torch.equal(targets, labels)
    assert sum(seen) == len(inputs)


def test_one_image_that_does_not_fit_is_an_error() -> None:
    def never(inputs: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        predict(never, [batch()])


def test_pieces() -> None:
    micro = MicroBatch()
    assert [(p.start, p.stop) for p in micro.pieces(5)] == [(0, 5)]
    micro.size = 2
    assert [(p.start, p.stop) for p in micro.pieces(5)] == [(0, 2), (2, 4), (4, 5)]


def test_p21_a_trial_that_runs_out_of_memory_continues_and_records_it(
    network: Callable[[str], str], tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainables.specs import fault_injection

    def trial() -> list[float]:
        fault_injection.reset_faults()
        task = SharedTrialSettings(
            store="m", model=ModelSpec(name=network("vit")), epochs=2, batch_size=16, cache=str(tmp_path)
        )
        run = Trial(TrialSpec(shared=task, strategy="full"), store=shapes(), device="cpu")
        metrics = [run.step(), run.step()]
        return [unit.get("cost/micro_batch", 0.0) for unit in metrics] + [metrics[-1]["train/loss"]]

    plain = trial()
    monkeypatch.setenv("LUTHIER_FAULT", "phase=step,step=2,action=oom")
    reduced = trial()
    assert plain[:2] == [0.0, 0.0]
    assert reduced[:2] == [8.0, 8.0]
    assert reduced[2] == pytest.approx(plain[2], rel=1e-4)
    monkeypatch.delenv("LUTHIER_FAULT")
    fault_injection.reset_faults()
