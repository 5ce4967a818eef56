"""The contract between a strategy and everything around it.

A strategy says *what may move and how it starts*; the base owns seeds, loop, precision, schedule, evaluation,
diagnostics, checkpoints, metric names and failures, so that no strategy can train or log differently from another.
Who calls what, when (`trainables.engine.trial.Run`, once per trial and in this order):

1. `Config(**hparams)`: validated before any compute is spent.
2. `prepare(model, data)`: once, before step 0, on a fresh copy of the pretrained network with an untrained head.
3. `phases(units)`: once; the plan of the trial's budget.
4. per phase: `param_groups(model)`; the groups that the phase names go to a new optimiser, all other parameters get
   `requires_grad = False`. A phase with `solve` has no optimiser: it costs one unit, in which `solve` is called.
5. per optimiser step: `extra_loss(model, images, logits, labels)`, added to the cross-entropy.
6. `Phase.finish(model, data)`: at the end of a phase's last unit, before that unit is validated.
7. `finalize(model, data)`: once, after the best unit's weights were put back, before validation, test and OOD
   evaluation of the result. It leaves a network of the pretrained one's structure, under the same tensor names. (At
   units of `task.evaluate_at` before the last, the same happens to a copy of model and strategy, which is thrown away.)
8. `curves(model, data)`: once, on the finalised network of the last unit, before WiSE interpolates it; evaluates the
   network at other points and puts every tensor back.

Shapes: images are float32 (B, 3, H, W), already normalised; logits (B, K); labels int64 (B,).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from trainables.models.batch_norm import convert_batch_norm
from trainables.specs.measurements import Report
from trainables.specs.seeds import stream_seed
from trainables.tasks.linear_probe_head import initialise_head

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Classifier


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Knobs that every gradient-trained strategy has; a strategy's own `Config` extends it and changes defaults.

    The recipe is that of the papers' tables: SGD, momentum 0.9, cosine schedule, no weight decay
    (papers/002, "Training Details").
    """

    lr_backbone: float = 3e-3
    """η_θ, learning rate of everything that is not the head."""
    lr_head: float | None = None
    """η_w, learning rate of the head; None = η_w = η_θ exactly (absolute, as FT and LP-FT of papers/002)."""
    head_rate: Literal["relative", "absolute"] = "relative"
    """relative: the optimiser gets `lr_head / mean ‖φ‖²`, φ the pretrained pooled features of training images, so
    that one range of `lr_head` fits backbones whose feature scales differ; the bias, whose input is 1, never gets more
    than `lr_head` itself. absolute: `lr_head` as it is."""
    head_init: Literal["random", "zeros", "linear_probe"] = "random"
    bn_mode: Literal["train", "eval"] = "train"
    """Whether BatchNorm layers use and update batch statistics while training, or keep the pretrained ones."""
    bn_conversion: bool = False
    """Convert BatchNorm to target statistics before training (papers/002, eq. 3-5)."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.0
    """Share of a phase's steps over which the rates rise linearly from zero."""
    clip_norm: float | None = None
    """Gradient norm limit over all trained parameters; None = no clipping."""
    label_smoothing: float = 0.0
    wise: float | Literal["sweep"] | None = None
    """WiSE-FT (Wortsman et al., CVPR 2022): θ_start + α·(θ_tuned − θ_start) in place of the tuned weights. A number is
    α; sweep = the best α in 0, 0.1 … 1 on ID validation; None = tuned weights as they are."""

    def __post_init__(self) -> None:
        positive = {"lr_backbone": self.lr_backbone, "lr_head": self.lr_head, "clip_norm": self.clip_norm}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, but got {value!r}.")
        for name in ("momentum", "warmup", "label_smoothing"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"0 <= {name} < 1 must hold, but got {value!r}.")
        if self.wise is not None and self.wise != "sweep" and not (_number(self.wise) and 0 <= float(self.wise) <= 1):
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
    solve: Callable[[Classifier, TrialData], Report] | None = None
    """Closed-form step instead of gradient steps; returns metrics to record. Costs `units` = 1."""
    finish: Callable[[Classifier, TrialData], Report] | None = None
    """Called once at the end of the phase's last unit, before its validation; returns metrics of that unit."""


class Strategy:
    """One way of fine-tuning. Subclasses override the hooks that they need; all have a working default."""

    Config: ClassVar[type[Any]] = TrainingConfig
    needs: ClassVar[frozenset[str]] = frozenset()
    """Layer kinds without which the strategy means nothing ("layer_norm", "batch_norm", "attention",
    "transformer_block"); checked at plan time."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Packages that the strategy imports beside Luthier's own: import name → the extra of Luthier that brings it."""
    measures: ClassVar[frozenset[str]] = frozenset()
    """Diagnostics (`trainables.specs.trial_spec.DIAGNOSTICS`) measured whatever the task asks for."""
    identity_at_start: ClassVar[bool] = True
    """Whether the pooled features right after `prepare` are those of the pretrained network (to rounding)."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> Strategy:
        """Build the strategy from a plain dict; an unknown key is an error that names the nearest one."""
        known = [f.name for f in dataclasses.fields(cls.Config)]
        for key in hparams:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{cls.name()} has no hyperparameter {key!r}.{hint} It has {', '.join(known)}.")
        return cls(cls.Config(**hparams))

    @classmethod
    def name(cls) -> str:
        """The strategy's public name: the stem of its file."""
        return cls.__module__.rpartition(".")[2]

    def prepare(self, model: Classifier, data: TrialData) -> Report:
        """Freeze, inject, convert, initialise the head; returns metrics to record once (may be empty).

        Default: what `bn_conversion` and `head_init` of a `TrainingConfig` say, in this order (a conversion leaves the
        function, and so the probe, as they were)."""
        if not isinstance(self.config, TrainingConfig):
            return {}
        report = convert_on_training_data(model, data) if self.config.bn_conversion else {}
        return {**report, **initialise_head(model, data, self.config.head_init)}

    def param_groups(self, model: Classifier) -> list[ParamGroup]:
        """Exactly what may move. Default: backbone and head, each at its own rate. Nothing selected is an error
        that the base raises."""
        config = self.config
        own_rate = config.lr_head is not None
        return [
            ParamGroup("backbone", list(model.backbone.parameters()), config.lr_backbone),
            ParamGroup(
                "head",
                list(model.head.parameters()),
                config.lr_head if own_rate else config.lr_backbone,
                relative=own_rate and config.head_rate == "relative",
            ),
        ]

    def phases(self, units: int) -> list[Phase]:
        """How the budget of `units` is spent. Default: one phase in which all groups move."""
        return [Phase("train", units)]

    def extra_loss(self, model: Classifier, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor | None:
        """A scalar to add to the cross-entropy, or None."""
        return None

    def finalize(self, model: Classifier, data: TrialData) -> Report:
        """Post-step on the tuned model (λ, merging); returns metrics to record once (may be empty)."""
        return {}

    def curves(self, model: Classifier, data: TrialData) -> Report:
        """What can be learned from the finalised model by evaluation alone, such as accuracy over λ; every tensor is
        left as it was found."""
        return {}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_choices(config: Any) -> None:
    """Raise ValueError where a field declared as `Literal[…]` holds another value."""
    for name, allowed in _literal_fields(type(config)):
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}.")


def _literal_fields(cls: type[Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    import typing

    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) is Literal:
            yield name, typing.get_args(hint)


def convert_on_training_data(model: Classifier, data: TrialData) -> dict[str, float]:
    """Convert a trial's backbone on its training batches, augmented as in training (the stored order is stratified, so
    that every batch is a fair sample); returns the report's metrics."""
    task = data.spec.task
    seed = stream_seed(data.spec.seed, "bn_conversion") if task.augment else None
    batches = (images for images, _ in data.batches("train", batch_size=task.batch_size, augment_seed=seed))
    return convert_batch_norm(model.backbone, batches).metrics()
