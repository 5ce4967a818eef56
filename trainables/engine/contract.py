"""The contract between a strategy and the engine.

A strategy says what may move and how it starts; the engine owns seeds, loop, precision, schedule, evaluation,
diagnostics, checkpoints, metric names and failures, so that no strategy can train or log differently from another.

Calls, once per trial and in this order (`trainables.engine.trial.Trial`):

1. `Config(**hparams)`: validated before any compute is spent.
2. `prepare(model, data)`: before step 0, on a fresh copy of the pretrained network with an untrained head.
3. `phases(units)`: the plan of the trial's budget.
4. per phase: `param_groups(model, prepared)`; the groups that the phase names go to a new optimiser, all other
   parameters get `requires_grad = False`. A phase with `solve` has no optimiser: it costs one unit, in which `solve` is
   called.
5. per optimiser step: `extra_loss(model, images, outputs, targets)`, added to the task's loss.
6. `Phase.finish(model, data)`: at the end of a phase's last unit, before that unit is validated.
7. `finalize(model, data, prepared)`: after the best unit's weights were restored, before validation, test and OOD
   evaluation of the result. It leaves a network of the pretrained one's structure, under the same tensor names.
8. `curves(model, data, tuned)`: on the finalized network of the last unit, before WiSE-FT interpolates it; evaluates
   the network at other points and restores every tensor.

At units of `evaluate_at` before the last, 7 happens in between: afterwards the engine restores replaced modules and all
tensors; `finalize` must change nothing else.

A strategy keeps no state between hooks: `prepare` returns it as `Prepared.state`, an argument of `param_groups` and
`finalize`; `finalize` returns it as `Tuned.state`, an argument of `curves`. A resumed trial calls `prepare` again,
which must return the same state for the same seed.

Shapes: images are float32 (B, 3, H, W), already normalised; outputs and targets are those of the task (classification:
logits (B, K), labels int64 (B,)).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from trainables.models.batch_norm import BATCH_NORMS, convert_batch_norm
from trainables.models.low_rank import LowRankUpdate
from trainables.specs.measurements import Report
from trainables.specs.seeds import stream_seed
from trainables.specs.suggestions import did_you_mean
from trainables.specs.trial_spec import PLAIN_LOSS, LossSettings
from trainables.tasks.base import PROBE_RULE, HeadInit, ProbeRule, no_closed_form
from trainables.tasks.registry import task_of

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel
    from trainables.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Hyperparameters of every strategy that trains by gradient.

    A strategy's `Config` extends it and changes defaults. The recipe is that of Ha et al. (2024), "Training Details":
    SGD, momentum 0.9, cosine schedule, no weight decay.
    """

    lr_backbone: float = 3e-3
    """η_θ, learning rate of everything that is not the head."""
    lr_head: float | None = None
    """η_w, learning rate of the head; None = η_w = η_θ exactly (absolute, as FT and LP-FT in Ha et
    al., 2024)."""
    head_rate: Literal["relative", "absolute"] = "relative"
    """relative: the optimiser gets `lr_head / mean ‖φ‖²`, φ the pretrained pooled features of training images, so
    that one range of `lr_head` fits backbones whose feature scales differ; the bias, whose input is 1, never gets more
    than `lr_head` itself. absolute: `lr_head` as it is."""
    head_init: Literal["auto", "random", "zeros", "linear_probe"] = "random"
    """auto = zeros; random where the head has several layers, which at zero would have no gradient."""
    probe_rule: ProbeRule = PROBE_RULE
    """By which C of a head from `head_init: linear_probe` is chosen, see `trainables.tasks.base.ProbeRule`."""
    bn_mode: Literal["train", "eval"] = "train"
    """Whether BatchNorm layers use and update batch statistics while training, or keep the pretrained ones."""
    bn_conversion: bool = False
    """Convert BatchNorm to target statistics before training (Ha et al., 2024, eq. 3-5)."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """Of every phase: cosine (Loshchilov and Hutter, 2017), poly = (1 − step/steps)^0.9 (Chen et al., 2018), or
    constant."""
    warmup: float = 0.0
    """Share of a phase's steps over which the rates rise linearly from zero."""
    clip_norm: float | None = None
    """Maximum gradient norm over all trained parameters; None = no clipping."""
    label_smoothing: float = 0.0
    wise: float | Literal["sweep"] | None = None
    """WiSE-FT (Wortsman et al., CVPR 2022): θ_start + α·(θ_tuned − θ_start) in place of the tuned weights. A number is
    α; sweep = the best α in 0, 0.1 … 1 on ID validation; None = tuned weights as they are."""

    def __post_init__(self) -> None:
        positive_or_none = {"lr_backbone": self.lr_backbone, "lr_head": self.lr_head, "clip_norm": self.clip_norm}
        for name, value in positive_or_none.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, but got {value!r}.")
        for name in ("momentum", "warmup", "label_smoothing"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"0 <= {name} < 1 must hold, but got {value!r}.")
        if not (self.wise is None or self.wise == "sweep" or _is_share(self.wise)):
            raise ValueError(f"wise must be 'sweep', a number from 0 to 1, or nothing, but got {self.wise!r}.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay cannot be negative, but got {self.weight_decay!r}.")
        check_choices(self)


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that move together at one learning rate."""

    name: str
    """"head", "backbone", or a strategy's own name; phases select groups by it."""
    parameters: Sequence[nn.Parameter]
    lr: float
    """The rate as sampled, before `relative` is resolved."""
    relative: bool = False
    """Divide `lr` by the mean squared norm of the pretrained training features."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a trial's budget with one set of moving parameters."""

    name: str
    units: int
    groups: frozenset[str] | None = None
    """Names of the groups of `param_groups` that move; None = all."""
    solve: Callable[[TaskModel, TrialData], Report] | None = None
    """Closed-form step instead of gradient steps; returns metrics to record. Costs `units` = 1."""
    finish: Callable[[TaskModel, TrialData], Report] | None = None
    """Called once at the end of the phase's last unit, before its validation; returns metrics of that unit."""


@dataclass(frozen=True)
class Prepared:
    """Result of `Strategy.prepare`."""

    report: Report = field(default_factory=dict)
    """Metrics to record once."""
    state: Any = None
    """Given to `param_groups` and `finalize`."""


@dataclass(frozen=True)
class Tuned:
    """Result of `Strategy.finalize`."""

    report: Report = field(default_factory=dict)
    """Metrics to record once."""
    state: Any = None
    """Given to `curves`."""
    merged: LowRankUpdate | None = None
    """Low-rank update that was merged into the network; kept in place of the merged weights."""


class Strategy:
    """One way of fine-tuning.

    Subclasses override the hooks that they need; all have a working default.
    """

    Config: ClassVar[type[Any]] = TrainingConfig
    needs: ClassVar[frozenset[str]] = frozenset()
    """Layer kinds without which the strategy means nothing ("layer_norm", "batch_norm", "attention",
    "transformer_block"); checked at plan time."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Packages that the strategy imports beside Luthier's own: import name → the extra of Luthier that brings it."""
    measures: ClassVar[frozenset[str]] = frozenset()
    """Diagnostics (`trainables.specs.trial_spec.DIAGNOSTICS`) measured whatever the study asks for."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> Strategy:
        """Build the strategy from a plain dict.

        Raises:
            ValueError: an unknown key (the message gives the nearest one), or a value that the `Config` refuses.
        """
        names = [f.name for f in dataclasses.fields(cls.Config)]
        for key in hparams:
            if key not in names:
                hint = did_you_mean(key, names)
                raise ValueError(f"{cls.name()} has no hyperparameter {key!r}.{hint} It has {', '.join(names)}.")
        return cls(cls.Config(**hparams))

    @classmethod
    def for_task(cls, task: type[Task]) -> type[Strategy]:
        """The class that means this strategy for a task, of the same file. Default: this one."""
        return cls

    @classmethod
    def name(cls) -> str:
        """The strategy's public name: the stem of its file."""
        return cls.__module__.rpartition(".")[2]

    def solves_in_closed_form(self) -> str | None:
        """Part of the configuration that needs the task's closed-form probe.

        For messages; None = no part. Default: `head_init: linear_probe`.
        """
        if getattr(self.config, "head_init", None) == "linear_probe":
            return "head_init='linear_probe'"
        return None

    @property
    def starts_at_optimum(self) -> bool:
        """Whether training starts from a head that is solved in closed form.

        Early stopping then waits for the second rung, see `orchestrator.search.grace`. Default: `head_init:
        linear_probe`, where anything trains.
        """
        return getattr(self.config, "head_init", None) == "linear_probe"

    def refit_problem(self) -> str | None:
        """What keeps the configuration from being trained again without validation images; None = nothing.

        A strategy that chooses something on validation, where `data.has_validation` is false, takes over the choice of
        an earlier trial from `data.recorded_choice`.
        """
        return None

    def prepare(self, model: TaskModel, data: TrialData) -> Prepared:
        """Freeze, inject, convert, initialise the head.

        Default: `bn_conversion`, then `head_init` of a `TrainingConfig` (a conversion leaves the function, and so the
        probe, as they were)."""
        config = self.config
        if not isinstance(config, TrainingConfig):
            return Prepared()
        # Before the head: a conversion preserves the features, and so a probe solved on cached ones still fits.
        report = convert_on_training_data(model, data) if config.bn_conversion else {}
        head = task_of(data).initialise_head(model, data, _head_init(config, model), config.probe_rule)
        return Prepared({**report, **head})

    def param_groups(self, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
        """Exactly what may move.

        Default: backbone and head, each at its own rate. If nothing is selected, the engine raises an error.

        Args:
            prepared: state that `prepare` returned.
        """
        return [
            ParamGroup("backbone", list(model.backbone.parameters()), self.config.lr_backbone),
            self.head_group(model),
        ]

    def moving_parameters(self, model: TaskModel) -> int:
        """Number of parameters that training changes, at most.

        From structure alone: the size of kept weights at plan time. Default: those of `param_groups` before `prepare`,
        and those of BatchNorm where it is converted.

        Args:
            model: its tensors may be on the meta device.
        """
        # By identity: a BatchNorm parameter that is in a group as well counts once.
        moving = {id(p): p.numel() for group in moving_groups(self, model) for p in group.parameters}
        if getattr(self.config, "bn_conversion", False):
            layers = [module for module in model.backbone.modules() if isinstance(module, BATCH_NORMS)]
            moving |= {id(p): p.numel() for module in layers for p in module.parameters(recurse=False)}
        return sum(moving.values())

    def head_group(self, model: TaskModel) -> ParamGroup:
        """The head at η_w, or at η_θ where the configuration has none."""
        config = self.config
        parameters = list(model.head.parameters())
        if config.lr_head is None:
            return ParamGroup("head", parameters, config.lr_backbone)
        return ParamGroup("head", parameters, config.lr_head, relative=config.head_rate == "relative")

    def phases(self, units: int) -> list[Phase]:
        """How the budget of `units` is spent. Default: one phase in which all groups move."""
        return [Phase("train", units)]

    def extra_loss(self, model: TaskModel, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """A scalar to add to the task's loss, or None."""
        return None

    def finalize(self, model: TaskModel, data: TrialData, prepared: Any = None) -> Tuned:
        """Post-step on the tuned model: rescale by λ, merge adapters.

        Args:
            prepared: state that `prepare` returned.
        """
        return Tuned()

    def curves(self, model: TaskModel, data: TrialData, tuned: Any = None) -> Report:
        """Measurements by evaluation alone, such as accuracy over λ.

        Every tensor is left as it was.

        Args:
            tuned: state that `finalize` returned.
        """
        return {}


def _head_init(config: TrainingConfig, model: TaskModel) -> HeadInit:
    if config.head_init != "auto":
        return config.head_init
    layers = [m for m in model.head.modules() if any(True for _ in m.parameters(recurse=False))]
    return "random" if len(layers) > 1 else "zeros"


def moving_groups(strategy: Strategy, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
    """The strategy's groups, without parameters that the outputs do not depend on (`TaskModel.unused`)."""
    groups = strategy.param_groups(model, prepared)
    if not model.unused:
        return groups
    unused = {id(parameter) for name, parameter in model.named_parameters() if name in model.unused}
    return [
        dataclasses.replace(group, parameters=[p for p in group.parameters if id(p) not in unused]) for group in groups
    ]


def check_task(
    strategy: Strategy, task: type[Task], loss: LossSettings = PLAIN_LOSS, decoder: str | None = None
) -> None:
    """Refuse a configuration that means nothing for a task, before anything is computed.

    Raises:
        ValueError: it solves in closed form, smooths labels, weights classes, is focal, has a Dice term or chooses a
            decoder, which the task cannot.
    """
    asked = strategy.solves_in_closed_form()
    if asked is not None and task.closed_form_probe() is None:
        raise ValueError(no_closed_form(task.name(), asked))
    # The Config of a strategy without gradient steps need not have the field.
    smoothing = getattr(strategy.config, "label_smoothing", 0.0)
    if smoothing and not task.label_smoothing:
        raise ValueError(
            f"label_smoothing needs a task whose loss knows it, but {task.name()!r} does not, and got {smoothing!r}. "
            "Leave it out."
        )
    abilities = {
        "loss.label_smoothing": (loss.label_smoothing, task.label_smoothing),
        "loss.class_weights": (loss.class_weights, task.class_weights),
        "loss.focal_gamma": (loss.focal_gamma, task.focal),
        "loss.dice": (loss.dice, task.dice),
    }
    for name, (value, able) in abilities.items():
        if value is not None and not able:
            raise ValueError(
                f"{name} needs a task whose loss has it, but {task.name()!r} has not, and got {value!r}. Leave it out."
            )
    if decoder is not None and decoder not in task.decoders:
        raise ValueError(
            f"model.decoder is one of {', '.join(task.decoders)} for the task {task.name()!r}, but got {decoder!r}."
            if task.decoders
            else f"model.decoder needs a task with decoders, but {task.name()!r} has none, and got {decoder!r}. Leave "
            "it out."
        )


def check_loss(strategy: Strategy, loss: LossSettings, sampling: str | None, schedule: str | None = None) -> None:
    """Refuse settings of loss, batches and schedule that a strategy cannot honour, before anything is computed.

    Raises:
        ValueError: it has no gradient steps and the settings change these, or it smooths labels or has a schedule by
            itself.
    """
    smoothing = getattr(strategy.config, "label_smoothing", 0.0)
    if loss.label_smoothing is not None and smoothing:
        raise ValueError(
            f"Label smoothing is set once, but {strategy.name()} has label_smoothing {smoothing!r} and the study "
            f"loss.label_smoothing {loss.label_smoothing!r}. Leave one of the two out."
        )
    if loss.focal_gamma is not None and smoothing:
        raise ValueError(
            f"The focal loss is defined for one right class, but {strategy.name()} has label_smoothing {smoothing!r} "
            f"and the study loss.focal_gamma {loss.focal_gamma!r}. Leave one of the two out."
        )
    if isinstance(strategy.config, TrainingConfig):
        default = next(f.default for f in dataclasses.fields(strategy.config) if f.name == "schedule")
        if schedule is not None and strategy.config.schedule not in (default, schedule):
            raise ValueError(
                f"The schedule is set once, but {strategy.name()} has schedule {strategy.config.schedule!r} and the "
                f"study search.schedule {schedule!r}. Leave one of the two out."
            )
        return
    trained_only = {
        "loss.label_smoothing": (loss.label_smoothing, "Leave one of the two out."),
        "loss.focal_gamma": (loss.focal_gamma, "Leave one of the two out, or use loss.class_weights: balanced."),
        "data.sampling": (sampling, "Leave one of the two out, or use loss.class_weights: balanced."),
    }
    for name, (value, way) in trained_only.items():
        if value is not None:
            raise ValueError(
                f"{name} needs a strategy that trains by gradient, but {strategy.name()} solves in closed form, and "
                f"got {value!r}. {way}"
            )


def check_refit(strategy: Strategy) -> None:
    """Refuse a configuration that cannot be trained again without validation images, before anything is computed.

    Raises:
        ValueError: see `Strategy.refit_problem`.
    """
    problem = strategy.refit_problem()
    if problem is not None:
        raise ValueError(
            f"A refit takes over what validation chose, as one recorded number each, but {strategy.name()} with "
            f"{problem}. Export the trial's own weights, without a refit."
        )


def _is_share(value: object) -> bool:
    # `bool` is an `int`: `wise: true` would count as α = 1.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def check_choices(config: Any) -> None:
    """Raise ValueError where a field declared as `Literal[…]` holds another value."""
    for name, allowed in _literal_fields(type(config)):
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}.")


def _literal_fields(cls: type[Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    # Resolved: with postponed evaluation, `dataclasses.fields` has the hints as strings.
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) is Literal:
            yield name, typing.get_args(hint)


def convert_on_training_data(model: TaskModel, data: TrialData) -> dict[str, float]:
    """Convert the BatchNorm of a trial's backbone; returns metrics.

    On its training batches, augmented as in training. The stored order is stratified, so that every batch is a fair
    sample.
    """
    shared = data.spec.shared
    seed = stream_seed(data.spec.seed, "bn_conversion") if shared.augment else None
    batches = (images for images, _ in data.batches("train", batch_size=shared.batch_size, augment_seed=seed))
    # By what the task reads of the backbone: layers that it does not reach keep their statistics.
    return convert_batch_norm(model.backbone, batches, model.features).metrics()
