"""Folders of segmentation models: an encoder in timm's `local-dir` layout, and its decoder beside it.

    config.json           timm's fields of the encoder; classes, decoder, evaluation view
    model.safetensors     encoder, under timm's own names
    decoder.safetensors   decoder

`timm.create_model("local-dir:DIR", pretrained=True)` builds the encoder alone. Decoder and encoder together are built
by Luthier, from what `config.json` says of the maps that are read; the formats onnx and torch_export hold both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from orchestrator.export.errors import ModelFolderError
from orchestrator.export.timm_folder import (
    CONFIG,
    FACTS,
    FORBIDDEN_ARGUMENTS,
    WEIGHTS,
    build_network,
    check_digests,
    load_weights,
    pretrained_cfg,
    read_json,
    three,
    write_weights,
)
from trainables.data.masked_pictures import Evaluation
from trainables.models.backbone import DataConfig
from trainables.models.timm_classifier import Architecture
from trainables.specs.metrics import SEGMENTATION
from trainables.storage.checkpoint_format import save_tensors
from trainables.tasks.segmentation import DenseModel, Reading, dense_model

DECODER = "decoder.safetensors"
EVALUATIONS: tuple[Evaluation, ...] = ("resize", "slide")
MAX_SIDE = 8192
MAX_CLASSES = 255


@dataclass(frozen=True)
class SegmentationSettings:
    """What a folder says about its model."""

    architecture: Architecture
    """Of the encoder."""
    reading: Reading
    classes: tuple[str, ...]
    """Names, in the order of the logits."""
    preprocessing: DataConfig
    evaluation: Evaluation
    """Views of a picture."""
    training_values: tuple[tuple[int | str, ...], ...]
    """Of each class, the values (integers, or colours as `#rrggbb`) that it had in the training masks."""


@dataclass(frozen=True)
class SegmentationFolder:
    """A folder, and what it says."""

    path: Path
    settings: SegmentationSettings
    facts: Mapping[str, Any]
    """`luthier.json`."""


def is_segmentation(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of a segmentation model."""
    return config.get("task") == SEGMENTATION.task


def write_segmentation_config(folder: Path, encoder: nn.Module, settings: SegmentationSettings) -> None:
    """Write config.json: the encoder as timm reads it, and everything that timm has no field for."""
    preprocessing = settings.preprocessing
    module: Any = encoder
    config = {
        "architecture": settings.architecture.name,
        "num_classes": 0,
        "num_features": int(module.num_features),
        "label_names": list(settings.classes),
        "model_args": dict(settings.architecture.model_args),
        "pretrained_cfg": pretrained_cfg(module, 0, preprocessing),
        "task": SEGMENTATION.task,
        "decoder": settings.reading.to_json(),
        "evaluation": {"view": settings.evaluation, "side": preprocessing.image_size},
        "training_values": [list(values) for values in settings.training_values],
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_segmentation_weights(folder: Path, encoder: nn.Module, decoder: nn.Module) -> None:
    """Write model.safetensors and decoder.safetensors."""
    write_weights(folder, encoder)
    save_tensors(decoder.state_dict(), folder / DECODER, metadata={"format": "pt"})


def read_segmentation_folder(path: str | Path) -> SegmentationFolder:
    """What a folder says about its model; digests are compared where the folder has them.

    Raises:
        ModelFolderError: no exported segmentation model, or a damaged one.
    """
    folder = Path(path)
    config = read_json(folder, CONFIG)
    facts = read_json(folder, FACTS) if (folder / FACTS).exists() else {}
    check_digests(folder, facts, (CONFIG, WEIGHTS, DECODER))
    try:
        settings = _settings(config)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelFolderError(
            f"An exported segmentation model has architecture, label_names, pretrained_cfg, decoder and evaluation in "
            f"{CONFIG}, but that of {folder} lacks or garbles {error}. Export the model again."
        ) from error
    return SegmentationFolder(folder, settings, facts)


def load_segmentation_network(folder: SegmentationFolder) -> DenseModel:
    """Encoder and decoder of a folder on the CPU, in eval mode; nothing but its safetensors files is read.

    Raises:
        ModelFolderError: weights are missing, damaged or of another network.
    """
    settings = folder.settings
    name = settings.architecture.name
    encoder_tensors = load_weights(folder.path, WEIGHTS, folder.facts)
    decoder_tensors = load_weights(folder.path, DECODER, folder.facts)
    encoder = build_network(folder.path, name, 0, settings.architecture.model_args, encoder_tensors)
    try:
        network = dense_model(encoder, settings.reading, len(settings.classes), seed=0)
        network.head.load_state_dict(decoder_tensors, strict=True)
    except (RuntimeError, ValueError, AttributeError, StopIteration) as error:
        reason = " ".join(str(error).split())[:240]
        raise ModelFolderError(
            f"The decoder {settings.reading.decoder} of {folder.path} must fit {name}, but it does not ({reason}). "
            "Export the model again."
        ) from error
    network.eval().requires_grad_(False)
    return network


def _settings(config: Mapping[str, Any]) -> SegmentationSettings:
    cfg = config["pretrained_cfg"]
    arguments = dict(config.get("model_args") or {})
    classes = tuple(str(name) for name in config["label_names"])
    evaluation = config["evaluation"]
    side = int(evaluation["side"])
    if evaluation["view"] not in EVALUATIONS:
        raise ValueError(f"a view {evaluation['view']!r}")
    if not 0 < side <= MAX_SIDE:
        raise ValueError(f"a side of {side} pixels")
    if not 0 < len(classes) <= MAX_CLASSES or len(set(classes)) != len(classes):
        raise ValueError(f"{len(classes)} classes with {len(set(classes))} names")
    if FORBIDDEN_ARGUMENTS & arguments.keys():
        raise ValueError(f"model_args with {sorted(FORBIDDEN_ARGUMENTS & arguments.keys())[0]}")
    values: Sequence[Sequence[int | str]] = config["training_values"]
    if len(values) != len(classes):
        raise ValueError(f"training_values of {len(values)} classes")
    return SegmentationSettings(
        architecture=Architecture(str(config["architecture"]), arguments),
        reading=Reading.from_json(config["decoder"]),
        classes=classes,
        preprocessing=DataConfig(
            mean=three(cfg["mean"]), std=three(cfg["std"]), interpolation="bilinear", crop_pct=1.0, image_size=side
        ),
        evaluation=evaluation["view"],
        training_values=tuple(tuple(of_class) for of_class in values),
    )
