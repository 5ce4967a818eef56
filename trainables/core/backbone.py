"""Pretrained backbones: any timm classification model, split into pooled features and a linear head."""

from __future__ import annotations

import copy
import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from trainables.core.task import ModelSpec

BUILT_IN = ("digits_vit", "digits_cnn")


@dataclass(frozen=True)
class DataConfig:
    """What a backbone expects of its images, from timm's pretrained configuration."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    image_size: int


@dataclass(frozen=True)
class Backbone:
    """A pristine pretrained network without its classifier; shared by all trials of a process, never changed."""

    module: nn.Module
    """Images (B, 3, H, W) → pooled features (B, D); in eval mode, on the CPU."""
    data_config: DataConfig
    num_features: int
    digest: str
    """SHA-256 over names and values of all its tensors."""


class Classifier(nn.Module):
    """A backbone and a linear head, apart for every family: parameters are `backbone.*` and `head.*`."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → pooled features (B, D)."""
        features: Tensor = self.backbone(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → logits (B, K)."""
        logits: Tensor = self.head(self.features(images))
        return logits


_loaded: dict[tuple[Any, ...], Backbone] = {}


def check_model(spec: ModelSpec) -> None:
    """Refuse, without loading anything, a model that cannot be had.

    Raises:
        ValueError: unknown name (with the nearest ones), missing weight file, or a name without pretrained weights.
    """
    if spec.weights is not None and not Path(spec.weights).exists():
        raise ValueError(f"Weights must be an existing file or folder, but {spec.weights} does not exist.")
    name = spec.name
    if name in BUILT_IN or name.startswith("hf-hub:"):
        return
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise ValueError(f"A local-dir model is a folder with config.json, but {folder} has none.")
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"A model is a timm name, local-dir:…, hf-hub:… or {' or '.join(BUILT_IN)}, but got "
                         f"{name!r}.{hint}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise ValueError(f"timm has these weights of {architecture}: {', '.join(tags) or 'none'}; but got {name!r}.")
    if spec.pretrained and spec.weights is None and not tags:
        raise ValueError(f"timm has no pretrained weights for {name}. Give model.weights, or set pretrained: false.")


def backbone_data_config(spec: ModelSpec, image_size: int | None = None) -> DataConfig:
    """Normalisation, interpolation, crop share and side of one model; loads no weights."""
    return _data_config(_create(spec, pretrained=False, image_size=image_size, meta=True), image_size)


def load_pretrained(spec: ModelSpec, image_size: int | None = None, cache: Path | None = None) -> Backbone:
    """The pristine network of a spec; built once per process and arguments, then shared.

    Raises:
        ValueError: the weights cannot be loaded; they are never replaced by random ones.
    """
    key = (spec, image_size)
    if key not in _loaded:
        module = _create(spec, spec.pretrained and spec.weights is None, image_size, cache=cache)
        if spec.weights is not None:
            _load_weights(module, Path(spec.weights))
        module.eval()
        size = _data_config(module, image_size)
        with torch.no_grad():
            features = module(torch.zeros(1, 3, size.image_size, size.image_size))
        if features.ndim != 2:
            raise ValueError(f"A backbone gives one feature vector per image, but {spec.name} gives a tensor of shape "
                             f"{tuple(features.shape)}. Choose a classification model.")
        _loaded[key] = Backbone(module, size, features.shape[1], _digest(module))
    return _loaded[key]


def new_classifier(backbone: Backbone, num_classes: int, device: torch.device | str, seed: int) -> Classifier:
    """A fresh copy of a backbone under an untrained linear head, drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(backbone.num_features, num_classes)
    return Classifier(copy.deepcopy(backbone.module), head).to(device)


def _create(
    spec: ModelSpec, pretrained: bool, image_size: int | None, cache: Path | None = None, meta: bool = False
) -> nn.Module:
    check_model(spec)
    name = spec.name
    if name in BUILT_IN:
        from trainables.core.digits_backbones import architecture, pretrained_folder

        if not (pretrained and not meta):
            return architecture(name)
        name = f"local-dir:{pretrained_folder(name, cache)}"
    elif spec.weights is not None and Path(spec.weights).is_dir():
        name = f"local-dir:{spec.weights}"
    arguments: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        with torch.device("meta") if meta else torch.random.fork_rng(devices=[]):
            if not meta:
                torch.manual_seed(0)  # random weights of a spec without pretrained ones are the same everywhere
            return _without_size(name, pretrained, arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The weights of {spec.name} could not be loaded ({type(error).__name__}: {error}). On a machine with "
            f"internet run `python -c \"import timm; timm.create_model('{spec.name}', pretrained=True)\"` and copy its "
            "Hugging Face cache here, or give model.weights."
        ) from error


def _without_size(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except TypeError:  # convolutional networks take any size and have no such argument
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    return model


def _data_config(module: nn.Module, image_size: int | None) -> DataConfig:
    found = timm.data.resolve_model_data_config(module)
    return DataConfig(
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
        crop_pct=found["crop_pct"],
        image_size=image_size or found["input_size"][-1],
    )


def _load_weights(module: nn.Module, path: Path) -> None:
    if path.is_dir():
        return
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    own = module.state_dict()
    usable = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    missing = sorted(set(own) - set(usable))
    if missing:
        raise ValueError(f"The weight file {path} lacks {len(missing)} tensors of the model or has them in another "
                         f"shape: {', '.join(missing[:5])}. Give the weights of this very architecture.")
    module.load_state_dict(usable)


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
