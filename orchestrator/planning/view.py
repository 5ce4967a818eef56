"""How pictures become the network's input: size, crop, interpolation and normalisation of a study.

What a study file leaves open is decided once. A study that was begun keeps what its journal has; one of an earlier
version, whose journal has nothing, keeps the crop of the pretrained configuration and splits drawn image by image.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from orchestrator.ingest.decoding import image_sizes
from orchestrator.ingest.label_map import mask_request
from orchestrator.ingest.pipeline import IngestRequest, survey
from orchestrator.record.records import study_header
from trainables.models.backbone import DataConfig, backbone_data_config
from trainables.specs.trial_spec import ModelSpec, ViewSettings

if TYPE_CHECKING:
    from orchestrator.ingest.assign import Assignment
    from orchestrator.ingest.source import Source
    from orchestrator.study_file.schema import DataSpec, StudySpec

MEASURED_PICTURES = 256
"""ID pictures whose headers tell the usual size, evenly spaced."""

Copies = Literal["near", "equal", "apart"]


@dataclass(frozen=True)
class Choices:
    """What a study file may leave open and an earlier run has decided."""

    copies: Copies
    """See `orchestrator.ingest.request.IngestRequest.copies`."""
    crop_pct: float | None
    """None = that of the pretrained configuration."""


@dataclass(frozen=True)
class View:
    """The view of a study."""

    config: DataConfig
    picture_side: int | None
    """Median shorter side of the pictures, in pixels; None = not measured."""

    def sentence(self) -> str:
        """The view in one sentence.

        Example:
            >>> config = DataConfig((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.875, 64)
            >>> View(config, 64).sentence()
            'View: pictures of 64 px are enlarged to 73 px (bicubic), cropped to 64 px, mean 0.5, std 0.5.'
        """
        config = self.config
        stored = config.stored_size
        cropped = "not cropped" if stored == config.image_size else f"cropped to {config.image_size} px"
        subject = "pictures" if self.picture_side is None else f"pictures of {self.picture_side} px"
        resized = f"{_resized(self.picture_side, stored)} ({config.interpolation})"
        if self.picture_side == stored:
            resized = f"kept at {stored} px"
        return f"View: {subject} are {resized}, {cropped}, mean {_channels(config.mean)}, std {_channels(config.std)}."


def _resized(side: int | None, stored: int) -> str:
    if side is None:
        return f"resized to {stored} px"
    return f"{'enlarged' if side < stored else 'reduced'} to {stored} px"


def _channels(values: Iterable[float]) -> str:
    """Three values, or one where they are equal."""
    texts = [f"{value:g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def recorded_choices(events: Iterable[Mapping[str, Any]]) -> Choices | None:
    """What a begun study has decided; None = it has no trial yet."""
    events = list(events)
    if not any(event["kind"] == "trial_started" for event in events):
        return None
    header = study_header(events)
    view = header.get("view")
    return Choices(
        copies=header.get("copies", "apart"),
        crop_pct=None if view is None else float(view["crop_pct"]),
    )


def source_request(spec: StudySpec) -> IngestRequest:
    """Source, domains and splits of a study; the size of its images is left open.

    Raises:
        DataError: declared values of masks that are none.
    """
    data = spec.data
    masks = mask_request(data.labels, data.ignore, data.mask) if spec.task == "segmentation" else None
    return IngestRequest(
        source=data.source,
        root=data.root,
        id=tuple(data.id),
        ood=tuple(data.ood),
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.seed,
        label=data.label,
        masks=masks,
    )


def view_of(spec: StudySpec, recorded: Choices | None = None) -> View:
    """The view of a study that is planned or about to read its data.

    Args:
        spec: the study.
        recorded: `recorded_choices` of its journal.

    Raises:
        DataError: the source is missing or unusable.
    """
    data = spec.data
    model = ModelSpec(name=spec.model.name, pretrained=spec.model.pretrained, weights=spec.model.weights)
    changes = _changes(data)
    config = backbone_data_config(model, data.image_size, changes)
    if data.crop_pct is not None or (recorded is not None and recorded.crop_pct is None):
        return View(config, _picture_side(*survey(source_request(spec))))
    side = _picture_side(*survey(source_request(spec)))
    if recorded is not None:
        crop_pct = recorded.crop_pct
    else:
        own_side = backbone_data_config(model).image_size
        small = side is not None and side <= max(own_side, config.image_size)
        crop_pct = 1.0 if small else None
    if crop_pct is not None:
        config = backbone_data_config(model, data.image_size, _changes(data, crop_pct))
    return View(config, side)


def view_settings(spec: StudySpec, stored_side: int) -> ViewSettings:
    """The view of a study's trials, whose crop is the one that their data store was made for."""
    data = spec.data
    model = ModelSpec(name=spec.model.name, pretrained=spec.model.pretrained, weights=spec.model.weights)
    settings = _changes(data)
    config = backbone_data_config(model, data.image_size, settings)
    if data.crop_pct is None and config.stored_size != stored_side == config.image_size:
        return _changes(data, 1.0)
    return settings


def _changes(data: DataSpec, crop_pct: float | None = None) -> ViewSettings:
    mean, std = (None if values is None else (values[0], values[1], values[2]) for values in (data.mean, data.std))
    return ViewSettings(
        crop_pct=data.crop_pct if crop_pct is None else crop_pct,
        interpolation=data.interpolation,
        mean=mean,
        std=std,
    )


def _picture_side(source: Source, assignment: Assignment) -> int | None:
    """Median shorter side of the ID pictures, in pixels; None = none can be read."""
    positions = np.sort(np.concatenate([assignment.splits[name] for name in ("train", "val", "test")]))
    chosen = positions[np.unique(np.linspace(0, len(positions) - 1, MEASURED_PICTURES).round().astype(np.int64))]
    if source.survey is not None:
        sides = source.survey.sizes[chosen].min(axis=1).tolist()
    else:
        sides = [min(size) for size in image_sizes(source, chosen.tolist())]
    return statistics.median_low(sides) if sides else None
