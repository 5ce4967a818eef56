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
from torch import Tensor, nn

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
    config = {
        "architecture": classifier.architecture.name,
        "num_classes": len(classes),
        "num_features": int(module.num_features),
        "label_names": list(classes),
        "model_args": dict(classifier.architecture.model_args),
        "pretrained_cfg": pretrained_cfg(module, len(classes), preprocessing),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def pretrained_cfg(module: Any, classes: int, preprocessing: DataConfig) -> dict[str, Any]:
    """What a network of timm says about its pictures: as training saw them, without settings of the source weights.

    Args:
        module: of timm.
        classes: logits; 0 = no classifier.
        preprocessing: of training.
    """
    side = preprocessing.image_size
    source = dict(module.pretrained_cfg)
    kept = {name: source[name] for name in KEPT_FIELDS if source.get(name) is not None}
    # A pooling size of the source's own image side would be wrong for another side; timm reads it as a note only.
    if tuple(source.get("input_size", ())) != (3, side, side):
        kept.pop("pool_size", None)
    return kept | {
        "num_classes": classes,
        "input_size": [3, side, side],
        "interpolation": preprocessing.interpolation,
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": "center",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }


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
    config = read_json(folder, CONFIG)
    facts = read_json(folder, FACTS) if (folder / FACTS).exists() else {}
    check_digests(folder, facts, (CONFIG, WEIGHTS))
    try:
        cfg = config["pretrained_cfg"]
        classes = tuple(str(name) for name in config["label_names"])
        arguments = dict(config.get("model_args") or {})
        preprocessing = DataConfig(
            mean=three(cfg["mean"]),
            std=three(cfg["std"]),
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
    tensors = load_weights(folder.path, WEIGHTS, folder.facts)
    return build_network(folder.path, folder.architecture, len(folder.classes), folder.model_args, tensors)


def load_weights(folder: Path, name: str, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors file.

    Args:
        folder: of an exported model.
        name: of the file.
        facts: of `luthier.json`.

    Raises:
        ModelFolderError: the file is missing or damaged.
    """
    path = folder / name
    if not path.exists() and "model_format" in facts:
        raise ModelFolderError(
            f"Luthier computes with models in the formats timm and onnx, but {folder} holds "
            f"{facts['model_format']}. Export the model as one of them as well."
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelFolderError(
            f"An exported model has its weights in {name}, but {folder} has none that can be read ({error}). "
            "Export the model again."
        ) from error
    return tensors


def build_network(
    folder: Path, architecture: str, classes: int, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A network of timm with a folder's tensors, on the CPU, in eval mode.

    Args:
        folder: for messages.
        architecture: name of timm.
        classes: logits; 0 = no classifier.
        arguments: further ones of `timm.create_model`.
        tensors: all of the network's.

    Raises:
        ModelFolderError: timm has no such architecture, or the tensors are of another network.
    """
    if not timm.is_model(architecture):
        raise ModelFolderError(
            f"{folder} needs timm's architecture {architecture}, which this version of timm "
            f"({timm.__version__}) does not have. Install the version that the model was exported with."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = timm.create_model(architecture, num_classes=classes, **arguments)
        network.load_state_dict(tensors, strict=True)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:240]
        raise ModelFolderError(
            f"The weights of {folder} must fit {architecture}, but they do not ({reason}). Export the model again."
        ) from error
    return network.eval().requires_grad_(False)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        ModelFolderError: there is none.
    """
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


def check_digests(folder: Path, facts: Mapping[str, Any], names: Sequence[str]) -> None:
    """Compare files with the digests of `luthier.json`, those that it has.

    Raises:
        ModelFolderError: a file has changed, or `luthier.json` is of another version.
    """
    if not facts:
        return
    digests = facts.get("sha256")
    if facts.get("format") != FORMAT or not isinstance(digests, dict):
        raise ModelFolderError(
            f"Exported models of format {FORMAT} can be read, but {folder / FACTS} has format "
            f"{facts.get('format')!r}. Use the Luthier that wrote it, or delete that file."
        )
    for name in names:
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


def three(values: Sequence[float]) -> tuple[float, float, float]:
    """Exactly three numbers."""
    first, second, third = (float(value) for value in values)
    return first, second, third
