"""Loading of pretrained weights: complete or an error, never a randomly initialised tensor."""

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
"""Errors of a missing, truncated or foreign weight file or config.json, depending on its format."""


def folder_architecture(folder: Path) -> str:
    """timm architecture of a folder in timm's `local-dir` layout.

    Raises:
        ValueError: the folder has no readable config.json, or it names no architecture.
    """
    try:
        architecture = json.loads((folder / "config.json").read_text())["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"A local-dir model is a folder with weights and a config.json that names its timm architecture, but "
            f"{folder} has none ({type(error).__name__}). `timm.models.save_for_hf(model, folder)` writes one."
        ) from error
    return str(architecture)


def load_weight_file(module: nn.Module, path: Path) -> None:
    """Load a state dict file into a backbone.

    The file is `.safetensors`, or anything that torch reads with `weights_only`. timm's checkpoint filter for the
    architecture renames tensors of the original publication and resamples position embeddings to the network's image
    side. Tensors that the backbone does not have (a classifier) are ignored.

    Raises:
        ValueError: the file cannot be read, or lacks tensors of the network or has them in another shape.
    """
    try:
        # Explicit, because older timm defaults to unpickling, which executes code of the file.
        state: dict[str, Tensor] = timm.models.load_state_dict(str(path), weights_only=True)
        select = checkpoint_filter(module)
        state = select(state, module) if select else state
        not_dense = [k for k, v in state.items() if not isinstance(v, Tensor) or v.layout != torch.strided]
        if not_dense:
            raise ValueError(f"{not_dense[0]} is no dense tensor")
    except LOADING_ERRORS as error:
        raise ValueError(
            f"The weight file {path} cannot be read ({_brief(error)}). Give an undamaged .safetensors or .pth file of "
            "this architecture."
        ) from error
    expected = module.state_dict()
    # By shape as well: torch refuses another one even without `strict`, in a message without a way out.
    usable = {k: v for k, v in state.items() if k in expected and expected[k].shape == v.shape}
    # Not strict: what the file has beyond the backbone (its classifier) is ignored, what it lacks is refused below.
    missing = module.load_state_dict(usable, strict=False).missing_keys
    if missing:
        raise ValueError(
            f"The weight file {path} lacks {len(missing)} tensors of the model or has them in another shape: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}. Give the weights of this very architecture."
        )


def create(name: str, *, pretrained: bool, image_size: int | None, meta: bool = False) -> nn.Module:
    """Create timm's network of a name without its classifier.

    Random weights (`pretrained=False`) are the same in every process; the caller's random state is restored.

    Args:
        name: a timm name, `local-dir:…` or `hf-hub:…`.
        pretrained: load its weights.
        image_size: side of its images; None = the network's default.
        meta: create on the meta device: shapes only, without memory or weights.

    Raises:
        ValueError: the weights are unavailable or incomplete; the message has the command that fixes it.
    """
    try:
        with recorded_missing_keys() as missing, torch.random.fork_rng(devices=[]):
            # A constant: random weights are the same in every process, so that their digest identifies them.
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
    """Instruction that downloads a model's weights, or repairs a damaged download."""
    if name.startswith("local-dir:"):
        return "Give a folder with undamaged weights of the architecture in its config.json."
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
    else:
        config = timm.models.get_pretrained_cfg(name)
        repository = (config.hf_hub_id if config is not None else None) or ""
    if not repository:
        command = f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\""
        return f"With internet run `{command}`, or give model.weights."
    return (
        f"With internet run `hf download {repository} --force-download`; for a machine without, run it elsewhere, copy "
        "the Hugging Face cache (`$HF_HOME`, by default ~/.cache/huggingface), or give model.weights."
    )


def _brief(error: BaseException) -> str:
    """One line of at most about 240 characters on why weights did not load."""
    text = " ".join(str(error).split())
    if "weights_only" in text:  # torch's own hint is to unpickle the file, which would execute its code
        unsupported = re.search(r"Unsupported globals: (.+?)\. ", text)
        objects = f": {unsupported[1]}" if unsupported else ""
        return f"it asks for Python objects{objects}; Luthier reads nothing but tensors"
    text = text if len(text) <= 240 else f"{text[:239]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
