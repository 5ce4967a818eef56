"""Specification of one trial: plain frozen data, checked here, sent as a dict."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainables.specs.corruptions import CorruptionSettings

DIAGNOSTICS = ("shift", "distortion", "cka", "plasticity", "gradients")
"""Names of what a trial can measure beside its scores: shift of the norm layers' γ and β, distortion of features and
change of parameters, CKA per block, plasticity after tuning, gradient norms per kind of layer."""

DECODERS = ("deeplabv3plus", "unet", "fpn", "linear")
"""Heads of segmentation, see `trainables.tasks.decoders`."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which pretrained network to start from."""

    name: str
    """A timm name (`resnet18`, `vit_base_patch16_224.augreg_in21k`), `hf-hub:…`, `local-dir:…`, or one of the
    built-in demo networks (`digits_vit`, `digits_cnn`)."""
    pretrained: bool = True
    """False = random weights (an explicit wish; never a fallback for weights that could not be loaded)."""
    weights: str | None = None
    """Local weight file (`.safetensors`, or `.pth`/`.bin` read with `weights_only=True`), or a folder in timm's
    `local-dir` layout. None = timm's own weights of that name."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Changes of a task's loss, for all trials of one study.

    The default is the loss as it is.
    """

    class_weights: Literal["balanced"] | None = None
    """balanced = the loss of a sample times N / (C · n_c), for n_c of the N training samples in its class, one of C; in
    closed-form solutions as sample weights."""
    label_smoothing: float | None = None
    """Share of the target that is spread over all classes, in training."""
    focal_gamma: float | None = None
    """γ of the focal loss, −(1 − p)^γ · log p for the probability p of the label (Lin et al., 2017)."""
    dice: float | None = None
    """Weight of a soft Dice term beside the cross-entropy (Milletari et al., 2016)."""

    def __post_init__(self) -> None:
        if self.class_weights not in (None, "balanced"):
            raise ValueError(f"class_weights must be 'balanced' or nothing, but got {self.class_weights!r}.")
        if self.label_smoothing is not None and not 0 < self.label_smoothing < 1:
            raise ValueError(f"0 < label_smoothing < 1 must hold, but got {self.label_smoothing!r}.")
        if self.focal_gamma is not None and not 0 < self.focal_gamma < float("inf"):
            raise ValueError(f"focal_gamma must be a positive number, but got {self.focal_gamma!r}.")
        if self.dice is not None and not 0 < self.dice < float("inf"):
            raise ValueError(f"dice must be a positive number, but got {self.dice!r}.")
        if self.focal_gamma is not None and self.label_smoothing is not None:
            raise ValueError(
                "The focal loss is defined for one right class, but label_smoothing spreads the target over all of "
                f"them, and got focal_gamma {self.focal_gamma!r} and label_smoothing {self.label_smoothing!r}. Leave "
                "one of the two out."
            )


PLAIN_LOSS = LossSettings()
"""The loss of a task as it is."""


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """Changes of how a network sees pictures; None = as its pretrained configuration says."""

    crop_pct: float | None = None
    """Side of the evaluation crop as a share of the resized picture's shorter side, in (0, 1]."""
    interpolation: str | None = None
    """Of the resizing, by timm's name."""
    mean: tuple[float, float, float] | None = None
    """Per channel, of pixel values in 0…1."""
    std: tuple[float, float, float] | None = None
    """Per channel, of pixel values in 0…1."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ViewSettings:
        """Inverse of `dataclasses.asdict`; lists become tuples again."""
        values: dict[str, Any] = dict(fields)
        for name in ("mean", "std"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is changed."""
        return self == PLAIN_VIEW


PLAIN_VIEW = ViewSettings()
"""The view of a network's pretrained configuration."""


@dataclass(frozen=True, kw_only=True)
class SharedTrialSettings:
    """Settings that all trials of one study share."""

    store: str
    """Path of the Arrow store (see `trainables.data.store.Store`)."""
    model: ModelSpec
    image_size: int | None = None
    """Side of the images that the network sees, in pixels; None = its own, or the store's where that is smaller."""
    epochs: int = 20
    """Budget of one trial, in units (calls of `Trainable.step`)."""
    steps_per_unit: int | None = None
    """Optimiser steps of one unit; None = one epoch over the training split."""
    batch_size: int = 64
    eval_batch_size: int = 256
    train_fraction: float = 1.0
    """Share of each class of the training split that is used; nested (a smaller share is contained in a larger)."""
    train_on: str | None = None
    """OOD domain whose labelled images take the place of the training split: for the oracle reference of FSR alone,
    never for a trial that is compared with others."""
    augment: tuple[str, ...] = ()
    """Training augmentations, any of `trainables.specs.augmentations.AUGMENTATIONS`, or for pictures with masks of
    `MASK_AUGMENTATIONS` there."""
    evaluation: Literal["resize", "slide"] | None = None
    """Views of pictures with masks in an evaluation: a whole picture scaled to the network's side, or windows of it;
    None = windows where `crop` is among the augmentations."""
    evaluate_at: tuple[int, ...] = ()
    """Units after which test and OOD are evaluated too (the scheduler's rungs, where a trial may be stopped); the
    last unit always is."""
    interim_splits: tuple[str, ...] | None = None
    """Splits that are evaluated at `evaluate_at`, `test` or `ood/<domain>`; None = all of them. After the last unit all
    are."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto = bfloat16 autocast on a GPU that supports it, float32 elsewhere."""
    channels_last: bool | None = None
    """Whether the network's weights and images lie in memory channel by channel within a pixel, which changes the last
    bits of a trial's numbers; None = on a GPU."""
    diagnostics: tuple[str, ...] = ("shift", "distortion", "cka")
    """What each trial measures beside its scores, any of `DIAGNOSTICS`. On by default is what never costs more than a
    tenth of a trial and is of use for every strategy (benchmarks/diagnostics.py)."""
    plasticity_probe: Literal["embedding", "in_situ"] = "embedding"
    """How plasticity is measured, see `trainables.diagnostics.plasticity`."""
    plasticity_source: str | None = None
    """Domain of the pretraining-like images of plasticity's pairs; None = the trial's own training images."""
    plasticity_pairs: int = 256
    cache: str | None = None
    """Folder for features and pretrained demo networks; None = `$LUTHIER_CACHE` or `~/.cache/luthier`."""
    task: str = "classification"
    """Name of the learning task, one of `trainables.specs.metrics.tasks()`: what is learned and measured."""
    metric: str | None = None
    """Key of the metric that selects, on validation; None = the task's own."""
    loss: LossSettings = PLAIN_LOSS
    decoder: str | None = None
    """Head of a task with dense features, one of `DECODERS`; None = the task's own choice."""
    sampling: Literal["balanced"] | None = None
    """balanced = every class equally often in an epoch of gradient training; None = every image once."""
    schedule: Literal["cosine", "poly", "constant"] | None = None
    """Learning-rate schedule of each phase, in place of the strategies' own; None = theirs."""
    evaluate_model: Literal["best", "final"] = "best"
    """Which unit's weights are tested: those of the best one on ID validation, or of the last one."""
    view: ViewSettings = PLAIN_VIEW
    corruptions: CorruptionSettings | None = None
    """Corruptions that the networks of confirmed trials are measured under; None = none."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SharedTrialSettings:
        """Inverse of `dataclasses.asdict`; lists become tuples again.

        Raises:
            TypeError: an unknown key.
        """
        values = dict(fields)
        model = values.pop("model")
        loss = values.get("loss")
        if isinstance(loss, Mapping):
            values["loss"] = LossSettings(**loss)
        view = values.get("view")
        if isinstance(view, Mapping):
            values["view"] = ViewSettings.from_dict(view)
        corruptions = values.get("corruptions")
        if isinstance(corruptions, Mapping):
            values["corruptions"] = CorruptionSettings.from_dict(corruptions)
        for name in ("augment", "evaluate_at", "interim_splits", "diagnostics"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(model=model if isinstance(model, ModelSpec) else ModelSpec(**model), **values)


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial: a strategy, its hyperparameters and a seed, under the settings of its study."""

    shared: SharedTrialSettings
    strategy: str
    hparams: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    label: str = ""
    """Name of the entry of the study file (two entries may use one strategy); empty = the strategy's name."""
    role: Literal["search", "fold", "confirm", "reference", "refit"] = "search"
    """Why the trial runs: proposed by the search, a leave-one-domain-out fold, a re-run on a fresh seed, a reference
    for FSR on another sample of training images, or a refit on training and validation images together."""
    held_out: str | None = None
    """ID domain left out of training and validation (role `fold`); its accuracy is reported as `held_out/acc`."""
    sample: str | None = None
    """Name of the training sample of a `reference` trial ("0.25", "0.25#2", "full", "oracle:sketch"); `shared` holds
    its fraction, domain and steps. None = the study's own."""
    train_draw: int = 0
    """Which stratified sample of `shared.train_fraction` is trained on; 0 = the study's own, a nested prefix. Others
    are for references of FSR alone."""

    @property
    def corruptions(self) -> CorruptionSettings | None:
        """Corruptions that this trial is measured under, at its end; None = none, as of all but confirmed trials."""
        return self.shared.corruptions if self.role == "confirm" else None

    @property
    def config_hash(self) -> str:
        """Twelve hex digits that name strategy, label and hyperparameters; seeds and roles of one
        configuration share it."""
        # Sorted: the order in which values were sampled is no difference.
        text = json.dumps([self.strategy, self.label or self.strategy, dict(self.hparams)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """The dict that Tune carries as a trial's `config`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TrialSpec:
        """Inverse of `to_dict`.

        Keys that start with `_` are the orchestrator's (`_number`, …) and ignored. The shared settings are also read
        from the key `task`, their name before version 2 and in configs for a `tune.Tuner` of one's own.

        Raises:
            TypeError: an unknown key, or no shared settings.

        Example:
            >>> settings = {"store": "/data/store", "model": {"name": "resnet18"}}
            >>> TrialSpec.from_dict({"shared": settings, "strategy": "full", "_number": 7}).shared.model.name
            'resnet18'
        """
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        if "task" in values and "shared" not in values:
            values["shared"] = values.pop("task")
        if "shared" not in values:
            raise TypeError("A trial's config needs the key 'shared', the settings of its study, but has none.")
        return cls(shared=SharedTrialSettings.from_dict(values.pop("shared")), **values)
