"""The study file as strict models: every key with its type, bounds, default and meaning.

The strings under the fields are the reference: `docs/study.md` and the comments of `luthier init` are made from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import Problem, StudyError
from orchestrator.study_file import rules
from orchestrator.study_file.entries import entry_problems
from orchestrator.study_file.explain import explain
from trainables.specs.metrics import CLASSIFICATION


class Section(BaseModel):
    """A part of a study file.

    Unknown keys and values of another type are errors, never converted.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataSpec(Section):
    """Which images, in which domains, and how they are split.
    Domains are in distribution (ID) or not (OOD).
    """

    source: Literal["folder", "parquet", "manifest", "npz", "digits", "digits_scenes"] = "folder"
    """What `root` is: image folders `root/<domain>/<class>/*` (or `root/train|val|test/<class>/*`; of pictures with
    masks see docs/data.md), Parquet files, a manifest (CSV or JSON lines with a path per picture), a MedMNIST-style
    `.npz`; `digits` and, of pictures with masks, `digits_scenes` are built in and need no root."""
    root: str | None = None
    """Folder or file with the images. A relative path counts from the study file's folder."""
    id: list[str] = []
    """Domains to train, validate and test on. Empty = all domains that are not in `ood`."""
    ood: list[str] = []
    """Domains that are only tested on: never trained on, never used to choose anything. Empty = those that the source
    itself marks as OOD (`root/ood/<domain>/<class>/*`; of `digits` all but the handwritten ones)."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Side of the square images that the network sees, in pixels. null = the size that the model was pretrained at."""
    crop_pct: Annotated[float, Field(ge=0.25, le=1)] | None = None
    """Share of a picture's shorter side that the network sees: pictures are resized to `image_size / crop_pct` pixels
    and cropped in the centre. null = 1 where the pictures (median of their shorter sides) are no larger than the
    network's own input or `image_size`; the share that the model was pretrained with where they are larger."""
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = None
    """Interpolation of the resizing. null = the one that the model was pretrained with."""
    mean: Annotated[list[float], Field(min_length=3, max_length=3)] | None = None
    """Mean of the red, green and blue values (0 to 1) that images are normalised by. null = that of timm's weights of
    the model's name; weights from elsewhere may have been trained with another, often ImageNet's:
    `[0.485, 0.456, 0.406]`."""
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] | None = None
    """Standard deviation of the red, green and blue values, as `mean`. ImageNet's: `[0.229, 0.224, 0.225]`."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the ID images for validation, per class. A source's own validation split is used instead."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the ID images for the ID test, per class. A source's own test split is used instead."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training images that is used, per class, for studies of scarce data. A smaller share is contained
    in a larger one."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the splits."""
    on_bad: Literal["quarantine", "fail"] = "quarantine"
    """Unreadable or dangerous images: quarantine leaves them out and lists them; fail refuses the data."""
    on_leak: Literal["report", "fail"] = "report"
    """Leakage: the same image, pixel for pixel, in more than one of training, validation and what is measured (test and
    OOD). report warns and names the images; fail refuses the data. Nearly equal images are reported under both, because
    a threshold decides."""
    copies: Literal["near", "equal", "apart"] | None = None
    """Which images the splits that Luthier draws never separate. near = equal images, and one picture that was saved
    again as JPEG, resized, brightened or slightly cropped (docs/data.md); equal = images with equal pixels; apart =
    none. Splits of the source's own stay as they are. null = near, but a study that was begun with an earlier version
    keeps its splits."""
    label: str | None = None
    """Column of Parquet files or of a manifest that holds the classes. null = the first of `label`, `labels`, `class`,
    `target`, `category`, `fine_label`, `coarse_label`."""
    labels: dict[str, int | str | list[int | str]] | str | None = None
    """Segmentation: classes and their values in the masks, `{background: 0, object: 255}`. A value is an integer or a
    colour, `'48,112,32'` or `'#307020'`; several make a list. Or a label file (CVAT's `labelmap.txt`,
    `class_dict.csv`), or a published table: `cityscapes` (label ids), `cityscapes-train-ids`. null = a label file
    beside the masks, else a class per value, named by it. A value without a class is an error."""
    ignore: list[int | str] | None = None
    """Segmentation: values or colours of masks that count nowhere: not in the loss, not in a score, not as a class.
    null = 255, unless `labels` gives it a class; `[]` = none."""
    mask: str | None = None
    """Segmentation: column of Parquet files or of a manifest that holds the masks. null = `mask`, or the
    first of the other usual names (docs/data.md)."""
    augment: list[str] = []
    """Training augmentations: any of `flip`, `crop`; of pictures with masks also `scale` (by 1/2 to 2) and `jitter` of
    brightness, contrast and saturation."""
    evaluation: Literal["resize", "slide"] | None = None
    """Segmentation: how the network sees a picture that is scored. resize = whole, its longer side scaled to
    `image_size`; slide = at its own size, through overlapping windows. null = slide where `crop` is an augmentation."""
    sampling: Literal["balanced"] | None = None
    """balanced = every class equally often in an epoch of gradient training: images of small classes come several
    times, of large classes a random part. null = every image once."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules.raise_if_any(
            *rules.source_problems(self.source, self.root, self.label, self.id, self.ood),
            *rules.domain_list_problems(self.id, self.ood),
            *rules.split_problems(self.val_fraction, self.test_fraction),
        )
        return self


class ModelSection(Section):
    """The pretrained network to start from."""

    name: str = Field(min_length=1)
    """A timm name (`resnet18`, `vit_base_patch16_224.augreg_in21k`), `hf-hub:…`, `local-dir:…`, or one of the built-in
    `digits_vit` and `digits_cnn`."""
    pretrained: bool = True
    """false = random weights. Never a fallback: weights that cannot be loaded are an error."""
    weights: str | None = None
    """Local weight file (`.safetensors`, `.pth`, `.bin`) or folder in timm's `local-dir` layout. null = timm's own
    weights of that name."""
    decoder: Literal["deeplabv3plus", "unet", "fpn", "linear"] | None = None
    """Segmentation: what predicts a class per pixel from the network's feature maps. `deeplabv3plus` (Chen et al.,
    2018; convolutional networks, whose last stage is dilated to stride 16), `unet`, `fpn` (networks with maps of
    strides 4 to 32), `linear` (a linear map on the last feature map). null = `linear` for plain vision transformers,
    `deeplabv3plus` where the last stage can be dilated, else `fpn`."""


class StrategyEntry(Section):
    """One competing way of fine-tuning.

    A name alone, such as `daft`, is short for `{name: daft}`.
    """

    name: str
    """The strategy: see the table in the README."""
    label: str
    """Name of this entry in tables, unique within the study. Default: the strategy's name. Needed where two entries use
    the same strategy."""
    preset: str | None = None
    """Run this published sweep of the strategy, such as `paper`, instead of a search."""
    fixed: dict[str, Any] = {}
    """Hyperparameters that are not searched but fixed at these values."""


class SearchSpec(Section):
    """How many trials, how long, and how configurations are proposed."""

    trials: Annotated[int, Field(ge=1)] = 40
    """Trials of the search over all strategies together. The default point of every strategy is tried first."""
    epochs: Annotated[int, Field(ge=1)] = 20
    """Budget of one trial, in units: epochs, or stretches of `steps_per_unit` optimiser steps."""
    steps_per_unit: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps of one unit, where an epoch is long. null = one epoch."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per optimiser step."""
    schedule: Literal["cosine", "poly", "constant"] | None = None
    """Learning rate over the steps of a trial, or of each of its phases: a cosine to zero, `poly` = (1 −
    step/steps)^0.9 (usual in segmentation), or constant. For strategies that train by gradient. null = the strategy's
    own, cosine."""
    evaluate_model: Literal["best", "final"] = "best"
    """Which unit's weights are tested: `best` = of the best one on ID validation; `final` = of the last one, as in the
    segmentation of Ha et al. (2024)."""
    sampler: Literal["tpe", "gp", "random", "paper"] = "tpe"
    """How configurations are proposed: Optuna's TPE or Gaussian process, random sampling, or the papers' own sweeps."""
    allocation: Literal["sampler", "equal", "halving"] = "sampler"
    """How the trials are allocated to the entries. sampler = after two random rounds one sampler over all entries
    chooses the entry, too; equal = to each as many, with a sampler of its own; halving = likewise, but after each third
    of the trials the worse half of the entries gets no more."""
    scheduler: Literal["asha", "promote", "none"] = "asha"
    """Early stopping at the rungs `grace · reduction^k`. asha stops a trial that reaches a rung below the best of its
    entry; promote pauses every trial there and continues the best ones first; none runs every trial to its end."""
    grace: Annotated[int, Field(ge=1)] = 1
    """Units before asha may stop a trial, or promote pauses it."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """The reduction factor η: about one in η trials of an entry continues at each rung."""
    evaluate_at_rungs: bool = False
    """Evaluate test and OOD domains at every rung, too, so that trials that are stopped there have these numbers, by
    which nothing is chosen. false = once, at the end of a trial; at rungs only the domain of `val_domain:<name>`, and
    with `keep: all` all of them."""
    objective: Annotated[str, BeforeValidator(rules.check_objective)] = "id_val"
    """How the winner is chosen: `id_val` (`metric` on ID validation), `leave_one_domain_out` (needs two or more ID
    domains), or `val_domain:<name>` (`metric` on one OOD domain, which is then validation data, not a test). Within a
    trial, the best epoch and the interpolation weights λ and α are chosen on ID validation under all three."""
    objectives: list[str] | None = None
    """Optimise accuracy and costs together: `objective` first, then one or more of `trainable_parameters`,
    `device_seconds` and `peak_memory` (GPU memory where a trial has a GPU, else the host's). Needs `scheduler: none`
    and a sampler that learns; the results then have a Pareto front. null = `objective` alone."""
    metric: str | None = None
    """What selects wherever something is chosen: epochs, C, λ and α within a trial, early stopping, the sampler, the
    winner and the leaderboard. `acc`, `balanced_acc`, `macro_f1`, `auroc`, `ap`, `nll` or `brier`; of segmentation
    `miou`, `pixel_acc` or `nll` (docs/metrics.md). null = `acc`, accuracy; of segmentation `miou`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampler, and of initialisation and batches of every trial."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto = bfloat16 autocast on a GPU that supports it, float32 elsewhere."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules.raise_if_any(
            *rules.grace_problems(self.grace, self.epochs),
            *rules.rung_problems(self.evaluate_at_rungs, self.scheduler),
            *rules.allocation_problems(self.allocation, self.sampler, self.objectives),
            *rules.objectives_problems(self.objectives, self.objective, self.sampler, self.scheduler),
        )
        return self

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs that are minimised beside the selecting metric."""
        return tuple((self.objectives or ())[1:])

    @property
    def validation_domain(self) -> str | None:
        """The domain of `val_domain:<name>`, or None under the other objectives."""
        if not self.objective.startswith(rules.VAL_DOMAIN):
            return None
        return self.objective.removeprefix(rules.VAL_DOMAIN)


class LossSpec(Section):
    """Changes of the training loss, for all strategies. Cross-entropy by default."""

    class_weights: Literal["balanced"] | None = None
    """balanced = images weighted inversely to the frequency of their class in training, with mean 1; in the linear
    probe as sample weights. null = all alike."""
    label_smoothing: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the target that is spread over all classes, for strategies that train by gradient. null = none."""
    focal_gamma: Annotated[float, Field(gt=0)] | None = None
    """γ of the focal loss (Lin et al., 2017), which weights images by (1 − p)^γ, p the probability of their label; for
    strategies that train by gradient. null = cross-entropy."""
    dice: Annotated[float, Field(gt=0)] | None = None
    """Segmentation: weight of a soft Dice term (Milletari et al., 2016) beside the cross-entropy, over the classes that
    a batch has. null = none."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules.raise_if_any(*rules.loss_problems(self.label_smoothing, self.focal_gamma))
        return self


class ConfirmSpec(Section):
    """The best configurations again on fresh seeds, for the intervals of the leaderboard."""

    top_k: Annotated[int, Field(ge=0)] | None = None
    """How many configurations to confirm: the best of each entry first, with `search.objectives` then the search's
    Pareto front from its best score down, then the runners-up. null = one per entry, two with `search.objectives`;
    0 = none."""
    seeds: Annotated[int, Field(ge=0)] = 3
    """Fresh seeds per configuration; one where all seeds would give the same trial (linear probing). 0 = none."""

    def count(self, entries: int, costs: bool = False) -> int:
        """Configurations to confirm in a study of this many entries, with or without costs among its objectives."""
        per_entry = 2 if costs else 1
        return entries * per_entry if self.top_k is None else self.top_k


class DiagnosticsSpec(Section):
    """What is measured beside accuracy.
    Of each trial, of the pretrained network, and by reference trials.
    """

    measure: list[Literal["shift", "distortion", "cka", "plasticity", "gradients"]] = ["shift", "distortion", "cka"]
    """Of each trial: `shift` of the norm layers' γ and β, `distortion` of features and change of parameters, `cka` per
    block, `plasticity` after tuning, `gradients`: gradient norms per kind of layer."""
    plasticity: bool = True
    """Measure the plasticity of the pretrained network's components at the start of the study (transformers only)."""
    plasticity_probe: Literal["embedding", "in_situ"] = "embedding"
    """Input of a component when its plasticity is measured. embedding: the token embeddings, as Odonnat et al. (2026);
    in_situ: its actual input in the network."""
    plasticity_source: str | None = None
    """Domain of images like those of the pretraining, for one half of each pair. null = pairs of training images."""
    plasticity_pairs: Annotated[int, Field(ge=2)] = 256
    """Pairs of images that plasticity is averaged over."""
    fsr: list[Literal["full", "extrapolated", "oracle"]] = []
    """References for the fine-tuning shift ratio (FSR); each costs extra trials of LayerNorm tuning: `full`
    (all training images, where `data.train_fraction` is below 1), `extrapolated` (from nested shares of the training
    images), `oracle` (labelled images of each OOD domain: analysis only)."""
    fsr_fractions: list[Annotated[float, Field(gt=0, lt=1)]] = [0.25, 0.5]
    """Shares of the training images for the extrapolation, beside the whole."""
    fsr_seeds: Annotated[int, Field(ge=1)] = 3
    """Seeds per reference. Each but the first draws the training images of its trials anew, where not all are used."""
    fsr_from: Annotated[str, Field(min_length=1)] | None = None
    """Name of a study in the same storage, on the same network and training sample, whose FSR gives an early trial of
    each LayerNorm entry its λ ≈ 1/FSR. null = this study's own FSR, where it was measured before (`luthier fsr`)."""


class EvaluateSpec(Section):
    """What confirmed configurations are measured on beside ID test and the OOD domains."""

    corruptions: Annotated[list[str] | str | None, BeforeValidator(rules.check_corruptions)] = None
    """Corruption robustness of confirmed configurations (Hendrycks and Dietterich, 2019): `common` = fifteen
    corruptions at five severities of the ID test pictures as the network sees them, a list of their names, or a folder
    of corrupted pictures as CIFAR-10-C has them (`labels.npy`, `<corruption>.npy`), whose path contains a `/`. null =
    not measured (docs/robustness.md)."""
    images: Annotated[int, Field(ge=1)] = 200
    """Pictures per corruption and severity: the first of the ID test, which are a stratified sample, or of each
    severity in the folder."""

    @property
    def corruption_folder(self) -> str | None:
        """Folder of corrupted pictures; None = pictures are corrupted by Luthier, or nothing is measured."""
        value = self.corruptions
        return value if isinstance(value, str) and value != rules.COMMON_CORRUPTIONS else None


class ResourcesSpec(Section):
    """Resources of one trial, and the number of concurrent trials."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores of one trial."""
    gpus: Annotated[float | Literal["auto"], BeforeValidator(rules.check_gpus)] = "auto"
    """GPUs of one trial: 1, 0, or a share such as 0.25 where several trials fit on one GPU. auto = one where the
    cluster has any, else none."""
    channels_last: bool | Literal["auto"] = "auto"
    """Memory layout of images and convolutions. auto = channels last on a GPU, and on a CPU where it is faster: one
    training step and one evaluation batch are measured when the study starts, and the answer holds for all its runs.
    The last bits of a trial's numbers depend on it: give true or false where a study must repeat those of another."""
    nice: Annotated[int, Field(ge=0, le=19)] | None = None
    """Niceness of trials beside other processes of the machine, added to that of `luthier run`: 0 = as any other
    process, 19 = only what others leave. null = 0, where Ray's own is 15. In a cluster that is joined, workers have the
    niceness that it was started with (`RAY_worker_niceness`), which a trial can raise to this value, not lower."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Concurrent trials. null = as many as fit. 1 makes the search itself reproducible (on a CPU with
    `channels_last` given)."""


class FailuresSpec(Section):
    """Retries, detection of hung trials, and when a study is stopped."""

    retries: Annotated[int, Field(ge=0)] = 2
    """Retries per trial and run, each from the last checkpoint, after its process or machine died or it hung. A kill by
    Ray's memory monitor costs no retry, once per unit: another trial may have used the memory. Errors of the trial
    itself (see the table below) are not retried."""
    stall_factor: Annotated[float, Field(gt=1)] | None = 3.0
    """A unit slower than `stall_factor` × the trial's median for that kind of unit counts as hung
    (docs/study.md has the details). Doubled at each such retry. null = hung trials are not detected."""
    stall_floor: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that any unit may take, however fast the others were."""
    stall_first: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds that the first unit of a kind may take: the first unit, which loads the network, and the first that
    includes an evaluation."""
    stop_after: Annotated[int, Field(ge=1)] | None = 5
    """Stop the study once this many trials of one run have failed for the same reason, if they are also at least
    `stop_share` of the trials started. null = never."""
    stop_share: Annotated[float, Field(gt=0, le=1)] = 0.6
    """See `stop_after`. The default does not stop a study of two strategies of which one always fails."""


class TrackingSpec(Section):
    """Where MLflow runs are recorded. The study's own journal is always kept in `storage`."""

    uri: Annotated[str, BeforeValidator(rules.check_tracking_uri)] | None = None
    """MLflow tracking URI, such as `http://mlflow:5000`. null = a SQLite file in `storage`."""
    experiment: Annotated[str, Field(min_length=1)] | None = None
    """MLflow experiment. null = the study's name."""
    predictions: bool = True
    """Send the predictions of confirmed trials, with the names of their samples, as artifacts of their runs."""
    registered_model: Annotated[str, BeforeValidator(rules.check_model_name)] | None = None
    """Name of a model in MLflow's registry, of which the chosen model of the complete study becomes a version. null =
    no weights are sent."""


class StudySpec(Section):
    """A whole study file.

    >>> spec = StudySpec.from_fields({
    ...     "name": "digits",
    ...     "data": {"source": "digits"},
    ...     "model": {"name": "digits_cnn"},
    ...     "strategies": ["linear_probe", {"name": "full", "fixed": {"lr_head": 10.0}}],
    ... })
    >>> spec.search.trials
    40
    >>> [(entry.label, entry.fixed) for entry in spec.strategies]
    [('linear_probe', {}), ('full', {'lr_head': 10.0})]
    """

    name: Annotated[str, BeforeValidator(rules.check_name)]
    """Name of the study's folder, its MLflow parent run and its jobs: letters, digits, `.`, `_`, `-`."""
    task: Literal["classification", "segmentation"] = "classification"
    """What is learned. classification = a class per picture, from folders named after classes; segmentation = a class
    per pixel, from pictures with masks (docs/data.md)."""
    data: DataSpec
    model: ModelSection
    strategies: Annotated[list[Annotated[StrategyEntry, BeforeValidator(rules.named_entry)]], Field(min_length=1)]
    """Ways of fine-tuning that compete under one budget."""
    search: SearchSpec = SearchSpec()
    warm_start: Annotated[list[Annotated[str, BeforeValidator(rules.check_name)]], Field(min_length=1)] | None = None
    """Names of earlier studies in the same storage, finished or interrupted, that the search starts from, also of other
    data or another network. Every entry first tries its default point, then the configurations of its strategy that
    were best there (docs/search.md). They are read when the study starts for the first time, never again. null =
    none."""
    loss: LossSpec = LossSpec()
    confirm: ConfirmSpec = ConfirmSpec()
    diagnostics: DiagnosticsSpec = DiagnosticsSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    resources: ResourcesSpec = ResourcesSpec()
    failures: FailuresSpec = FailuresSpec()
    tracking: TrackingSpec = TrackingSpec()
    keep: Literal["best", "confirmed", "all"] = "best"
    """Whose weights and predictions are kept: `best` = each entry's best search trial so far and every confirmed trial;
    `confirmed` = confirmed trials only; `all` = every trial that used its whole budget. What is no longer kept is
    removed from the disk; `luthier plan` says the size, `luthier prune` removes the rest."""
    storage: Annotated[str, BeforeValidator(rules.check_storage)] = "studies"
    """Folder of all studies: journals, results, the data store, the tracking database. Shared by all machines of a
    cluster. A relative path counts from the study file's folder."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        data = self.data
        diagnostics = self.diagnostics
        rules.raise_if_any(
            *rules.augmentation_problems(self.task, data.augment, data.evaluation),
            *rules.whole_picture_problems(
                self.task, data.crop_pct, data.interpolation, data.sampling, self.evaluate.corruption_folder
            ),
            *rules.mask_problems(self.task, data.source, data.labels, data.ignore, data.mask, data.label),
            *rules.metric_problems(self.task, self.search.metric),
            *rules.objective_problems(self.search.objective, data.source, data.id, data.ood),
            *rules.sample_problems(diagnostics.fsr, diagnostics.fsr_fractions, data.train_fraction),
            *rules.balance_problems(self.loss.class_weights, data.sampling),
            *rules.warm_start_problems(self.warm_start, self.name, self.search.sampler),
            *rules.unconfirmed_problems(self.evaluate.corruptions is not None, self.confirm.top_k, self.confirm.seeds),
        )
        return self

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """A study from plain Python values; relative paths count from the working directory.

        Raises:
            StudyError: unknown keys, values of another type or out of range; all at once.
        """
        problems: list[Problem] = []
        spec: Self | None = None
        try:
            spec = cls.model_validate(dict(fields))
        except ValidationError as error:
            problems = explain(error, cls)
        # Of the raw fields, also where the model refused them: all problems are reported at once.
        problems += entry_problems(fields.get("strategies"), fields.get("task", CLASSIFICATION.task))
        if problems or spec is None:
            raise StudyError(problems)
        return spec

    @property
    def tracking_uri(self) -> str:
        """The MLflow URI, with the default filled in."""
        return self.tracking.uri or f"sqlite:///{Path(self.storage).absolute() / 'mlflow.db'}"

    @property
    def experiment(self) -> str:
        """The MLflow experiment, with the default filled in."""
        return self.tracking.experiment or self.name
