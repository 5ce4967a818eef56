"""Serialise and restore trial state; check that a checkpoint belongs to this trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainables.engine.best_weights import Best, put_back, take
from trainables.engine.phase_trainer import PhaseTrainer, optimizer_state
from trainables.specs.trial_spec import TrialSpec
from trainables.storage.checkpoint_format import CheckpointError, RunState, changed_tensors

if TYPE_CHECKING:
    from trainables.models.task_model import TaskModel

STATE_FORMAT = 2
"""Version of a state's plain values. 1, without a number, had accuracy and NLL of the best unit by these names."""

PARTS = ("model", "best", "optimizer", "unit")
"""First parts of the tensors' names: differences of the network and of its best unit from the pretrained one, the
optimiser's tensors, and, in the middle of a unit, its progress."""

_WITHOUT_EFFECT = ("store", "cache", "eval_batch_size", "evaluate_at", "interim_splits", "diagnostics", "corruptions")
"""Shared settings that no trained weight depends on. The contents of the store are identified by its digest."""


def identity(spec: TrialSpec) -> dict[str, Any]:
    """What makes two trials the same training, as JSON values.

    Weights and data come on top, by their digests.
    """
    shared = dataclasses.asdict(spec.shared)
    del shared["model"]  # its weights are what counts, wherever they lie
    if shared["channels_last"] is None:
        del shared["channels_last"]  # checkpoints from before it could be set do not have it
    fields = {"config": spec.config_hash, "seed": spec.seed, "held_out": spec.held_out, "sample": spec.sample}
    if spec.shared.view.is_plain:
        del shared["view"]  # checkpoints from before there was one can be continued
    # Neither do checkpoints from before these could be set have them.
    for name, default in (("decoder", None), ("schedule", None), ("evaluate_model", "best")):
        if shared[name] == default:
            del shared[name]
    if shared["loss"]["dice"] is None:
        del shared["loss"]["dice"]
    for name, value in shared.items():
        if name not in _WITHOUT_EFFECT:
            fields[f"shared.{name}"] = _as_json(value)
    return fields


def _as_json(value: Any) -> Any:
    """A setting as it is read back from a checkpoint: JSON has no tuples."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def check_format(meta: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a state was written by another version of Luthier."""
    version = meta.get("format", 1)
    if version != STATE_FORMAT:
        raise CheckpointError(
            f"A trial continues from a state of format {STATE_FORMAT}, but the checkpoint has format {version!r}: it "
            "was written by another version of Luthier. The trial starts over."
        )


def check_same(trial: Mapping[str, Any], checkpoint: Mapping[str, Any], misfits: Sequence[str] = ()) -> None:
    """Raise CheckpointError, naming every difference, where a checkpoint is not of this trial.

    Args:
        trial: identity of the trial.
        checkpoint: identity in the checkpoint; further keys do not matter here.
        misfits: see `misfits`.
    """
    # Not None, which is a value that a field may have (`held_out`).
    missing = object()
    problems = [
        f"{key}: {checkpoint.get(key, 'unknown')!r} in the checkpoint, {value!r} here"
        for key, value in trial.items()
        if checkpoint.get(key, missing) != value
    ]
    if misfits:
        listed = [*misfits[:10], *(["…"] if len(misfits) > 10 else [])]
        problems.append(f"{len(misfits)} tensors do not fit: {', '.join(listed)}")
    if problems:
        raise CheckpointError(
            f"A checkpoint continues its own trial only, but this one is of another: {'; '.join(problems)}."
        )


def misfits(model: nn.Module, saved: Mapping[str, Tensor]) -> list[str]:
    """Tensors of a checkpoint that do not fit the network.

    The network lacks them, or has them in another type or shape.
    """
    forms = {name: _form(tensor) for name, tensor in model.state_dict().items()}
    return [
        f"{name} is {_form(tensor)} in the checkpoint, {forms.get(name, 'missing')} here"
        for name, tensor in sorted(saved.items())
        if forms.get(name) != _form(tensor)
    ]


def pack(
    model: TaskModel, pristine: Mapping[str, Tensor], best: Best | None, training: PhaseTrainer | None
) -> dict[str, Tensor]:
    """Tensors of a checkpoint, as copies.

    Args:
        model: the network as it stands.
        pristine: the pretrained tensors by the names of a new model.
        best: the best unit so far, where its weights are not those of `model`.
        training: the phase under way, if it trains by gradient.
    """
    pristine = under_its_names(model, pristine)
    # Copies: training changes the network and the optimiser's tensors in place.
    tensors = {f"model/{k}": v.detach().clone() for k, v in changed_tensors(model.state_dict(), pristine).items()}
    if best is not None:
        tensors |= {f"best/{k}": v for k, v in changed_tensors(best.tensors, pristine).items()}
    if training is not None:
        optimizer = optimizer_state(training.optimizer, model)
        tensors |= {f"optimizer/{k}": v.clone() for k, v in optimizer.items()}
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
    """Give the network the weights of a checkpoint.

    Tensors that it does not hold become the pretrained ones.
    """
    put_back(model, under_its_names(model, pristine) | dict(saved))


def under_its_names(model: nn.Module, pristine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pretrained tensors by their names in this network.

    An adapter moves the layer that it wraps to `base_layer` below the old name.
    """
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
        meta: what `best_meta` returned; None = no unit is done.
        model: the network, its weights already restored.
        movable: names of the tensors that may have moved.
        pristine: the pretrained tensors.
        saved: the best unit's differences; None = the network's weights are the best ones.
    """
    if meta is None:
        return Best()
    tensors = take(model, movable)
    if saved is not None:
        of_best = {**under_its_names(model, pristine), **saved}
        # Copied also from `pristine`: the next best unit is written over these tensors.
        tensors = {name: of_best[name].to(value.device, copy=True) for name, value in tensors.items()}
    return Best(meta["unit"], meta["value"], meta["tie_breaker"], tensors)


def best_meta(best: Best) -> dict[str, Any] | None:
    """The best unit without its tensors, as JSON values; None = no unit is done."""
    if best.unit == 0:
        return None
    return {"unit": best.unit, "value": best.value, "tie_breaker": best.tie_breaker}


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
