"""Export of one tuned segmentation network into a folder: written aside, read back, compared, and only then renamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from orchestrator.export.card import CardFacts, render_card, view_lines
from orchestrator.export.export import Exported, card_values, check_target
from orchestrator.export.proof import Proof, prove_dense
from orchestrator.export.segmentation_folder import SegmentationSettings
from orchestrator.export.segmentation_formats import (
    SEGMENTATION_FORMATS,
    SegmentationMaterial,
    check_segmentation_format,
    other_sizes,
)
from orchestrator.export.timm_folder import CARD, write_facts
from trainables.data.masked_pictures import Evaluation
from trainables.models.backbone import DataConfig
from trainables.models.timm_classifier import timm_encoder
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.atomic_files import atomic_folder
from trainables.tasks.segmentation import DenseModel, Reading


@dataclass(frozen=True, kw_only=True)
class TunedSegmenter:
    """A tuned segmentation network with all that a folder says about it."""

    network: DenseModel
    """Adapters merged."""
    spec: ModelSpec
    """Network that its encoder was built from."""
    reading: Reading
    preprocessing: DataConfig
    evaluation: Evaluation
    """Views of a picture, as in the trial's evaluation."""
    classes: Sequence[str]
    """Names, in the order of the logits."""
    training_values: Sequence[Sequence[int | str]]
    """See `SegmentationSettings.training_values`."""
    facts: CardFacts
    pictures: int
    """Of the test split."""
    views: Callable[[], Iterator[Tensor]]
    """Batches of their views, for the comparison; called once."""
    proof: Sequence[str] = ()
    """Sentences on comparisons of the network itself with the record."""


def export_segmenter(tuned: TunedSegmenter, folder: Path, format_name: str = "timm") -> Exported:
    """Write a tuned network as a folder of the format; it appears whole and compared, or not at all.

    Raises:
        RefusedExportError: segmentation has no such format.
        FileExistsError, FileNotFoundError: see `check_target`.
        ValueError: the encoder is none that timm could build.
        ExportError: the format cannot hold the network, or its logits differ.
        OSError: the disk refused a write.
    """
    check_target(folder, format_name)
    check_segmentation_format(format_name)
    target_format = SEGMENTATION_FORMATS[format_name]
    preprocessing = tuned.preprocessing
    network = tuned.network.cpu().eval()
    encoder, architecture = timm_encoder(network.backbone, tuned.spec, preprocessing.image_size)
    settings = SegmentationSettings(
        architecture,
        tuned.reading,
        tuple(tuned.classes),
        preprocessing,
        tuned.evaluation,
        tuple(tuple(values) for values in tuned.training_values),
    )
    with atomic_folder(folder.absolute()) as partial:
        written = target_format.write(partial, SegmentationMaterial(network, encoder, settings))
        any_size = bool(written.facts["any_size"])
        sizes = other_sizes(preprocessing.image_size) if any_size else []
        proof = prove_dense(written.run, network, tuned.views(), tuned.pictures, sizes, target_format.tolerance)
        card = render_card(
            tuned.facts,
            tuned.classes,
            view_lines(preprocessing, tuned.evaluation, any_size),
            written.usage.replace("DIR", folder.name),
            [*tuned.proof, proof.sentence()],
            pipeline="image-segmentation",
        )
        (partial / CARD).write_text(card, encoding="utf-8")
        write_facts(partial, {**_facts(tuned, format_name, proof), **written.facts}, written.files)
    return Exported(folder, format_name, proof)


def _facts(tuned: TunedSegmenter, format_name: str, proof: Proof) -> dict[str, Any]:
    return {
        "model_format": format_name,
        "task": "segmentation",
        "classes": list(tuned.classes),
        "card": card_values(tuned.facts),
        "proof": dataclasses.asdict(proof),
    }
