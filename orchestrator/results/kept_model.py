"""The model of a trial, restored from the weights that its study keeps."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from orchestrator.export.model import Model
from orchestrator.export.segmentation_model import SegmentationModel
from orchestrator.record.kept_paths import weights_folder
from orchestrator.record.records import TrialRecord
from trainables.data.masked_pictures import Evaluation, evaluation_of
from trainables.engine.tuned_network import tuned_network
from trainables.models.backbone import DataConfig
from trainables.specs.metrics import SEGMENTATION
from trainables.storage.kept_weights import KeptWeights, WeightsError, load_weights


def kept_model(study: Path, record: TrialRecord, device: torch.device | str | None = None) -> Model | SegmentationModel:
    """The network that a trial tested, with its class names and its preprocessing.

    Args:
        study: folder of the study.
        record: of the trial.
        device: where the network computes; None = the GPU if there is one, else the CPU.

    Raises:
        WeightsError: no weights are kept, or they are damaged or not those of the record.
        ValueError: the pretrained network cannot be loaded.
    """
    kept = read_kept(study, record)
    if kept.meta.get("task") == SEGMENTATION.task:
        return SegmentationModel(
            tuned_network(kept), list(kept.meta["classes"]), preprocessing_of(kept), views_of(kept), device=device
        )
    return Model(tuned_network(kept), list(kept.meta["classes"]), preprocessing_of(kept), device)


def read_kept(study_folder: Path, record: TrialRecord) -> KeptWeights:
    """The kept weights of a trial.

    Raises:
        WeightsError: none are kept, or they are damaged or not those of the record.
    """
    folder = weights_folder(study_folder, record.number)
    if not folder.is_dir():
        raise WeightsError(
            f"A trial's model is restored from its kept weights, but trial {record.number} ({record.label}, "
            f"{record.role}) has none in {folder}. `keep: all` keeps those of every trial; the default keeps each "
            "entry's best search trial and every confirmed trial."
        )
    kept = load_weights(folder)
    if kept.meta["config_hash"] != record.config_hash or kept.meta["seed"] != record.seed:
        raise WeightsError(f"{folder} must hold the weights of trial {record.number}, but holds those of another one.")
    return kept


def preprocessing_of(kept: KeptWeights) -> DataConfig:
    """Preprocessing of a trial.

    The crop share is that of its data store, whatever the network's own is. Segmentation sees whole pictures, and
    always scales them bilinearly.
    """
    meta = kept.meta
    side = int(meta["image_size"])
    stored = int(meta["stored_image_size"])
    crop_pct = float(meta["crop_pct"])
    interpolation = str(meta["interpolation"])
    # Weights of classification from before there were tasks do not name theirs.
    if meta.get("task") == SEGMENTATION.task:
        crop_pct = 1.0
        interpolation = "bilinear"
    elif math.floor(side / crop_pct) != stored:
        crop_pct = side / stored
        # A quotient that was rounded up would give one pixel less.
        while math.floor(side / crop_pct) < stored:
            crop_pct = math.nextafter(crop_pct, 0.0)
    mean, std = (tuple(float(value) for value in meta[name]) for name in ("mean", "std"))
    return DataConfig(
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation=interpolation,
        crop_pct=crop_pct,
        image_size=side,
    )


def views_of(kept: KeptWeights) -> Evaluation:
    """Views of a picture in the evaluation of a segmentation trial."""
    return evaluation_of(kept.meta["augment"], kept.meta["evaluation"])
