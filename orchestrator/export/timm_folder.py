"""Folders in timm's `local-dir` layout: config.json, model.safetensors, README.md, and luthier.json with digests.

`timm.create_model("local-dir:DIR", pretrained=True)` needs the first two and no Luthier. What `config.json` says about
pictures is what training did, in every field that a program of timm reads; test-time settings of the source weights are
left out, because training did not use them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from orchestrator.export.errors import ModelFolderError
from orchestrator.ingest.images import INTERPOLATIONS
from trainables.models.backbone import DataConfig
from trainables.models.timm_classifier import TimmClassifier
from trainables.storage.checkpoint_format import save_tensors
from trainables.storage.file_identity import file_digest

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
FACTS = "luthier.json"
FORMAT = 1
"""Version of `luthier.json`."""

KEPT_FIELDS = ("pool_size", "first_conv", "classifier", "license", "origin_url", "fixed_input_size")
"""Fields of the source weights' configuration that describe the architecture or their origin."""
FORBIDDEN_ARGUMENTS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes"}
)
"""Arguments of `timm.create_model` that would load something else than the folder's own weights."""


@dataclass(frozen=True)
class ModelFolder:
    """What a folder says about its model."""

    path: Path
    architecture: str
    model_args: Mapping[str, Any]
    classes: tuple[str, ...]
    """Names, in the order of the logits."""
    preprocessing: DataConfig
    facts: Mapping[str, Any]
    """`luthier.json`; empty where another program wrote the folder."""


def write_config(folder: Path, classifier: TimmClassifier, classes: Sequence[str], preprocessing: DataConfig) -> None:
    """Write config.json: architecture, class names, and preprocessing as training did it."""
    module: Any = classifier.module
    side = preprocessing.image_size
    source = dict(module.pretrained_cfg)
    pretrained_cfg = {name: source[name] for name in KEPT_FIELDS if source.get(name) is not None}
    # A pooling size of the source's own image side would be wrong for another side; timm reads it as a note only.
    if tuple(source.get("input_size", ())) != (3, side, side):
        pretrained_cfg.pop("pool_size", None)
    pretrained_cfg |= {
        "num_classes": len(classes),
        "input_size": [3, side, side],
        "interpolation": preprocessing.interpolation,
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": "center",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }
    config = {
        "architecture": classifier.architecture.name,
        "num_classes": len(classes),
        "num_features": int(module.num_features),
        "label_names": list(classes),
        "model_args": dict(classifier.architecture.model_args),
        "pretrained_cfg": pretrained_cfg,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_weights(folder: Path, module: nn.Module) -> None:
    """Write model.safetensors under timm's own names."""
    save_tensors(module.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})


def write_facts(folder: Path, facts: Mapping[str, Any], files: Sequence[str]) -> None:
    """Write luthier.json: facts about the model, and the SHA-256 of the folder's files."""
    digests = {name: file_digest(folder / name) for name in files}
    content = {"format": FORMAT, "sha256": digests, **facts}
    (folder / FACTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_folder(path: str | Path) -> ModelFolder:
    """What a folder says about its model; digests are compared where the folder has them.

    Raises:
        ModelFolderError: no exported model, one without class names, or a damaged one.
    """
    folder = Path(path)
    config = _read_json(folder, CONFIG)
    facts = _read_json(folder, FACTS) if (folder / FACTS).exists() else {}
    _check_digests(folder, facts)
    try:
        cfg = config["pretrained_cfg"]
        classes = tuple(str(name) for name in config["label_names"])
        arguments = dict(config.get("model_args") or {})
        preprocessing = DataConfig(
            mean=_three(cfg["mean"]),
            std=_three(cfg["std"]),
            interpolation=str(cfg["interpolation"]),
            crop_pct=float(cfg["crop_pct"]),
            image_size=int(cfg["input_size"][1]),
        )
        side = tuple(cfg["input_size"])
        architecture = str(config["architecture"])
        count = int(config["num_classes"])
        mode = cfg.get("crop_mode", "center")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ModelFolderError(
            f"An exported model has architecture, label_names and pretrained_cfg in {CONFIG}, but that "
            f"of {folder} lacks or garbles {error}. Export the model again."
        ) from error
    _check_values(folder, classes, count, side, mode, preprocessing, arguments)
    return ModelFolder(folder, architecture, arguments, classes, preprocessing, facts)


def load_network(folder: ModelFolder) -> nn.Module:
    """The network of a folder on the CPU, in eval mode; nothing but its safetensors file is read.

    Raises:
        ModelFolderError: timm has no such architecture, or the weights are missing, damaged or of another network.
    """
    path = folder.path / WEIGHTS
    if not path.exists() and "model_format" in folder.facts:
        raise ModelFolderError(
            f"Luthier computes with models in the formats timm and onnx, but {folder.path} holds "
            f"{folder.facts['model_format']}. Export the model as one of them as well."
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelFolderError(
            f"An exported model has its weights in {WEIGHTS}, but {folder.path} has none that can be read ({error}). "
            "Export the model again."
        ) from error
    if not timm.is_model(folder.architecture):
        raise ModelFolderError(
            f"{folder.path} needs timm's architecture {folder.architecture}, which this version of timm "
            f"({timm.__version__}) does not have. Install the version that the model was exported with."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = timm.create_model(
                folder.architecture, num_classes=len(folder.classes), **folder.model_args
            )
        network.load_state_dict(tensors, strict=True)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:240]
        raise ModelFolderError(
            f"The weights of {folder.path} must fit {folder.architecture}, but they do not ({reason}). Export the "
            "model again."
        ) from error
    return network.eval().requires_grad_(False)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(
            f"An exported model is a folder with {CONFIG} and {WEIGHTS} (`luthier export STUDY --to DIR`), but the "
            f"{name} of {folder} cannot be read ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{folder / name} must hold a JSON object, but it holds {type(content).__name__}.")
    return content


def _check_digests(folder: Path, facts: Mapping[str, Any]) -> None:
    if not facts:
        return
    digests = facts.get("sha256")
    if facts.get("format") != FORMAT or not isinstance(digests, dict):
        raise ModelFolderError(
            f"Exported models of format {FORMAT} can be read, but {folder / FACTS} has format "
            f"{facts.get('format')!r}. Use the Luthier that wrote it, or delete that file."
        )
    for name in (CONFIG, WEIGHTS):
        if name not in digests:
            continue
        try:
            actual = file_digest(folder / name)
        except OSError as error:
            raise ModelFolderError(f"{folder} must hold {name}, but it cannot be read: {error.strerror}.") from error
        if actual != digests[name]:
            raise ModelFolderError(
                f"{folder / name} must have the SHA-256 {str(digests[name])[:12]}…, but it has {actual[:12]}…: the "
                f"file has changed since the export. Export the model again, or delete {FACTS} if the change is yours."
            )


def _check_values(
    folder: Path,
    classes: Sequence[str],
    count: int,
    side: Sequence[Any],
    mode: str,
    preprocessing: DataConfig,
    arguments: Mapping[str, Any],
) -> None:
    problem = ""
    if len(classes) != count or len(set(classes)) != count:
        problem = f"{count} logits have {len(classes)} names, {len(set(classes))} of them different"
    elif len(side) != 3 or side[0] != 3 or side[1] != side[2]:
        problem = f"input_size is {list(side)}, not [3, side, side]"
    elif mode != "center":
        problem = f"crop_mode is {mode!r}, not 'center'"
    elif preprocessing.interpolation not in INTERPOLATIONS:
        problem = f"interpolation is {preprocessing.interpolation!r}, not one of {', '.join(INTERPOLATIONS)}"
    elif not 0 < preprocessing.crop_pct <= 1 or not 0 < preprocessing.image_size <= 8192:
        problem = f"crop_pct is {preprocessing.crop_pct} and the side {preprocessing.image_size}"
    elif FORBIDDEN_ARGUMENTS & arguments.keys():
        problem = f"model_args has {sorted(FORBIDDEN_ARGUMENTS & arguments.keys())[0]}"
    if problem:
        raise ModelFolderError(
            f"{folder / CONFIG} must describe a classifier of square pictures with a name for each logit, but "
            f"{problem}. `luthier export` writes such folders."
        )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third
