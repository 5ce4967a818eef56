"""Data request of a study, and the scan of its source."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.errors import did_you_mean
from orchestrator.ingest.digits import scan_digits
from orchestrator.ingest.errors import DataError, existing, printable
from orchestrator.ingest.folder import scan_folder
from orchestrator.ingest.images import INTERPOLATIONS
from orchestrator.ingest.label_map import MASK_SOURCES, MaskRequest
from orchestrator.ingest.manifest_source import scan_manifest
from orchestrator.ingest.mask_folders import masks_of_folder, scan_mask_folder
from orchestrator.ingest.npz import scan_npz
from orchestrator.ingest.parquet import scan_parquet
from orchestrator.ingest.scenes import scan_scenes
from orchestrator.ingest.source import Source

SOURCES = ("folder", "parquet", "manifest", "npz", "digits", "digits_scenes")
BUILT_IN_SOURCES = ("digits", "digits_scenes")


@dataclass(frozen=True)
class IngestRequest:
    """Source, domains, splits and image size of a data store."""

    source: str
    """One of `SOURCES`."""
    root: str | None = None
    """Folder or file; None for those that are built in."""
    id: tuple[str, ...] = ()
    """ID domains; empty = all that are not OOD."""
    ood: tuple[str, ...] = ()
    """Domains that are only evaluated; empty = those that the source marks itself (`root/ood/…`, shifted digits)."""
    image_size: int = 224
    """Side of the stored squares, in pixels."""
    crop_size: int | None = None
    """Side of the crop that evaluations take from the centre of a stored square, where rounding makes it matter (see
    `orchestrator.ingest.images.square`)."""
    interpolation: str = "bicubic"
    """One of `orchestrator.ingest.images.INTERPOLATIONS`."""
    val_fraction: float = 0.15
    test_fraction: float = 0.15
    seed: int = 0
    """Of splits and order."""
    on_bad: Literal["quarantine", "fail"] = "quarantine"
    """Unreadable images: leave them out and list them, or refuse the source."""
    on_leak: Literal["report", "fail"] = "report"
    """The same image in training and in what is measured: report it, or refuse the source."""
    label: str | None = None
    """Column with the classes of a Parquet source; None = the first with a usual name."""
    copies: Literal["near", "equal", "apart"] = "near"
    """Which images a drawn split does not divide: equal and nearly equal ones, equal ones, or none."""
    masks: MaskRequest | None = None
    """How the masks of pictures are read; None = images with a label each."""

    def __post_init__(self) -> None:
        _check_option("source", self.source, SOURCES)
        _check_option("interpolation", self.interpolation, tuple(INTERPOLATIONS))
        _check_option("on_bad", self.on_bad, ("quarantine", "fail"))
        _check_option("on_leak", self.on_leak, ("report", "fail"))
        _check_option("copies", self.copies, ("near", "equal", "apart"))
        if self.label is not None and self.source not in ("parquet", "manifest"):
            raise DataError(
                f"Only Parquet files and manifests have a label column to choose, but label is {self.label!r} and the "
                f"source is {self.source!r}. Leave label out."
            )
        if self.masks is not None and self.source not in MASK_SOURCES:
            raise DataError(
                f"Pictures with masks come from {' or '.join(MASK_SOURCES)}, but the source is {self.source!r}."
            )
        if self.masks is not None and self.masks.column is not None and self.source not in ("parquet", "manifest"):
            raise DataError(
                f"Only tables have a mask column to choose, but it is {self.masks.column!r} and the source is "
                f"{self.source!r}. Leave it out."
            )
        if self.image_size < 1:
            raise DataError(f"image_size must be at least 1 pixel, but got {self.image_size}.")


def _check_option(name: str, value: str, options: Collection[str]) -> None:
    if value not in options:
        hint = did_you_mean(value, options)
        raise DataError(f"{name} must be one of {', '.join(options)}, but got {value!r}.{hint}")


def scan(request: IngestRequest) -> Source:
    """List the samples of a source; no image is opened.

    Raises:
        DataError: nothing there, no permission, or a content that this kind of source cannot interpret.
    """
    if request.source == "digits":
        return scan_digits(request.val_fraction, request.test_fraction, request.seed)
    if request.source == "digits_scenes":
        return scan_scenes(request.seed)
    if request.root is None:
        raise DataError(f"The source {request.source!r} needs data.root, the path of the images, but got none.")
    root = existing(Path(request.root).expanduser())
    if request.source == "folder":
        if not root.is_dir():
            raise DataError(
                f"The source 'folder' needs a folder, but {root} is a file. Set data.source to what it is: parquet or "
                "npz."
            )
        if request.masks is not None:
            return scan_mask_folder(root)
        _refuse_masks(root)
        return scan_folder(root)
    if request.source == "parquet":
        return scan_parquet(root, request.label, request.masks)
    if request.source == "manifest":
        return scan_manifest(root, request.label, request.masks)
    return scan_npz(root)


def _refuse_masks(root: Path) -> None:
    """Raise DataError where a folder of a classification study holds pictures with masks."""
    layout = masks_of_folder(root)
    if layout is not None:
        raise DataError(
            f"Images of a classification lie in folders named after their classes, but {printable(str(root))} holds "
            f"pictures with masks ({layout}). Set task: segmentation in the study file."
        )
