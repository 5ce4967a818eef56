"""Predicted masks as files: an index PNG per picture, the classes beside them, and overlays on request."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orchestrator.export.pictures import Listing, Picture, Progress, decoded_whole
from orchestrator.export.predictions import describe
from orchestrator.ingest.errors import DataError
from orchestrator.ingest.source import SkippedEntry
from orchestrator.wording import counted
from trainables.storage.atomic_files import atomic_folder

if TYPE_CHECKING:
    from orchestrator.export.segmentation_model import SegmentationModel
    from trainables.data.store import Store

LABELS = "labels.json"
"""Names and values of the classes, beside the masks."""
OVERLAYS = "overlays"
OPACITY = 0.5
"""Of a class's colour on an overlay."""


@dataclass
class PredictedMasks:
    """What was written, and the pictures that have no mask."""

    names: list[str] = field(default_factory=list)
    """Of the pictures with a mask."""
    pixels: Counter[int] = field(default_factory=Counter)
    """Predicted pixels by class index."""
    unreadable: list[SkippedEntry] = field(default_factory=list)
    ignored: list[SkippedEntry] = field(default_factory=list)


def mask_names(listing: Listing) -> dict[str, str]:
    """Name of a picture → path of its mask below the output folder.

    The name itself, ending in `.png`; where a name is absolute or leads upwards, the paths below the deepest folder
    that all pictures share. Where two pictures differ by their ending alone, it is kept: `1.jpg.png`.
    """
    pictures = listing.pictures
    relative = {picture.name: picture.name for picture in pictures}
    if any(_leaves_folder(picture) for picture in pictures):
        shared = os.path.commonpath([os.path.dirname(picture.location) for picture in pictures])
        relative = {picture.name: os.path.relpath(picture.location, shared) for picture in pictures}
    return _with_ending(relative)


def predict_masks(
    model: SegmentationModel,
    listing: Listing,
    folder: Path,
    *,
    overlay: bool,
    batch_size: int,
    progress: Progress | None = None,
) -> PredictedMasks:
    """Write the masks of pictures; the folder appears whole, or not at all.

    Args:
        model: exported.
        listing: the pictures.
        folder: to write; new or empty.
        overlay: also write pictures under the colours of their classes.
        batch_size: views per forward pass.
        progress: called after every chunk of decoded pictures.

    Raises:
        DataError: no picture can be read.
        OSError: the disk refused a write.
    """
    files = mask_names(listing)
    result = PredictedMasks(ignored=listing.ignored)
    with atomic_folder(folder.absolute()) as partial:
        writer = _Writer(model, partial, overlay, result)
        for chunk in decoded_whole(listing.pictures, progress):
            writer.write(chunk.names, [files[name] for name in chunk.names], chunk.pixels, batch_size)
            result.unreadable += chunk.unreadable
        if not result.names:
            raise DataError(
                f"At least one picture must be readable, but none of {len(listing.pictures)} is: "
                f"{describe(result.unreadable)}."
            )
        write_labels(partial, model)
    return result


def predict_store_masks(
    model: SegmentationModel, store: Store, split: str, folder: Path, *, overlay: bool, batch_size: int
) -> PredictedMasks:
    """Write the masks of one split of a data store, see `predict_masks`.

    Raises:
        ValueError: no such split.
        DataError: the store has no pictures of their own size.
        OSError: the disk refused a write.
    """
    if store.targets != "masks":
        raise DataError(
            f"A segmentation model predicts whole pictures, but the data store {store.path} holds squares for "
            "classification. Predict the pictures themselves."
        )
    names = store.names(split)
    files = _with_ending({name: name for name in names})
    result = PredictedMasks()
    with atomic_folder(folder.absolute()) as partial:
        writer = _Writer(model, partial, overlay, result)
        writer.write(names, [files[name] for name in names], store.pictures(split), batch_size)
        write_labels(partial, model)
    return result


def write_labels(folder: Path, model: SegmentationModel) -> None:
    """Write labels.json: what the values of the masks are."""
    values: Sequence[Sequence[int | str] | None] = model.training_values or [None] * len(model.classes)
    classes = [
        {"value": index, "name": name, "training_values": None if raw is None else list(raw)}
        for index, (name, raw) in enumerate(zip(model.classes, values, strict=True))
    ]
    content = {"values": meaning_of_values(model), "classes": classes}
    (folder / LABELS).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def meaning_of_values(model: SegmentationModel) -> str:
    """What the values of predicted masks are, in a sentence."""
    count = len(model.classes)
    sentence = f"Masks hold indices of the model's {counted(count, 'class', 'classes')} from 0 (train ids)"
    values = model.training_values
    if values is None:
        return f"{sentence}."
    if all(list(of_class) == [index] for index, of_class in enumerate(values)):
        return f"{sentence}, which are the values of the training masks as well."
    return f"{sentence}, not the values of the training masks (label ids, colours)."


class _Writer:
    """Masks and overlays of pictures, below one folder."""

    def __init__(self, model: SegmentationModel, folder: Path, overlay: bool, result: PredictedMasks) -> None:
        self._model = model
        self._folder = folder
        self._overlay = overlay
        self._result = result

    def write(
        self, names: Sequence[str], files: Sequence[str], pictures: Sequence[NDArray[np.uint8]], batch_size: int
    ) -> None:
        masks = self._model.masks(pictures, batch_size)
        for name, file, picture, mask in zip(names, files, pictures, masks, strict=True):
            _save(Image.fromarray(mask), self._folder / file)
            if self._overlay:
                # Another ending than a mask's: a folder of pictures may be called as that of the overlays.
                path = self._folder / OVERLAYS / f"{file.removesuffix('.png')}.jpg"
                _save(Image.fromarray(overlaid(picture, mask)), path, quality=90)
            self._result.names.append(name)
            self._result.pixels.update(dict(enumerate(np.bincount(mask.ravel()).tolist())))


def overlaid(picture: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) under the colours of its classes; class 0 is left as it is."""
    blended = picture * (1 - OPACITY) + class_colours()[mask] * OPACITY
    return np.where(mask[..., None] == 0, picture, blended.round()).astype(np.uint8)


def class_colours() -> NDArray[np.uint8]:
    """Colours (256, 3) of class indices: the palette of PASCAL VOC (Everingham et al., 2010)."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    shift = 7 - np.arange(8) // 3
    channels = [(bits[:, channel::3] << shift[channel::3]).sum(axis=1) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8)


def _leaves_folder(picture: Picture) -> bool:
    """Whether a picture's name would lead out of the output folder."""
    path = PurePosixPath(picture.name)
    return path.is_absolute() or ".." in path.parts


def _with_ending(paths: dict[str, str]) -> dict[str, str]:
    """Paths of masks: unique, also where file systems ignore case."""
    stems = {name: str(PurePosixPath(path).with_suffix("")) for name, path in paths.items()}
    count = Counter(stem.casefold() for stem in stems.values())
    return {name: f"{stem if count[stem.casefold()] == 1 else paths[name]}.png" for name, stem in stems.items()}


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def to_values(result: PredictedMasks, classes: Sequence[str]) -> dict[str, Any]:
    """Counts as JSON values."""
    return {
        "predicted": len(result.names),
        "pixels": {name: result.pixels[index] for index, name in enumerate(classes)},
        "unreadable": [entry._asdict() for entry in result.unreadable],
        "ignored": [entry._asdict() for entry in result.ignored],
    }
