"""Metric table: names, directions, units and meanings of all metrics.

With the names under which values are recorded. Loop, record, MLflow, leaderboard, report and documents take metric
names from here; no other module writes one as a literal. A recorded name is `<split>/<key>`: `val/acc`, `test/nll`,
`ood/sketch/acc`. Standard library only, so that the driver reads the table without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainables.specs.suggestions import did_you_mean

TRAIN = "train"
VAL = "val"
TEST = "test"
HELD_OUT = "held_out"
"""The ID domain that a leave-one-domain-out fold leaves out of training and validation."""
OOD_MEAN = "ood/mean"
"""Unweighted mean over the OOD domains."""
OOD_WORST = "ood/worst"
"""The worst OOD domain."""


_OOD = "ood/"
_ID = "id/"
_BEST = "best/"


def ood(domain: str) -> str:
    """The split of one OOD domain."""
    return f"{_OOD}{domain}"


def id_domain(domain: str) -> str:
    """The part of ID test that is of one ID domain, where there are several."""
    return f"{_ID}{domain}"


def ood_domain(split: str) -> str | None:
    """The domain of an OOD split; None for the other splits.

    Example:
        >>> ood_domain("ood/sketch"), ood_domain("test")
        ('sketch', None)
    """
    return split.removeprefix(_OOD) if split.startswith(_OOD) else None


def best(name: str) -> str:
    """Recorded name of a per-unit metric for the weights that are tested."""
    return f"{_BEST}{name}"


def best_or_last(values: Mapping[str, Any], name: str) -> Any:
    """A per-unit metric of the tested weights, or of the last unit.

    Of the last unit where a trial ended before its weights were tested.

    Example:
        >>> best_or_last({"val/acc": 0.8, "best/val/acc": 0.9}, "val/acc")
        0.9
        >>> best_or_last({"val/acc": 0.8}, "val/acc")
        0.8
    """
    return values.get(best(name), values.get(name))


@dataclass(frozen=True)
class Metric:
    """One quantity that is measured on a split."""

    key: str
    """Last part of the recorded name: `acc`."""
    title: str
    """Name in tables and on axes: `accuracy`."""
    direction: Literal["max", "min"]
    """Whether larger or smaller values are better."""
    unit: Literal["fraction", "nats", "count", ""]
    """`fraction` is shown in per cent, `count` without decimals where it is whole; "" = a plain number."""
    meaning: str
    """One sentence for the documents."""
    test_name: str | None = None
    """Recorded name on ID test where it is not `test/<key>`."""
    heading: str | None = None
    """Heading of a narrow table's column; None = the title."""

    def on(self, split: str) -> str:
        """The recorded name on a split."""
        if split == TEST and self.test_name is not None:
            return self.test_name
        return f"{split}/{self.key}"

    def score(self, value: float) -> float:
        """The value oriented so that larger is better."""
        return value if self.direction == "max" else -value

    def worst(self, values: Iterable[float]) -> float:
        """The worst of several values.

        Example:
            >>> ACCURACY.worst([0.7, 0.9]), NLL.worst([0.7, 0.9])
            (0.7, 0.9)
        """
        return min(values, key=self.score)

    @property
    def scale(self) -> float:
        """Factor from a recorded to a displayed value.

        100 for fractions, which are displayed in per cent.
        """
        return 100.0 if self.unit == "fraction" else 1.0

    @property
    def axis(self) -> str:
        """Title with the displayed unit: `accuracy (%)`."""
        unit = self._symbol
        return f"{self.title} ({unit})" if unit else self.title

    def text(self, value: float, half: float = float("nan")) -> str:
        """A value for a reader, with its interval.

        The half-width of the interval is left out where it is not a number.

        Example:
            >>> ACCURACY.text(0.9712, 0.004), NLL.text(0.25)
            ('97.1 ± 0.4 %', '0.250 nats')
        """
        return f"{self.number(value, half)} {self._symbol}".rstrip()

    def number(self, value: float, half: float = float("nan")) -> str:
        """`text` without the unit, for a table whose heading has it."""
        shown = self._digits(value)
        # NaN, for no interval, differs from itself.
        return f"{shown} ± {self._digits(half)}" if half == half else shown

    def difference(self, value: float, half: float = float("nan"), signed: bool = True) -> str:
        """A difference of two values for a reader.

        Example:
            >>> ACCURACY.difference(0.012, 0.008), NLL.difference(0.1, signed=False)
            ('+1.2 ± 0.8 points', '0.100 nats')
        """
        unit = "points" if self.unit == "fraction" else self._symbol
        sign = "+" if signed else ""
        spread = f" ± {self._digits(half)}" if half == half else ""
        return f"{self._digits(value, sign)}{spread} {unit}".rstrip()

    @property
    def _symbol(self) -> str:
        """The unit beside a displayed value."""
        return {"fraction": "%", "count": ""}.get(self.unit, self.unit)

    def _digits(self, value: float, sign: str = "") -> str:
        decimals = 1 if self.unit == "fraction" else 3
        if self.unit == "count":
            # Over seeds a mean of counts need not be whole.
            decimals = 0 if float(value).is_integer() else 1
        return f"{self.scale * value:{sign}.{decimals}f}"


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of one task, and which of them chooses."""

    task: str
    """Name of the task in a study file."""
    selection: Metric
    """Ranks units of a trial, trials of a search and configurations of a study, on validation data."""
    tie_breaker: Metric
    """Decides between equal values of `selection`."""
    reported: tuple[Metric, ...]
    """Measured on ID test and on every OOD domain, `selection` among them."""
    training: tuple[Metric, ...]
    """Measured on the training batches beside the loss."""
    loss: Metric | None = None
    """The metric that is the training loss itself, for heads solved in closed form; None = such heads do not exist."""
    leaderboard: tuple[Metric, ...] = ()
    """Shown in the leaderboard, on ID test, beside the selection metric."""
    final: tuple[Metric, ...] = ()
    """Measured as well, once per trial, for the tested weights: on ID test, on every OOD domain and, where there are
    several, on every ID domain."""
    selectable: tuple[Metric, ...] = ()
    """What `selecting` accepts beside `selection`."""
    corruption: Metric | None = None
    """Share whose complement is the error on corrupted pictures; None = the task is not measured on them."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TaskMetrics:
        """Inverse of `to_dict`, also after JSON has made lists of its tuples.

        Example:
            >>> TaskMetrics.from_dict(CLASSIFICATION.to_dict()) == CLASSIFICATION
            True
        """
        groups = {name: tuple(Metric(**row) for row in fields[name]) for name in _METRIC_GROUPS}
        return cls(
            task=fields["task"],
            selection=Metric(**fields["selection"]),
            tie_breaker=Metric(**fields["tie_breaker"]),
            loss=None if fields["loss"] is None else Metric(**fields["loss"]),
            # Journals of earlier versions do not have it.
            corruption=Metric(**fields["corruption"]) if fields.get("corruption") else None,
            **groups,
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Every metric once, the selection metric first."""
        return tuple(dict.fromkeys((self.selection, self.tie_breaker, *self.reported, *self.training, *self.final)))

    def selecting(self, key: str | None) -> TaskMetrics:
        """The same metrics, of which another one selects; the former selection metric joins the leaderboard.

        Args:
            key: of the metric; None = this table as it is.

        Raises:
            ValueError: no metric of the task that can select.

        Example:
            >>> CLASSIFICATION.selecting("balanced_acc").best_validation
            'best/val/balanced_acc'
        """
        if key is None or key == self.selection.key:
            return self
        metric = next((metric for metric in self.selectable if metric.key == key), None)
        if metric is None:
            keys = [metric.key for metric in (self.selection, *self.selectable)]
            hint = did_you_mean(key, keys)
            raise ValueError(f"The metric that selects is one of {', '.join(keys)}, but got {key!r}.{hint}")
        return replace(
            self,
            selection=metric,
            tie_breaker=self.selection if metric == self.tie_breaker else self.tie_breaker,
            reported=tuple(dict.fromkeys((*self.reported, metric))),
            final=tuple(other for other in self.final if other != metric),
            leaderboard=(self.selection, *self.leaderboard),
        )

    def order(self, value: float, tie_breaker: float) -> tuple[float, float]:
        """Sort key of two values on the same data.

        The larger key is the better one.

        Args:
            value: of `selection`.
            tie_breaker: of `tie_breaker`.

        Example:
            >>> CLASSIFICATION.order(0.9, 0.3) > CLASSIFICATION.order(0.9, 0.5)
            True
        """
        return self.selection.score(value), self.tie_breaker.score(tie_breaker)

    @property
    def validation(self) -> str:
        """Recorded name of the selection metric on ID validation, per unit."""
        return self.selection.on(VAL)

    @property
    def best_validation(self) -> str:
        """Recorded name of the selection metric on ID validation for the weights that are tested."""
        return best(self.validation)

    @property
    def test(self) -> str:
        """Recorded name of the selection metric on ID test."""
        return self.selection.on(TEST)

    @property
    def ood_mean(self) -> str:
        """Recorded name of the selection metric's mean over the OOD domains."""
        return self.selection.on(OOD_MEAN)

    @property
    def ood_worst(self) -> str:
        """Recorded name of the selection metric on the worst OOD domain."""
        return self.selection.on(OOD_WORST)

    @property
    def held_out(self) -> str:
        """Recorded name of the selection metric on a fold's held-out domain."""
        return self.selection.on(HELD_OUT)

    def of_domain(self, domain: str) -> str:
        """Recorded name of the selection metric on one OOD domain."""
        return self.selection.on(ood(domain))

    def domains(self, names: Iterable[str]) -> list[str]:
        """The OOD domains whose selection metric is among recorded names, sorted.

        Example:
            >>> task_metrics().domains(["ood/sketch/acc", "ood/mean/acc", "test/acc", "ood/sketch/nll"])
            ['sketch']
        """
        end = f"/{self.selection.key}"
        found = {
            name.removeprefix(_OOD).removesuffix(end)
            for name in names
            if name.startswith(_OOD) and name.endswith(end) and len(name) > len(_OOD) + len(end)
        }
        return sorted(found - {split.removeprefix(_OOD) for split in (OOD_MEAN, OOD_WORST)})

    def named(self, name: str) -> Metric | None:
        """The metric behind a recorded name; None where the name is none of this task's.

        Example:
            >>> task_metrics().named("best/val/acc").title, task_metrics().named("cost/unit_seconds")
            ('accuracy', None)
        """
        split, _, key = name.removeprefix(_BEST).rpartition("/")
        for metric in self.metrics:
            if name == metric.test_name or (metric.key == key and (split in _SPLITS or split.startswith((_OOD, _ID)))):
                return metric
        return None

    def tests(self, name: str) -> bool:
        """Whether a recorded name is measured on test data.

        ID test or a domain's part of it, or the OOD domains together. A single OOD domain is not among them, since a
        study may give one up for validation.
        """
        special = {metric.test_name.partition("/")[0] for metric in self.metrics if metric.test_name is not None}
        return name.startswith((f"{TEST}/", _ID, f"{OOD_MEAN}/", f"{OOD_WORST}/", *(f"{group}/" for group in special)))


_METRIC_GROUPS = ("reported", "training", "leaderboard", "final", "selectable")
"""Fields of `TaskMetrics` that are metrics in a tuple."""
_SPLITS = (TRAIN, VAL, TEST, HELD_OUT)

ACCURACY = Metric("acc", "accuracy", "max", "fraction", "Share of images whose top class is their label.")
NLL = Metric("nll", "negative log-likelihood", "min", "nats", "Mean cross-entropy per image.")
ECE = Metric(
    "ece",
    "calibration error",
    "min",
    "fraction",
    "Expected calibration error of the top class over 15 equal bins of confidence (Guo et al., 2017).",
    test_name="calib/ece",
    heading="ECE",
)
BALANCED_ACCURACY = Metric(
    "balanced_acc", "balanced accuracy", "max", "fraction", "Mean recall over the classes that the images have."
)
MACRO_F1 = Metric(
    "macro_f1",
    "macro F1",
    "max",
    "fraction",
    "Mean F1 score over the classes that the images have or are predicted to have.",
)
AUROC = Metric(
    "auroc",
    "AUROC",
    "max",
    "",
    "Area under the ROC curve of each class against the others, mean over the classes that the images have; not a "
    "number where they have one class only.",
)
AVERAGE_PRECISION = Metric(
    "ap",
    "average precision",
    "max",
    "",
    "Average precision of each class against the others (a sum over thresholds, not interpolated), mean over the "
    "classes that the images have.",
)
BRIER = Metric(
    "brier",
    "Brier score",
    "min",
    "",
    "Mean squared distance of the predicted probabilities from the label's, summed over classes: 0 to 2 (Brier, 1950).",
)
ECE_SCALED = Metric(
    "ece_scaled",
    "calibration error after temperature scaling",
    "min",
    "fraction",
    "The calibration error with logits divided by `calib/temperature` (Guo et al., 2017).",
    test_name="calib/ece_scaled",
    heading="ECE scaled",
)
TOP5 = Metric(
    "top5",
    "top-5 accuracy",
    "max",
    "fraction",
    "Share of images whose label is among the five top classes; where there are more than five.",
)
WEIGHTED_NLL = Metric(
    "weighted_nll",
    "weighted negative log-likelihood",
    "min",
    "nats",
    "Mean cross-entropy per image, weighted by class; recorded as `train/loss` of closed-form solutions.",
)

CLASSIFICATION = TaskMetrics(
    task="classification",
    selection=ACCURACY,
    tie_breaker=NLL,
    reported=(ACCURACY, NLL, ECE),
    training=(ACCURACY,),
    loss=NLL,
    leaderboard=(ECE,),
    final=(BALANCED_ACCURACY, MACRO_F1, AUROC, AVERAGE_PRECISION, BRIER, ECE_SCALED, TOP5),
    selectable=(BALANCED_ACCURACY, MACRO_F1, AUROC, AVERAGE_PRECISION, NLL, BRIER),
    corruption=ACCURACY,
)

MEAN_IOU = Metric(
    "miou",
    "mIoU",
    "max",
    "fraction",
    "Mean intersection over union: the mean over the classes of TP / (TP + FP + FN), counted in labelled pixels over "
    "the whole split, at each mask's own size. Classes that neither masks nor predictions have are left out.",
)
MEAN_IOU_CLASSES = Metric(
    "miou_classes",
    "classes in the mean",
    "max",
    "count",
    "Classes that the mean intersection over union is taken over: those that labelled pixels have or are predicted to "
    "have.",
    heading="classes",
)
PIXEL_NLL = Metric(
    "nll", "negative log-likelihood per pixel", "min", "nats", "Mean cross-entropy per labelled pixel.", heading="NLL"
)
PIXEL_ACCURACY = Metric(
    "pixel_acc",
    "pixel accuracy",
    "max",
    "fraction",
    "Share of labelled pixels whose top class is their label.",
)

IOU_TABLE = "iou_per_class"
"""Name of the table of intersections over union by class and split."""
PIXEL_CONFUSION_TABLE = "pixel_confusion"
"""Name of the table of pixels by label and prediction."""

SEGMENTATION = TaskMetrics(
    task="segmentation",
    selection=MEAN_IOU,
    tie_breaker=PIXEL_NLL,
    reported=(MEAN_IOU, MEAN_IOU_CLASSES, PIXEL_ACCURACY, PIXEL_NLL),
    training=(MEAN_IOU, PIXEL_ACCURACY),
    leaderboard=(MEAN_IOU_CLASSES, PIXEL_ACCURACY),
    selectable=(PIXEL_ACCURACY, PIXEL_NLL),
    corruption=MEAN_IOU,
)

BUILT_IN_TASKS: tuple[TaskMetrics, ...] = (CLASSIFICATION, SEGMENTATION)
"""The metrics of the tasks that Luthier ships: the rows of docs/metrics.md."""

_TASKS: dict[str, TaskMetrics] = {metrics.task: metrics for metrics in BUILT_IN_TASKS}


def register(metrics: TaskMetrics) -> None:
    """Add the metrics of a task.

    Raises:
        ValueError: another task has the name.
    """
    if _TASKS.get(metrics.task, metrics) != metrics:
        raise ValueError(f"A task's name is unique, but {metrics.task!r} has metrics of its own.")
    _TASKS[metrics.task] = metrics


def tasks() -> list[str]:
    """Names of all tasks, built in and registered, sorted."""
    return sorted(_TASKS)


def task_metrics(task: str = CLASSIFICATION.task) -> TaskMetrics:
    """The metrics of a task.

    Raises:
        ValueError: no such task.

    Example:
        >>> task_metrics("classification").best_validation
        'best/val/acc'
    """
    if task not in _TASKS:
        raise ValueError(f"A task is one of {', '.join(tasks())}, but got {task!r}.")
    return _TASKS[task]


@dataclass(frozen=True)
class Quantity:
    """A recorded name, or a family of names, that is the same for every task."""

    name: str
    """Recorded name; parts in angle brackets vary: `change/<kind>`."""
    direction: Literal["max", "min"] | None
    """Whether larger or smaller values are better; None = neither, and no search optimises it."""
    unit: str
    """"" = a plain number."""
    meaning: str
    """One sentence for the documents."""
    measured: Literal["unit", "trial", "study"] = "trial"
    """Recorded after every unit, once per trial, or once per study."""

    @property
    def group(self) -> str:
        """First part of the name."""
        return self.name.partition("/")[0]

    def of(self, *parts: str) -> str:
        """The recorded name with its varying parts filled in.

        Example:
            >>> TRIALS.of("complete")
            'trials/complete'
        """
        name = self.name
        for part in parts:
            before, _, rest = name.partition("<")
            name = f"{before}{part}{rest.partition('>')[2]}"
        return name


TRAIN_LOSS = Quantity("train/loss", "min", "", "Mean loss per image over the unit's training batches.", "unit")
BEST_EPOCH = Quantity("best/epoch", None, "units", "Unit whose weights are tested, counted from 1.")
LR_BACKBONE = Quantity("lr/backbone", None, "", "Largest learning rate of the backbone's parameter groups.", "unit")
LR_HEAD = Quantity("lr/head", None, "", "Learning rate of the head.", "unit")

UNIT_SECONDS = Quantity(
    "cost/unit_seconds", "min", "s", "Wall-clock time of the unit: training, validation and tests.", "unit"
)
IMAGES_PER_SECOND = Quantity("cost/images_per_second", "max", "images/s", "Training images per second.", "unit")
MICRO_BATCH = Quantity(
    "cost/micro_batch", None, "images", "Images per forward pass, where memory forced gradient accumulation.", "unit"
)
TOTAL_SECONDS = Quantity("cost/total_seconds", "min", "s", "Wall-clock time inside the trial's units.")
FIRST_BATCH_SECONDS = Quantity(
    "cost/first_batch_seconds", "min", "s", "Time from the trial's start to its first batch."
)
TRAINABLE_PARAMETERS = Quantity("cost/trainable_parameters", "min", "", "Parameters that the optimiser may move.")
PARAMETERS = Quantity("cost/parameters", "min", "", "Parameters of the network with its head.")
PEAK_HOST_BYTES = Quantity(
    "cost/peak_host_bytes",
    "min",
    "bytes",
    "Peak resident memory of the trial's process, of its latest attempt (Linux).",
)
PEAK_GPU_BYTES = Quantity(
    "cost/peak_gpu_bytes",
    "min",
    "bytes",
    "Peak memory that PyTorch allocated on the GPU, in the trial's latest attempt.",
)
CPU_USE = Quantity(
    "cost/cpu_use", None, "", "CPU time of the trial's process by wall-clock time: 1 is one busy core.", "unit"
)
HOST_BYTES = Quantity(
    "cost/host_bytes", "min", "bytes", "Resident memory of the trial's process at the end of the unit (Linux).", "unit"
)
GPU_USE = Quantity(
    "cost/gpu_use",
    None,
    "fraction",
    "Share of time in which the GPU computed, for any process; mean of a reading per second of training (NVML, where "
    "nvidia-ml-py is installed).",
    "unit",
)
GPU_BYTES = Quantity(
    "cost/gpu_bytes",
    "min",
    "bytes",
    "GPU memory that PyTorch held for the trial's process at the end of the unit.",
    "unit",
)
TRAINING_IMAGES = Quantity("cost/training_images", "min", "images", "Size of the training sample.")

SHIFT_PARTS = ("gamma", "beta", "total")
LN_SHIFT = Quantity(
    "ln_shift/<part>",
    None,
    "",
    "Sum over LayerNorms of the L2 distance of γ, of β, or of both from the pretrained values, for the tested weights "
    "(Tan et al., 2025).",
)
LN_SHIFT_LAST = Quantity(
    "ln_shift/last/<part>", None, "", "The same after the last unit; the fine-tuning shift ratio uses it."
)
BN_SHIFT = Quantity("bn_shift/<part>", None, "", "The shift of BatchNorm's γ and β, for the tested weights.")
BN_SHIFT_LAST = Quantity("bn_shift/last/<part>", None, "", "The same after the last unit.")
CHANGE = Quantity(
    "change/<kind>",
    None,
    "",
    "Mean relative change ‖W̃ − W‖₂ / ‖W‖₂ of the tensors of a kind of layer; `total`: of the backbone.",
)
CKA_MEAN = Quantity(
    "cka/mean", None, "", "Linear CKA of pretrained and tuned activations, mean over blocks (Kornblith et al., 2019)."
)
DISTORTION_COSINE = Quantity(
    "distortion/<split>/cosine", None, "", "Mean cosine similarity of pretrained and tuned features; 1 = not distorted."
)
DISTORTION_L2 = Quantity(
    "distortion/<split>/l2", None, "", "Mean L2 distance of pretrained and tuned features (Kumar et al., 2022)."
)
DISTORTION_QUANTILE = Quantity(
    "distortion/<split>/<distance>_q<percent>", None, "", "Quantile over images of the cosine or the L2 distance."
)
GRAD_NORM = Quantity(
    "grad_norm/<kind>", None, "", "Mean L2 norm of the gradients of a kind of layer over the unit's steps.", "unit"
)
BN_CONVERSION_LAYERS = Quantity("bn_conversion/layers", None, "layers", "BatchNorm layers that were converted.")
BN_CONVERSION_SHIFT = Quantity(
    "bn_conversion/mean_shift", None, "", "Distance of target from source means, in source standard deviations."
)
BN_CONVERSION_RATIO = Quantity(
    "bn_conversion/variance_ratio", None, "", "Geometric mean of target over source variances."
)
LAYERNORM_LAMBDA = Quantity(
    "layernorm/lambda",
    None,
    "",
    "λ, the rescaling of the LayerNorm shift: 0 = pretrained, 1 = tuned (Tan et al., 2025).",
)
LAYERNORM_VAL_AT_ONE = Quantity(
    "layernorm/val_<metric>_at_1", None, "", "The selection metric on ID validation at λ = 1, before it is rescaled."
)
WISE_ALPHA = Quantity(
    "wise/alpha", None, "", "α, the interpolation of weights: 0 = pretrained, 1 = tuned (Wortsman et al., 2022)."
)
COMPONENT = Quantity(
    "components/<component>", None, "", "1 if the component of the transformer blocks is trained, else 0."
)
COMPONENTS_SELECTED = Quantity("components/selected", None, "components", "Components that are trained.")
LORA_MAPS = Quantity("lora/maps", None, "layers", "Linear maps that got an adapter (Hu et al., 2022).")
TEMPERATURE = Quantity(
    "calib/temperature",
    None,
    "",
    "Temperature of the tested weights that minimises the negative log-likelihood on ID validation (Guo et al., 2017).",
)
PROBE_C = Quantity(
    "linear_probe/C", None, "", "Inverse regularisation of the closed-form probe, chosen on ID validation."
)
PROBE_VAL = Quantity(
    "linear_probe/val_<metric>", None, "", "The selection metric of the closed-form probe on ID validation."
)
HEAD_CURVATURE = Quantity(
    "linear_probe/curvature",
    None,
    "",
    "Curvature of the cross-entropy in the features under the solved head, times the features' variance.",
)
PROBE_C_LOW = Quantity(
    "linear_probe/C_low",
    None,
    "",
    "Smallest C whose selection metric on ID validation is within one standard error of the best.",
)
PROBE_C_HIGH = Quantity("linear_probe/C_high", None, "", "Largest such C.")
PROBE_WITHIN_SE = Quantity("linear_probe/within_se", None, "values", "Number of such C on the path.")
PROBE_PATH = Quantity("linear_probe/path", None, "values", "Number of C on the path.")
CORRUPTION_ERROR = Quantity(
    "robust/<corruption>/ce",
    "min",
    "%",
    "Corruption error: 100 − accuracy in per cent, mean over five severities (Hendrycks and Dietterich, 2019).",
)
MEAN_CORRUPTION_ERROR = Quantity("robust/mce", "min", "%", "mCE: mean of the corruption errors, unnormalised.")
CLEAN_ERROR = Quantity("robust/clean_error", "min", "%", "100 − accuracy on the same pictures without corruption.")
RELATIVE_MCE = Quantity(
    "robust/relative_mce",
    "min",
    "%",
    "Relative mCE: what corruptions add to the error on clean pictures, over what they add to the linear probe's; mean "
    "over the corruptions (Hendrycks and Dietterich, 2019).",
    "study",
)
NORMALISED_MCE = Quantity(
    "robust/mce_over_probe",
    "min",
    "%",
    "Corruption error over the study's own linear probe's, mean over the corruptions.",
    "study",
)
CORRUPTION_ERRORS = "corruptions"
"""Table of a confirmed trial: error by corruption and severity."""
CORRUPTION_SAMPLES = "corruption_samples"
"""Table of a confirmed trial: error of each picture by corruption, mean over the severities."""

PLASTICITY = Quantity(
    "plasticity/<component>",
    None,
    "",
    "Rate of change P of a pretrained component between inputs, mean over blocks (Odonnat et al., 2026).",
    "study",
)
FSR = Quantity(
    "fsr/<reference>", None, "", "Fine-tuning shift ratio against a reference sample (Tan et al., 2025).", "study"
)
FSR_LOW = Quantity("fsr/<reference>/low", None, "", "Lower end of its 95 % interval.", "study")
FSR_HIGH = Quantity("fsr/<reference>/high", None, "", "Upper end of its 95 % interval.", "study")
FSR_LAMBDA = Quantity("fsr/lambda", None, "", "λ = 1/FSR that the shift ratio suggests.", "study")
GAIN = Quantity(
    "gain",
    "max",
    "fraction",
    "Improvement of the selection metric on ID test over linear probing, relative to it.",
    "study",
)
GAIN_OOD = Quantity("gain/ood", "max", "fraction", "The same for the mean over the OOD domains.", "study")
REGRET = Quantity(
    "selection/regret",
    "min",
    "",
    "What the selection rule gave away against a choice by test data, in the metric's unit.",
    "study",
)
TRIALS = Quantity(
    "trials/<state>", None, "trials", "Trials of the study that ended complete, pruned or failed.", "study"
)

QUANTITIES: tuple[Quantity, ...] = (
    TRAIN_LOSS, BEST_EPOCH, LR_BACKBONE, LR_HEAD,
    UNIT_SECONDS, IMAGES_PER_SECOND, MICRO_BATCH, TOTAL_SECONDS, FIRST_BATCH_SECONDS, TRAINABLE_PARAMETERS,
    PARAMETERS, PEAK_HOST_BYTES, PEAK_GPU_BYTES, CPU_USE, HOST_BYTES, GPU_USE, GPU_BYTES, TRAINING_IMAGES,
    LN_SHIFT, LN_SHIFT_LAST, BN_SHIFT, BN_SHIFT_LAST, CHANGE, CKA_MEAN, DISTORTION_COSINE, DISTORTION_L2,
    DISTORTION_QUANTILE, GRAD_NORM, BN_CONVERSION_LAYERS, BN_CONVERSION_SHIFT, BN_CONVERSION_RATIO,
    LAYERNORM_LAMBDA, LAYERNORM_VAL_AT_ONE, WISE_ALPHA, COMPONENT, COMPONENTS_SELECTED, LORA_MAPS, PROBE_C,
    PROBE_VAL, PROBE_C_LOW, PROBE_C_HIGH, PROBE_WITHIN_SE, PROBE_PATH, HEAD_CURVATURE,
    TEMPERATURE, CORRUPTION_ERROR, MEAN_CORRUPTION_ERROR, CLEAN_ERROR, RELATIVE_MCE, NORMALISED_MCE,
    PLASTICITY, FSR, FSR_LOW, FSR_HIGH, FSR_LAMBDA, GAIN, GAIN_OOD, REGRET, TRIALS,
)  # fmt: skip
"""Every recorded name that no task defines. Strategies may record more under their own names."""


def quantity(name: str) -> Quantity | None:
    """The quantity with exactly this recorded name; None where there is none."""
    return next((quantity for quantity in QUANTITIES if quantity.name == name), None)


def is_cost(name: str) -> bool:
    """Whether a recorded name is a cost.

    Costs are times, throughput and sizes, which may differ between equal runs.

    Example:
        >>> is_cost("cost/unit_seconds"), is_cost("val/acc")
        (True, False)
    """
    return name.startswith(f"{UNIT_SECONDS.group}/")


def metric_groups() -> frozenset[str]:
    """First parts of the recorded names that a result may hold.

    Whatever the strategy, and over all tasks.
    """
    groups = {TRAIN, VAL, TEST, HELD_OUT, _OOD.rstrip("/"), _ID.rstrip("/"), _BEST.rstrip("/")}
    groups |= {quantity.group for quantity in QUANTITIES if quantity not in (GAIN, GAIN_OOD, REGRET, TRIALS)}
    for task in _TASKS.values():
        groups |= {metric.test_name.partition("/")[0] for metric in task.metrics if metric.test_name is not None}
    return frozenset(groups)
