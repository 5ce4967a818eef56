"""The built-in source of pictures with masks: digits on photographs, written as a folder once per machine."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path

from PIL import Image

from orchestrator.ingest.folder import FolderSource
from orchestrator.ingest.label_map import LabelMap
from orchestrator.ingest.mask_folders import scan_mask_folder
from trainables.demo import digits
from trainables.demo import scenes as drawing
from trainables.specs.short_hash import short_hash
from trainables.storage.atomic_files import atomic_folder
from trainables.storage.compute_once import cache_root, compute_once

KIND = "digits_scenes"
ID_DOMAIN = "handwritten"
OOD_DOMAINS = (*drawing.SHIFTED, "printed")


def scan_scenes(seed: int) -> FolderSource:
    """Scenes of handwritten digits (ID), and of shifted and printed ones (OOD).

    Args:
        seed: of the scenes and of their splits.
    """
    folder = scenes_folder(seed)
    return dataclasses.replace(
        scan_mask_folder(folder),
        kind=KIND,
        layout="built-in digits on photographs",
        # Of the code, not of the files, whose times differ from machine to machine.
        digest=f"{_recipe_digest()}-{seed}",
        label_map=LabelMap(
            drawing.CLASSES, {value: value for value in range(len(drawing.CLASSES))}, origin="the built-in scenes"
        ),
        declared_labels=True,
    )


def scenes_folder(seed: int) -> Path:
    """The folder of the scenes of a seed in the cache, drawn at first use."""
    folder = cache_root() / "scenes" / f"{_recipe_digest()}-{seed}"
    return compute_once(folder, lambda path: path if path.is_dir() else None, lambda: _write(folder, seed))


def _recipe_digest() -> str:
    """Hash of the code that draws the scenes."""
    return short_hash([inspect.getsource(module) for module in (drawing, digits, sys.modules[__name__])])


def _write(folder: Path, seed: int) -> Path:
    with atomic_folder(folder) as partial:
        for name, scenes in drawing.scenes(seed).items():
            place = partial / "ood" / name if name in OOD_DOMAINS else partial / ID_DOMAIN / name
            for kind in ("images", "masks"):
                (place / kind).mkdir(parents=True)
            for number, scene in enumerate(scenes):
                Image.fromarray(scene.picture).save(place / "images" / f"{number:03d}.png")
                Image.fromarray(scene.mask).save(place / "masks" / f"{number:03d}.png")
    return folder
