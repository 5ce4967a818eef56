"""A tuned network under timm's own parameter names.

One classifier that timm alone can build and load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from trainables.demo.backbones import NETWORKS
from trainables.models.batch_norm import BATCH_NORMS
from trainables.models.task_model import TaskModel
from trainables.models.weights import LOADING_ERRORS
from trainables.specs.trial_spec import ModelSpec


@dataclass(frozen=True)
class Architecture:
    """What timm needs to build a network: `timm.create_model(name, **model_args)`."""

    name: str
    """timm architecture, without the tag of its weights."""
    model_args: Mapping[str, Any]
    """JSON values."""


@dataclass(frozen=True)
class TimmClassifier:
    """A network of timm with the weights of a tuned one."""

    module: nn.Module
    """Images (B, 3, H, W) → logits (B, K); on the CPU, in eval mode."""
    architecture: Architecture
    heads: tuple[str, ...]
    """Paths of the modules that the backbone does not have."""


def architecture_of(spec: ModelSpec) -> Architecture:
    """timm architecture and arguments of a model, without its image size.

    Raises:
        ValueError: the configuration of a folder or a hub model cannot be read.
    """
    folder = spec.weights if spec.weights is not None and Path(spec.weights).is_dir() else None
    name = f"local-dir:{folder}" if folder is not None else spec.name
    if name in NETWORKS:
        base, arguments = NETWORKS[name]
        return Architecture(base, dict(arguments))
    try:
        if name.startswith("local-dir:"):
            text = (Path(name.removeprefix("local-dir:")) / "config.json").read_text(encoding="utf-8")
            config = json.loads(text)
            return Architecture(str(config["architecture"]), dict(config.get("model_args") or {}))
        if name.startswith("hf-hub:"):
            _, architecture, arguments = timm.models.load_model_config_from_hf(name.removeprefix("hf-hub:"))
            return Architecture(architecture, dict(arguments))
    except LOADING_ERRORS as error:
        raise ValueError(
            f"A model's config.json must name its timm architecture, but that of {name} cannot be read ({error}). "
            "Restore the folder, or the Hugging Face cache, that the study was run with."
        ) from error
    return Architecture(name.partition(".")[0], {})


def timm_classifier(model: TaskModel, spec: ModelSpec, image_size: int) -> TimmClassifier:
    """The function of a tuned network as one classifier of timm.

    Args:
        model: backbone of timm under a linear head; not changed.
        spec: the network that the backbone was built from.
        image_size: side of its images, in pixels.

    Raises:
        ValueError: timm's classifier of this architecture cannot hold this backbone and head.
    """
    head = model.head
    if not (model.pooled and isinstance(head, nn.Linear)):
        raise ValueError(
            f"A timm classifier is a linear map on pooled features, but this network's head is "
            f"{type(head).__name__}. Only classification can be exported to it."
        )
    source = architecture_of(spec)
    module, arguments = _build(source, head.out_features, image_size)
    state, heads = _renamed(model, module, source.name)
    # Strict: no tensor may keep its random value.
    module.load_state_dict(state, strict=True)
    return TimmClassifier(module.eval().requires_grad_(False), Architecture(source.name, arguments), heads)


def timm_encoder(backbone: nn.Module, spec: ModelSpec, image_size: int) -> tuple[nn.Module, Architecture]:
    """A tuned backbone as a network without classifier that timm alone can build and load.

    Args:
        backbone: of timm; not changed.
        spec: the network that it was built from.
        image_size: side of its images, in pixels.

    Returns:
        The network on the CPU, in eval mode, and what timm needs to build it.

    Raises:
        ValueError: timm's network of this architecture does not have the backbone's tensors.
    """
    source = architecture_of(spec)
    module, arguments = _build(source, 0, image_size)
    try:
        module.load_state_dict({name: value.detach().cpu() for name, value in backbone.state_dict().items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:240]
        raise ValueError(
            f"timm's network {source.name} must hold all tensors of the tuned encoder, but it does not ({reason})."
        ) from error
    return module.eval().requires_grad_(False), Architecture(source.name, arguments)


def _build(source: Architecture, num_classes: int, image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """A network with random weights, and its arguments.

    With the image size where the architecture has such an argument.
    """
    arguments = {name: value for name, value in source.model_args.items() if name != "num_classes"}
    sized = {**arguments, "img_size": image_size}
    # timm draws the weights, which are written over, from the global generator.
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(source.name, num_classes=num_classes, **sized), sized
        except TypeError:
            # Convolutional networks take images of any side and have no such argument.
            arguments.pop("img_size", None)
            return timm.create_model(source.name, num_classes=num_classes, **arguments), arguments


@torch.no_grad()
def _renamed(model: TaskModel, module: nn.Module, name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """State dict of `module` that computes what `model` computes.

    Returned with the paths of the classifier's parts.
    """
    expected = module.state_dict()
    backbone = {key: value.detach().cpu().clone() for key, value in model.backbone.state_dict().items()}
    foreign = [key for key, value in backbone.items() if key not in expected or expected[key].shape != value.shape]
    if foreign:
        raise ValueError(
            f"timm's classifier of {name} must hold all tensors of the tuned network, but it has no {foreign[0]} of "
            "this shape. Its structure without classifier differs from that with one; it cannot be exported as one."
        )
    classifier = {key for key in expected if key not in backbone}
    owners = dict.fromkeys(key.rpartition(".")[0] for key in expected if key in classifier)
    for owner in owners:
        for key, value in _classifier_tensors(module.get_submodule(owner), model.head, name, owner).items():
            backbone[f"{owner}.{key}"] = value
    return backbone, tuple(owners)


def _classifier_tensors(part: nn.Module, head: nn.Linear, name: str, path: str) -> dict[str, Tensor]:
    """State dict of one part of timm's classifier.

    Where there are two linear maps (distilled networks), each gets the head, whose mean is the head on the mean of
    their features.
    """
    if isinstance(part, nn.Linear | nn.Conv2d) and part.weight.numel() == head.weight.numel() and part.bias is not None:
        weight = head.weight.detach().cpu().reshape(part.weight.shape).clone()
        bias = part.bias.new_zeros(part.bias.shape) if head.bias is None else head.bias.detach().cpu().clone()
        return {"weight": weight, "bias": bias}
    if isinstance(part, BATCH_NORMS) and part.weight is not None and part.running_mean is not None:
        state = {key: value.clone() for key, value in part.state_dict().items()}
        # The identity: (x − 0) / √(1 + ε) · √(1 + ε) + 0.
        state["running_mean"].zero_()
        state["running_var"].fill_(1.0)
        state["weight"].fill_((1.0 + part.eps) ** 0.5)
        state["bias"].zero_()
        return state
    raise ValueError(
        f"timm's classifier of {name} must be a linear map on pooled features, but its {path} is "
        f"{type(part).__name__}. This architecture cannot be exported as one."
    )
