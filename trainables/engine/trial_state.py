"""A trial's state and back: which tensors a checkpoint holds, and whether it belongs to the trial that reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainables.engine.best_weights import Best, put_back, take
from trainables.engine.phase_trainer import PhaseTraining, optimizer_state
from trainables.specs.trial_spec import TrialSpec
from trainables.storage.checkpoint_format import CheckpointError, RunState, changed_tensors

if TYPE_CHECKING:
    from trainables.models.backbone import Classifier

PARTS = ("model", "best", "optimizer", "unit")
"""First parts of the tensors' names: differences of the network and of its best unit from the pretrained one, the
optimiser's tensors, and, in the middle of a unit, what the unit has gathered so far."""

_WITHOUT_EFFECT = ("store", "cache", "eval_batch_size", "evaluate_at", "diagnostics")
"""Fields of a task that no trained weight depends on. What lies in the store is known by its digest."""


def identity(spec: TrialSpec) -> dict[str, Any]:
    """What makes two trials the same training, as JSON values; weights and data come on top, by their digests."""
    task = dataclasses.asdict(spec.task)
    del task["model"]  # its weights are what counts, wherever they lie
    kept = {f"task.{name}": value for name, value in task.items() if name not in _WITHOUT_EFFECT}
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
    own = {"config": spec.config_hash, "seed": spec.seed, "held_out": spec.held_out, "sample": spec.sample}
    return own | kept


def check_same(mine: Mapping[str, Any], theirs: Mapping[str, Any], misfits: Sequence[str] = ()) -> None:
    """Raise CheckpointError, naming every difference, where a checkpoint is not of this trial.

    Args:
        mine: what the trial is.
        theirs: what the checkpoint says of itself; further keys do not matter here.
        misfits: see `misfits`.
    """
    missing = object()
    told = [
        f"{k}: {theirs.get(k, 'unknown')!r} in the checkpoint, {mine[k]!r} here"
        for k in mine
        if theirs.get(k, missing) != mine[k]
    ]
    if misfits:
        shown = [*misfits[:10], *(["…"] if len(misfits) > 10 else [])]
        told.append(f"{len(misfits)} tensors do not fit: {', '.join(shown)}")
    if told:
        raise CheckpointError(
            f"A checkpoint continues its own trial only, but this one is of another: {'; '.join(told)}."
        )


def misfits(model: nn.Module, saved: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a checkpoint that the network lacks, or that have another type or shape there."""
    own = model.state_dict()
    return [
        f"{name} is {_form(tensor)} in the checkpoint, {_form(own[name]) if name in own else 'missing'} here"
        for name, tensor in sorted(saved.items())
        if name not in own or _form(own[name]) != _form(tensor)
    ]


def pack(
    model: Classifier, pristine: Mapping[str, Tensor], best: Best | None, training: PhaseTraining | None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as copies.

    Args:
        model: the network as it stands.
        pristine: the pretrained tensors by the classifier's names.
        best: the best unit so far, where its weights are not those of `model`.
        training: the phase under way, if it trains by gradient.
    """
    pristine = under_its_names(model, pristine)
    tensors = {f"model/{k}": v.detach().clone() for k, v in changed_tensors(model.state_dict(), pristine).items()}
    if best is not None:
        tensors |= {f"best/{k}": v for k, v in changed_tensors(best.tensors, pristine).items()}
    if training is not None:
        found = optimizer_state(training.optimizer, model)
        tensors |= {f"optimizer/{k}": v.clone() for k, v in found.items()}
        tensors |= {f"unit/{k}": v.clone() for k, v in training.unit_state().items()}
    return tensors


def unpack(state: RunState) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors by part (`PARTS`) and name."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in state.tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise CheckpointError(f"Tensors of a checkpoint belong to {', '.join(PARTS)}, but one is named {name!r}.")
        parts[part][rest] = tensor
    return parts


def put_weights(model: nn.Module, pristine: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Give the network the weights of a checkpoint; tensors that it does not hold become pretrained ones again."""
    put_back(model, under_its_names(model, pristine) | dict(saved))


def under_its_names(model: nn.Module, pristine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pretrained tensors by the names that they have in this network: an adapter moves the layer that it wraps to
    `base_layer` below the old name."""
    plain = {name: name.replace(".base_layer.", ".") for name in model.state_dict()}
    return {name: pristine[old] for name, old in plain.items() if old in pristine}


def best_of(
    meta: Mapping[str, Any] | None,
    model: nn.Module,
    movable: set[str],
    pristine: Mapping[str, Tensor],
    saved: Mapping[str, Tensor] | None,
) -> Best:
    """The best unit so far, from a checkpoint.

    Args:
        meta: `unit`, `accuracy`, `nll`; None = no unit is done.
        model: the network, its weights already put back.
        movable: names of the tensors that may have moved.
        pristine: the pretrained tensors.
        saved: the best unit's differences; None = the network's weights are the best ones.
    """
    if meta is None:
        return Best()
    tensors = take(model, movable)
    if saved is not None:
        kept = {**under_its_names(model, pristine), **saved}
        tensors = {k: kept[k].to(v.device, copy=True) for k, v in tensors.items()}
    return Best(meta["unit"], meta["accuracy"], meta["nll"], tensors)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
