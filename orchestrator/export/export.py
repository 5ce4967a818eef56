"""Export of one tuned network into a folder: written aside, read back, compared, and only then renamed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestrator.export.card import CardFacts, render_card, square_lines
from orchestrator.export.errors import RefusedExportError
from orchestrator.export.formats import FORMATS, AdapterMaterial, Material
from orchestrator.export.proof import Proof, prove
from orchestrator.export.timm_folder import CARD, write_facts
from trainables.data.transforms import BatchTransform
from trainables.models.backbone import DataConfig
from trainables.models.low_rank import LowRankUpdate
from trainables.models.task_model import TaskModel
from trainables.models.timm_classifier import TimmClassifier, timm_classifier
from trainables.specs.suggestions import did_you_mean
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.atomic_files import atomic_folder


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """A tuned network with all that a folder says about it."""

    network: TaskModel
    """On the CPU; adapters merged."""
    spec: ModelSpec
    """Network that it was built from."""
    preprocessing: DataConfig
    """As in training."""
    classes: Sequence[str]
    """Names, in the order of the logits."""
    facts: CardFacts
    pictures: NDArray[np.uint8]
    """Stored pixels (n, H, H, 3) of the test split, for the comparison."""
    update: LowRankUpdate | None = None
    """Low-rank update that was merged into the network; None = none, or none that gives its weights."""
    pretrained: nn.Module | None = None
    """The pretrained network without classifier, where there is an update."""
    proof: Sequence[str] = ()
    """Sentences on comparisons of the network itself with the record."""


@dataclass(frozen=True)
class Exported:
    """An exported folder."""

    folder: Path
    format: str
    proof: Proof


def check_target(folder: Path, format_name: str) -> None:
    """Refuse an unknown format or a folder that is in use, before anything is computed.

    Raises:
        RefusedExportError: no such format.
        FileExistsError: the folder exists and is not empty.
        FileNotFoundError: the folder that it would lie in does not exist.
    """
    if format_name not in FORMATS:
        hint = did_you_mean(format_name, FORMATS)
        raise RefusedExportError(f"A format is one of {', '.join(FORMATS)}, but got {format_name!r}.{hint}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"A model is exported to a new or empty folder, but {folder} exists. Choose another.")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"A model is exported into an existing folder, but {folder.absolute().parent} does not exist. Create it."
        )


def export_model(tuned: TunedModel, folder: Path, format_name: str = "timm") -> Exported:
    """Write a tuned network as a folder of the format; it appears whole and compared, or not at all.

    Raises:
        RefusedExportError, FileExistsError, FileNotFoundError: see `check_target`.
        ValueError: the network is no classifier that timm could build.
        ExportError: the format cannot hold the network, or its logits differ.
        OSError: the disk refused a write.
    """
    check_target(folder, format_name)
    target_format = FORMATS[format_name]
    preprocessing = tuned.preprocessing
    network: nn.Module = tuned.network.cpu().eval()
    classifier = timm_classifier(tuned.network, tuned.spec, preprocessing.image_size)
    adapter = None
    if tuned.update is not None and tuned.pretrained is not None:
        adapter = AdapterMaterial(tuned.update, _base(tuned, tuned.pretrained))
    transform = BatchTransform(preprocessing.mean, preprocessing.std, preprocessing.image_size, ())
    with atomic_folder(folder.absolute()) as partial:
        written = target_format.write(partial, Material(classifier, tuned.classes, preprocessing, adapter))
        with torch.no_grad():
            proof = prove(written.run, network, transform, tuned.pictures, target_format.tolerance)
        card = render_card(
            tuned.facts,
            tuned.classes,
            square_lines(preprocessing),
            written.usage.replace("DIR", folder.name),
            [*tuned.proof, proof.sentence()],
        )
        (partial / CARD).write_text(card, encoding="utf-8")
        write_facts(partial, {**_facts(tuned, format_name, proof), **written.facts}, written.files)
    return Exported(folder, format_name, proof)


def _base(tuned: TunedModel, pretrained: nn.Module) -> TimmClassifier:
    """The pretrained network under a classifier of zeros."""
    head = copy.deepcopy(tuned.network.head)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    return timm_classifier(TaskModel(pretrained, head), tuned.spec, tuned.preprocessing.image_size)


def _facts(tuned: TunedModel, format_name: str, proof: Proof) -> dict[str, Any]:
    return {
        "model_format": format_name,
        "classes": list(tuned.classes),
        "card": card_values(tuned.facts),
        "proof": dataclasses.asdict(proof),
    }


def card_values(facts: CardFacts) -> dict[str, Any]:
    """Facts of a card as JSON values."""
    values = {**dataclasses.asdict(facts), "hparams": dict(facts.hparams)}
    if facts.taken_over is None:
        del values["taken_over"]
    return values
