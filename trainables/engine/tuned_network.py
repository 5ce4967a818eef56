"""Kept weights of a trial's network.

Taken out of it, and put back onto the pretrained one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainables.engine.best_weights import put_back
from trainables.engine.process_cache import on_device
from trainables.models.backbone import Backbone, load_pretrained
from trainables.models.batch_norm import BATCH_NORMS
from trainables.models.low_rank import LowRankUpdate
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.checkpoint_format import bitwise_equal
from trainables.storage.kept_weights import KeptWeights, WeightsError
from trainables.tasks.base import TargetSpec, TaskSettings
from trainables.tasks.registry import task_for

if TYPE_CHECKING:
    from trainables.models.task_model import TaskModel

HEAD = "head."
"""Beginning of the names of a head's tensors."""


def take_weights(
    model: nn.Module, pristine: Mapping[str, Tensor], update: LowRankUpdate | None, meta: Mapping[str, Any]
) -> KeptWeights:
    """Weights of a finished trial.

    Args:
        model: the tuned network, of the pretrained one's structure; only referred to, not copied.
        pristine: the pretrained tensors by its names.
        update: low-rank update that was merged into the network. It is stored in place of the merged weights where
            merging it again gives their bits; after an interpolation of the weights it does not.
        meta: see `KeptWeights.meta`; `adapter` is added.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    always = batch_norm_buffers(model)
    tensors = {
        name: value
        for name, value in state.items()
        if name.startswith(HEAD) or name in always or not bitwise_equal(value, pristine.get(name))
    }
    if update is None or not _gives(update, state, pristine):
        return KeptWeights(tensors, {}, {**meta, "adapter": None})
    merged = {f"{target}.weight" for target in update.targets}
    rest = {name: value for name, value in tensors.items() if name not in merged}
    adapter = {
        "kind": "lora",
        "r": update.rank,
        "alpha": update.alpha,
        "scale": update.scale,
        "targets": list(update.targets),
    }
    return KeptWeights(rest, update.tensors, {**meta, "adapter": adapter})


def tuned_network(
    weights: KeptWeights,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> TaskModel:
    """The network that a trial tested, in eval mode.

    Args:
        weights: of the trial.
        backbone: the pretrained network; None = loaded as the trial did.
        device: of the network.
        cache: folder of the demo networks, see `trainables.storage.compute_once.cache_root`.

    Raises:
        WeightsError: the weights belong to another pretrained network, or lack tensors of the head or have some that
            the network lacks.
        ValueError: the pretrained network cannot be loaded.
    """
    meta = weights.meta
    if backbone is None:
        backbone = load_pretrained(ModelSpec(**meta["model"]), meta["requested_image_size"], cache)
    if backbone.digest != meta["pretrained_digest"]:
        raise WeightsError(
            f"Kept weights are put on the pretrained network that they were trained from, of digest "
            f"{meta['pretrained_digest'][:12]}…, but {meta['model']['name']} has {backbone.digest[:12]}… here. Give "
            "the weights and the version of timm that the trial had."
        )
    # Weights from before there were decoders do not name one.
    settings = TaskSettings(decoder=meta.get("decoder"))
    task = task_for(meta["task"], TargetSpec(tuple(meta["classes"])), settings)
    # Any seed: the head's random start is written over.
    model = task.build_model(on_device(backbone, torch.device(device)), seed=0)
    state = model.state_dict()
    tensors = {**_merged(weights, state), **weights.tensors}
    _check_fit(state, tensors)
    put_back(model, tensors)
    return model.eval()


def low_rank_update(weights: KeptWeights) -> LowRankUpdate | None:
    """The low-rank update of a trial, before it was merged.

    None where no update gives the trial's weights.
    """
    adapter = weights.meta.get("adapter")
    if adapter is None:
        return None
    return LowRankUpdate(adapter["r"], adapter["alpha"], tuple(adapter["targets"]), weights.adapter)


def batch_norm_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers of every BatchNorm.

    Running statistics are part of a tuned network even where no gradient reached its layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
    buffers = {f"{layer}.{name}" for layer, module in layers.items() for name, _ in module.named_buffers(recurse=False)}
    return buffers & model.state_dict().keys()


def _gives(update: LowRankUpdate, state: Mapping[str, Tensor], pristine: Mapping[str, Tensor]) -> bool:
    """Whether merging the update gives the network's weights bit for bit.

    The update is merged into the pretrained weights.
    """
    names = {target: f"{target}.weight" for target in update.targets}
    return all(
        name in pristine and bitwise_equal(update.merged(target, pristine[name]), state[name])
        for target, name in names.items()
    )


def _merged(weights: KeptWeights, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merged weights of the adapter's maps, by name."""
    update = low_rank_update(weights)
    if update is None:
        return {}
    missing = [target for target in update.targets if f"{target}.weight" not in state]
    missing += [name for t in update.targets for name in (f"{t}.lora_A", f"{t}.lora_B") if name not in update.tensors]
    if missing:
        raise WeightsError(
            f"A kept adapter has A and B of maps that its network has, but {', '.join(missing[:5])} "
            f"{'is' if len(missing) == 1 else 'are'} missing."
        )
    return {f"{target}.weight": update.merged(target, state[f"{target}.weight"]) for target in update.targets}


def _check_fit(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    misfits = [
        name
        for name, value in tensors.items()
        if name not in state or state[name].shape != value.shape or state[name].dtype != value.dtype
    ]
    misfits += [name for name in state if name.startswith(HEAD) and name not in tensors]
    if misfits:
        raise WeightsError(
            f"Kept weights hold the whole head and tensors that the network has in the same shape, but {len(misfits)} "
            f"do not fit: {', '.join(misfits[:5])}{' …' if len(misfits) > 5 else ''}."
        )
