"""Pretrained backbones: any timm classification model, split into pooled features and a linear head."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import timm
import torch
from torch import nn

from trainables.demo.backbones import NETWORKS, architecture, is_pretrained_here, pretrained_folder
from trainables.models.weights import create, folder_architecture, load_weight_file
from trainables.specs.trial_spec import PLAIN_VIEW, ModelSpec, ViewSettings


@dataclass(frozen=True)
class DataConfig:
    """Image preprocessing of a backbone: timm's pretrained configuration, with the changes of a study."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    """Side of the evaluation crop as a share of the resized image's side."""
    image_size: int
    """Side of the input images in pixels."""

    @property
    def stored_size(self) -> int:
        """Side of the square that the evaluation crop is taken from.

        In pixels; rounded as timm rounds it.
        """
        return math.floor(self.image_size / self.crop_pct)

    @property
    def crop_rounds(self) -> bool:
        """Whether cropping twice may differ from cropping once by a pixel.

        Twice: to `stored_size` and to `image_size`.
        """
        # Half the margin is a whole and even number otherwise, which commutes with rounding half to even.
        return (self.stored_size - self.image_size) % 4 != 0


@dataclass(frozen=True)
class Backbone:
    """Pristine pretrained network without classifier; shared by all trials of a process, read-only."""

    module: nn.Module
    """Images (B, 3, H, W) → pooled features (B, D); in eval mode."""
    data_config: DataConfig
    num_features: int
    """D."""
    digest: str
    """SHA-256 over its structure and the names and values of all its tensors."""


_loaded: dict[tuple[ModelSpec, int | None], Backbone] = {}
"""With the preprocessing of the pretrained configuration."""


def check_model(spec: ModelSpec) -> None:
    """Refuse an unavailable model before loading anything.

    Raises:
        ValueError: unknown name (with the closest matches), a weight file or folder that is missing or of another
            architecture, or a name without pretrained weights.
    """
    name = spec.name
    weights = Path(spec.weights) if spec.weights is not None else None
    if weights is not None and not weights.exists():
        raise ValueError(f"Weights must be an existing file or folder, but {spec.weights} does not exist.")
    if name.startswith("local-dir:"):
        folder_architecture(Path(name.removeprefix("local-dir:")))
    elif name not in NETWORKS and not name.startswith("hf-hub:"):
        _check_timm_name(name, needs_weights=spec.pretrained and weights is None)
    if weights is not None and weights.is_dir():
        in_folder = folder_architecture(weights)
        expected = _timm_architecture(name)
        if expected is not None and in_folder != expected:
            raise ValueError(
                f"Weights must be of the model's architecture {expected}, but {weights} holds {in_folder}."
            )


def backbone_data_config(spec: ModelSpec, image_size: int | None = None, view: ViewSettings = PLAIN_VIEW) -> DataConfig:
    """Image preprocessing of a model, determined without loading weights."""
    check_model(spec)
    if spec.name in NETWORKS:
        return _viewed(_data_config(architecture(spec.name), image_size), view)
    network = create(_source(spec), pretrained=False, image_size=image_size, meta=True)
    return _viewed(_data_config(network, image_size), view)


def load_pretrained(
    spec: ModelSpec, image_size: int | None = None, cache: Path | None = None, view: ViewSettings = PLAIN_VIEW
) -> Backbone:
    """Pristine network of a spec on the CPU, built once per process and arguments.

    Args:
        spec: network and weights.
        image_size: side of its images; None = the network's default.
        cache: folder of the demo networks, see `trainables.storage.compute_once.cache_root`.
        view: changes of its image preprocessing.

    Raises:
        ValueError: the weights cannot be loaded (they are never replaced by random ones), or the network does not take
            images of that side, or is no classification network.
    """
    key = (spec, image_size)
    if key not in _loaded:
        module = _load(spec, image_size, cache).eval().requires_grad_(True)
        config = _data_config(module, image_size)
        num_features = _feature_count(module, spec.name, config.image_size)
        _loaded[key] = Backbone(module, config, num_features, _digest(module))
    backbone = _loaded[key]
    return backbone if view.is_plain else replace(backbone, data_config=_viewed(backbone.data_config, view))


def _check_timm_name(name: str, needs_weights: bool) -> None:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        available = [*timm.list_models(), *NETWORKS]
        suggestions = difflib.get_close_matches(base, available, n=3)
        hint = f" Did you mean {' or '.join(map(repr, suggestions))}?" if suggestions else ""
        raise ValueError(
            f"A model is a timm name, local-dir:…, hf-hub:… or {' or '.join(NETWORKS)}, but got {name!r}.{hint}"
        )
    tags = timm.list_pretrained(f"{base}.*")
    if tag and name not in tags:
        raise ValueError(f"timm has these weights of {base}: {', '.join(tags) or 'none'}; but got {name!r}.")
    if needs_weights and not timm.models.is_model_pretrained(name):
        raise ValueError(f"timm has no pretrained weights for {name}. Give model.weights, or set pretrained: false.")


def _timm_architecture(name: str) -> str | None:
    """timm architecture of a model name.

    None for a hub model, whose config.json is not local.
    """
    if name in NETWORKS:
        return NETWORKS[name][0]
    if name.startswith("local-dir:"):
        return folder_architecture(Path(name.removeprefix("local-dir:")))
    return None if name.startswith("hf-hub:") else name.partition(".")[0]


def _source(spec: ModelSpec) -> str:
    """Model name to pass to timm.

    A folder of weights has a configuration of its own.
    """
    folder = spec.weights is not None and Path(spec.weights).is_dir()
    return f"local-dir:{spec.weights}" if folder else spec.name


def _load(spec: ModelSpec, image_size: int | None, cache: Path | None) -> nn.Module:
    check_model(spec)
    file = Path(spec.weights) if spec.weights is not None and not Path(spec.weights).is_dir() else None
    if is_pretrained_here(spec):
        return create(f"local-dir:{pretrained_folder(spec.name, cache)}", pretrained=True, image_size=image_size)
    if spec.name in NETWORKS and (file is not None or spec.weights is None):
        module = architecture(spec.name, image_size=image_size)
    else:
        pretrained = file is None and (spec.pretrained or spec.weights is not None)
        module = create(_source(spec), pretrained=pretrained, image_size=image_size)
    if file is not None:
        load_weight_file(module, file)
    return module


def _data_config(module: nn.Module, image_size: int | None) -> DataConfig:
    config = timm.data.resolve_model_data_config(module)
    return DataConfig(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        image_size=image_size or config["input_size"][-1],
    )


def _viewed(config: DataConfig, view: ViewSettings) -> DataConfig:
    """A preprocessing with the changes of a study."""
    return replace(config, **{name: value for name, value in asdict(view).items() if value is not None})


@torch.no_grad()
def _feature_count(module: nn.Module, name: str, side: int) -> int:
    """Width D of the pooled features, by a forward pass of one image."""
    try:
        shape = tuple(module(torch.zeros(1, 3, side, side)).shape)
    # timm refuses a side by `assert` where it embeds patches.
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{name} does not take images of {side} x {side} pixels ({error}). Choose another data.image_size."
        ) from error
    if len(shape) != 2:
        raise ValueError(
            f"A backbone gives one feature vector per image, but {name} gives a tensor of shape {shape}. Choose a "
            "classification model."
        )
    return int(shape[1])


def _digest(module: nn.Module) -> str:
    # The structure counts too: two networks may share all weights and differ in an activation function. Addresses of
    # functions in its `repr` differ from process to process.
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(module))
    digest = hashlib.sha256(structure.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # As bytes: NumPy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
