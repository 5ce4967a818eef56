"""Pretrained weights into a network: all of them or a clear error, never a random tensor in their place."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from trainables.models.timm_internals import checkpoint_filter, recorded_missing_keys

LOADING_ERRORS = (
    OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError,
    SafetensorError,
)  # fmt: skip
"""What a missing, cut or foreign weight file or config.json raises, depending on its format."""


def folder_architecture(folder: Path) -> str:
    """The timm architecture of a folder in timm's `local-dir` layout.

    Raises:
        ValueError: the folder has no readable config.json, or it names no architecture.
    """
    try:
        found = json.loads((folder / "config.json").read_text())["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"A local-dir model is a folder with weights and a config.json that names its timm architecture, but "
            f"{folder} has none ({type(error).__name__}). `timm.models.save_for_hf(model, folder)` writes one."
        ) from error
    return str(found)


def load_weight_file(module: nn.Module, path: Path) -> None:
    """Read a state dict (`.safetensors`, or anything that torch reads with `weights_only`) into a backbone.

    timm's own filter for the architecture is applied, which renames tensors of the original publication and resamples
    position embeddings to the network's image side. Tensors that the backbone does not have (a classifier) are ignored.

    Raises:
        ValueError: the file cannot be read, or lacks tensors of the network or has them in another shape.
    """
    try:
        # Said, because the default of older timm was to run whatever a pickle names.
        state: dict[str, Tensor] = timm.models.load_state_dict(str(path), weights_only=True)
        select = checkpoint_filter(module)
        state = select(state, module) if select else state
        foreign = [k for k, v in state.items() if not isinstance(v, Tensor) or v.layout != torch.strided]
        if foreign:
            raise ValueError(f"{foreign[0]} is no dense tensor")
    except LOADING_ERRORS as error:
        raise ValueError(
            f"The weight file {path} cannot be read ({_brief(error)}). Give an undamaged .safetensors or .pth file of "
            "this architecture."
        ) from error
    own = module.state_dict()
    usable = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    missing = module.load_state_dict(usable, strict=False).missing_keys
    if missing:
        raise ValueError(
            f"The weight file {path} lacks {len(missing)} tensors of the model or has them in another shape: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}. Give the weights of this very architecture."
        )


def create(name: str, *, pretrained: bool, image_size: int | None, meta: bool = False) -> nn.Module:
    """timm's network of a name without its classifier.

    Random weights, where they are wanted, are the same in every process, and the caller's generator is left alone.

    Args:
        name: a timm name, `local-dir:…` or `hf-hub:…`.
        pretrained: load its weights.
        image_size: side of its images; None = its own.
        meta: make shapes only, without memory or weights.

    Raises:
        ValueError: the weights cannot be had, or not all of them; the message has the command that mends it.
    """
    try:
        with recorded_missing_keys() as missing, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            if meta:
                with torch.device("meta"):
                    module = _create(name, False, image_size)
            else:
                module = _create(name, pretrained, image_size)
    except LOADING_ERRORS as error:
        raise ValueError(f"The model {name} could not be loaded ({_brief(error)}). {_remedy(name)}") from error
    if missing:
        raise ValueError(
            f"The weights of {name} are incomplete: missing keys ({', '.join(missing)}). A tensor that is not "
            "pretrained would start at random; give complete weights in model.weights."
        )
    return module


def _create(name: str, pretrained: bool, image_size: int | None) -> nn.Module:
    sized: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)
    except TypeError:
        if not sized:
            raise
        # Convolutional networks take images of any side and have no such argument.
        module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    return module


def _remedy(name: str) -> str:
    """The command that brings a model's weights to a machine, or mends a damaged download."""
    if name.startswith("local-dir:"):
        return "Give a folder with undamaged weights of the architecture in its config.json."
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
    else:
        found = timm.models.get_pretrained_cfg(name)
        repository = (found.hf_hub_id if found is not None else None) or ""
    if not repository:
        command = f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\""
        return f"With internet run `{command}`, or give model.weights."
    return (
        f"With internet run `hf download {repository} --force-download`; for a machine without, run it elsewhere, copy "
        "the Hugging Face cache (`$HF_HOME`, by default ~/.cache/huggingface), or give model.weights."
    )


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "weights_only" in text:  # torch's own way out is to run what the file says
        named = re.search(r"Unsupported globals: (.+?)\. ", text)
        return f"it asks for Python objects{f': {named[1]}' if named else ''}; Luthier reads nothing but tensors"
    text = text if len(text) <= 240 else f"{text[:239]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
