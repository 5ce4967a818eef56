"""A trial resumes bit for bit after any of its steps, under settings that touch the order of what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.trials import MakeTrial, history_of, same_numbers, same_tensors
from trainables.engine import loop, weight_interpolation
from trainables.engine.evaluation import validation_scores
from trainables.engine.trial import Trial
from trainables.storage.checkpoint_format import load_state, save_state

AWKWARD = {"epochs": 5, "steps_per_unit": 3, "augment": ("flip", "crop"), "evaluate_at": (2,)}
"""Units of three steps where an epoch has four, so that units begin and end in the middle of one."""
CYCLES = {"cycles": 2, "lam_choice": "sweep", "wise": "sweep"}
Make = Callable[..., Trial]


@pytest.fixture
def make(make_trial: MakeTrial) -> Make:
    def make(strategy: str, kind: str, hparams: Mapping[str, Any], **fields: Any) -> Trial:
        return make_trial(strategy, kind, seed=5, task={**AWKWARD, **fields}, **hparams)

    return make


def kept_after_every_step(run: Trial, folder: Path) -> tuple[list[dict[str, Any]], list[tuple[int, Path]]]:
    """All results of `run`, and (units done, checkpoint) after each of its steps and units."""
    history: list[dict[str, Any]] = []
    checkpoints: list[tuple[int, Path]] = []

    def keep() -> None:
        checkpoints.append((len(history), folder / f"{len(checkpoints)}"))
        save_state(checkpoints[-1][1], run.state())

    run.after_step = keep
    while not run.finished:
        history.append(run.step())
        if not run.finished:
            keep()
    return history, checkpoints


CASES = [
    ("layernorm", "vit", CYCLES, {"precision": "bfloat16"}, 7),
    ("layernorm", "hybrid", {"cycles": 2, "lam_choice": "learned", "lam_scope": "layer"}, {"augment": ()}, 64),
    ("lp_ft", "hybrid", {"wise": 0.5}, {"precision": "bfloat16"}, 64),
    ("components", "vit", {"kinds": "auto", "bn_conversion": True}, {"precision": "bfloat16"}, 7),
    ("lora", "hybrid", {"targets": "mlp", "bn_conversion": True, "optimizer": "adamw", "wise": "sweep"}, {}, 7),
]
"""Strategy, network, hyperparameters, further settings, and how many images fit into memory."""


@pytest.mark.parametrize(("strategy", "kind", "hparams", "fields", "fits"), CASES)
def test_p28_it_continues_bit_for_bit_from_after_any_step(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    kind: str,
    hparams: Mapping[str, Any],
    fields: Mapping[str, Any],
    fits: int,
) -> None:
    real = loop.PhaseSteps.batch_loss

    def limited(*arguments: Any) -> Any:
        if len(arguments[-1]) > fits:
            raise torch.OutOfMemoryError("planted")
        return real(*arguments)

    monkeypatch.setattr(loop.PhaseSteps, "batch_loss", limited)
    whole = make(strategy, kind, hparams, **fields)
    expected = history_of(whole)
    history, kept = kept_after_every_step(make(strategy, kind, hparams, **fields), tmp_path)
    assert same_numbers(history, expected)
    for units, folder in kept[1::5]:  # units of three steps: every place in a unit comes up
        again = make(strategy, kind, hparams, **fields)
        again.load_state(load_state(folder))
        torch.rand(3)
        assert same_numbers(expected[units:], history_of(again)), f"from {folder.name}"
        assert same_tensors(whole.model.state_dict(), again.model.state_dict())


class Cut(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("at", [20, 30])
def test_p28_cut_off_while_lambda_or_alpha_is_swept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The evaluations of both sweeps: 21 of λ, then 11 of α."""
    arguments = ("layernorm", "vit", {"lam_choice": "sweep", "wise": "sweep"})
    whole = make(*arguments, epochs=1, evaluate_at=())
    expected = history_of(whole)
    seen = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def scores(*given: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at:
                raise Cut
            return real(*given)

        return scores

    with monkeypatch.context() as patch:
        counting = counted(validation_scores)
        patch.setattr(weight_interpolation, "validation_scores", counting)
        run = make(*arguments, epochs=1, evaluate_at=())
        steps = 0

        def keep() -> None:
            nonlocal steps
            steps += 1
            save_state(tmp_path / str(steps), run.state())

        run.after_step = keep
        with pytest.raises(Cut):
            run.step()
    again = make(*arguments, epochs=1, evaluate_at=())
    again.load_state(load_state(tmp_path / str(steps)))
    assert same_numbers(expected, history_of(again))
    assert same_tensors(whole.model.state_dict(), again.model.state_dict())
