"""The loop against a plain reference beside it."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.engine.contract import ParamGroup, TrainingConfig
from trainables.engine.loop import PhaseSteps, predict, set_training_mode, train_unit
from trainables.engine.optim import build_optimizer
from trainables.models.precision import resolve_precision
from trainables.specs.errors import NonFiniteError
from trainables.tasks.base import TargetSpec
from trainables.tasks.classification import Classification

CPU = torch.device("cpu")


def small_problem() -> tuple[nn.Linear, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 5, generator=generator))
    batches = [
        (torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)) for n in (8, 8, 8, 5)
    ]
    return model, batches


TASK = Classification(TargetSpec(("a", "b", "c")))


def calling(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda inputs, targets: model(inputs)


def steps_of(model: nn.Module, config: TrainingConfig, total_steps: int, **fields: Any) -> PhaseSteps:
    optimizer = build_optimizer([ParamGroup("head", list(model.parameters()), 0.1)], config, lambda: 1.0)
    return PhaseSteps(
        forward=calling(model), optimizer=optimizer, config=config, task=TASK, total_steps=total_steps, **fields
    )


def test_a_unit_equals_the_textbook_loop_bit_for_bit() -> None:
    model, batches = small_problem()
    reference = copy.deepcopy(model)
    config = TrainingConfig(clip_norm=0.5, label_smoothing=0.1)
    result = train_unit(steps_of(model, config, 8), batches, 0)

    sgd = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    cosine = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.5 * (1 + math.cos(math.pi * step / 8)))
    losses = []
    right = 0
    for images, labels in batches:
        logits = reference(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=0.1)
        sgd.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        sgd.step()
        cosine.step()
        losses.append(loss.item() * len(labels))
        right += int((logits.argmax(1) == labels).sum())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert result.loss == pytest.approx(sum(losses) / 29, rel=1e-6)
    assert (result.metrics, result.images) == ({"acc": right / 29}, 29)


def test_the_extra_loss_is_added() -> None:
    model, batches = small_problem()
    reference = copy.deepcopy(model)
    config = TrainingConfig(momentum=0.0, schedule="constant")

    def decay(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return 0.3 * model.weight.square().sum()

    train_unit(steps_of(model, config, 1, extra_loss=decay), batches[:1], 0)
    images, labels = batches[0]
    functional.cross_entropy(reference(images), labels).backward()
    gradient = reference.weight.grad + 0.6 * reference.weight
    assert torch.allclose(model.weight, reference.weight - 0.1 * gradient, atol=1e-6)


def test_a_diverging_unit_raises_within_the_unit() -> None:
    model, batches = small_problem()
    batches[1][0][0, 0] = torch.inf
    config = TrainingConfig()
    with pytest.raises(NonFiniteError) as error:
        train_unit(steps_of(model, config, 8), batches, 4)
    assert str(error.value) == (
        "The training loss must be finite, but it was nan by step 2 of its unit. "
        "Lower learning rates or clip_norm may help."
    )


def test_no_batch_is_an_error() -> None:
    model, _ = small_problem()
    config = TrainingConfig()
    with pytest.raises(ValueError, match="A unit must have at least one batch, but got none"):
        train_unit(steps_of(model, config, 1), [], 0)


def test_bn_mode_and_frozen_parts() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), nn.BatchNorm1d(2), nn.Dropout())
    modes = lambda: [m.training for m in model.modules() if not list(m.children())]  # noqa: E731
    set_training_mode(model, model[0], "train")
    assert modes() == [True, True, True, True]
    set_training_mode(model, model[0], "eval")
    assert modes() == [False, True, True, True]
    set_training_mode(model, model[0], "train", frozen=True)
    assert modes() == [False, False, True, True]


def test_prediction_keeps_order_and_makes_no_graph() -> None:
    model, batches = small_problem()
    logits, labels = predict(model, batches)
    assert torch.equal(labels, torch.cat([b[1] for b in batches]))
    assert torch.allclose(logits, model(torch.cat([b[0] for b in batches])), atol=1e-6)
    assert not logits.requires_grad


def test_auto_precision_is_float32_on_a_cpu() -> None:
    assert resolve_precision("auto", CPU) is torch.float32
    assert resolve_precision("bfloat16", CPU) is torch.bfloat16


def test_a_step_needs_torch_and_timm_only() -> None:
    """The step benchmark, from the pixels to the updated weights, on a machine with nothing else installed."""
    script = (
        "import sys; from benchmarks.step import main; main(); print(sorted({'ray', 'mlflow', 'optuna', 'pyarrow', "
        "'orchestrator', 'search_spaces', 'torchmetrics', 'scipy', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    size = ["--model=test_resnet", "--image-size=32", "--device=cpu", "--batch-size=4", "--steps=1", "--rounds=1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *size],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    *report, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert json.loads("\n".join(report))["ratio"] > 0
