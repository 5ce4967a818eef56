"""Locations of kept weights and predictions in a study's folder. Imports no torch: the tracking process reads it."""

from __future__ import annotations

from pathlib import Path


def weights_folder(study: Path, number: int) -> Path:
    """Folder of the weights of the trial with this number."""
    return study / "weights" / f"trial-{number:04d}"


def predictions_file(study: Path, number: int) -> Path:
    """File of the predictions of the trial with this number."""
    return study / "predictions" / f"trial-{number:04d}.arrow"


def similarities_file(study: Path, number: int) -> Path:
    """File of the trial's features compared with the pretrained network's; see `orchestrator.report.features`."""
    return study / "predictions" / f"trial-{number:04d}.features.safetensors"
