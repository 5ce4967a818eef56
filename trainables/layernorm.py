"""LayerNorm tuning (Tan et al., 2025): γ, β and the head train.
λ rescales how far γ moved, also in cycles.

Label information goes to the head, domain information to the norms. λ costs no training: one tuned network is
evaluated at γ_S + λ·(γ_T − γ_S). β converges sooner than γ and keeps its tuned value unless `rescale: both`. Which
layers count as LayerNorm: `trainables.diagnostics.norm_shift.LAYER_NORMS`.

Choices in the cyclic framework, which the paper leaves open: the head phases train by gradient, from the head as it is,
on features of the network as it is, computed once per phase; a probe solved anew would choose a regularisation on
validation in every cycle and throw away the head that the norms were tuned for (`head_init: linear_probe` starts from a
closed solution). λ scales the distance from the pretrained γ, not from the last cycle's, so λ ≠ 1 compounds. Each phase
has an optimiser and a schedule of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trainables.diagnostics.norm_shift import layer_norms
from trainables.engine.best_weights import put_back, take
from trainables.engine.contract import ParamGroup, Phase, Prepared, Strategy, TrainingConfig, Tuned
from trainables.engine.evaluation import final_scores, validation_scores
from trainables.engine.weight_interpolation import (
    LAMBDA_GRID,
    Rescale,
    best_lambda,
    fitted,
    grid_scores,
    rescale_layer_norm,
    scaled_names,
)
from trainables.models.transformer_blocks import find_blocks
from trainables.specs.measurements import Curve, Report
from trainables.specs.metrics import LAYERNORM_LAMBDA, LAYERNORM_VAL_AT_ONE
from trainables.tasks.registry import task_of

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel

__all__ = ["LAMBDA_GRID", "LayerNorm", "rescale_layer_norm"]


class LayerNorm(Strategy):
    """Trains the norms' γ and β with the head.

    Everything else stays bit for bit as pretrained.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"layer_norm"})

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """Hyperparameters of LayerNorm tuning; the recipe of `TrainingConfig` otherwise."""

        lr_backbone: float = 0.1
        """Learning rate of γ and β."""
        bn_mode: Literal["train", "eval"] = "eval"
        """eval = where the network has BatchNorm as well, its statistics stay the pretrained ones."""
        norms: Literal["all", "attention"] = "all"
        """all = every norm, the final one included; attention = the norm before each block's attention."""
        train: Literal["both", "gamma", "beta"] = "both"
        rescale: Rescale = "gamma"
        """What λ scales: γ alone (β keeps its tuned value), or both."""
        lam: float = 1.0
        """λ where `lam_choice` is fixed."""
        lam_choice: Literal["fixed", "sweep", "learned"] = "fixed"
        """fixed = `lam`; sweep = the best of 21 values from 0 to 2 on ID validation; learned = fitted by gradient on ID
        validation, in the same range, with everything else frozen."""
        lam_scope: Literal["global", "layer"] = "global"
        """Of a learned λ: one for all layers, or one per layer; the metric `layernorm/lambda` is then their mean."""
        cycles: int = 0
        """0 = norms and head together; C ≥ 1 = C cycles of head alone, norms alone, rescaling by λ."""
        head_share: float = 0.25
        """Share of a cycle's units that the head gets (at least one)."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if isinstance(self.cycles, bool) or not isinstance(self.cycles, int) or self.cycles < 0:
                raise ValueError(f"cycles must be a whole number of at least 0, but got {self.cycles!r}.")
            if not 0 < self.head_share < 1:
                raise ValueError(f"0 < head_share < 1 must hold, but got {self.head_share!r}.")
            if not (isinstance(self.lam, int | float) and math.isfinite(self.lam) and self.lam >= 0):
                raise ValueError(f"lam must be a finite number of at least 0, but got {self.lam!r}.")
            if self.train == "beta" and self.rescale == "gamma" and (self.lam != 1 or self.lam_choice != "fixed"):
                raise ValueError(
                    "train='beta' leaves γ where it was, so that rescale='gamma' has nothing to scale. Use "
                    "rescale='both', or leave lam and lam_choice out."
                )
            if self.lam_scope == "layer" and self.lam_choice != "learned":
                raise ValueError(
                    f"lam_scope='layer' needs lam_choice='learned', but got {self.lam_choice!r}. Leave lam_scope out, "
                    "or learn λ."
                )

    def param_groups(self, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
        """The chosen parameters of the norms at η_θ, the head at η_w.

        Raises:
            ValueError: the choice selects nothing in this network.
        """
        kinds = {"both": ("weight", "bias"), "gamma": ("weight",), "beta": ("bias",)}[self.config.train]
        layers = layer_norms(model)
        if self.config.norms == "attention":
            layers = _attention_norms(model, layers)
        moving = [p for m in layers.values() for k, p in m.named_parameters(recurse=False) if k in kinds]
        if not moving:
            raise ValueError(
                f"LayerNorm tuning must train something, but norms={self.config.norms!r} with "
                f"train={self.config.train!r} selects nothing in this network."
            )
        return [ParamGroup("norms", moving, self.config.lr_backbone), self.head_group(model)]

    def phases(self, units: int) -> list[Phase]:
        """One phase, or per cycle: head, then norms, which λ rescales at the end."""
        cycles = self.config.cycles
        if not cycles:
            return [Phase("train", units)]
        if units < 2 * cycles:
            raise ValueError(
                f"{cycles} cycles of head and norms take at least {2 * cycles} units, but the trial has {units}. Give "
                "it more epochs, or fewer cycles."
            )
        phases = []
        for cycle in range(cycles):
            # Cumulative division: the cycles' shares sum to `units` and differ by at most one.
            share = units * (cycle + 1) // cycles - units * cycle // cycles
            # At least one unit for either: a share is at least 2 here, because units >= 2 · cycles.
            head = min(share - 1, max(1, round(share * self.config.head_share)))
            phases.append(Phase(f"head {cycle + 1}", head, groups=frozenset({"head"})))
            norms = frozenset({"norms"})
            phases.append(Phase(f"norms {cycle + 1}", share - head, groups=norms, finish=self._finish_cycle))
        return phases

    def prepare(self, model: TaskModel, data: TrialData) -> Prepared:
        """Check that the network has LayerNorms, before anything is trained."""
        scaled_names(model, "both")
        return super().prepare(model, data)

    def finalize(self, model: TaskModel, data: TrialData, prepared: Any = None) -> Tuned:
        """Choose λ and rescale.

        In the cyclic framework that has happened at the end of each cycle.
        """
        return Tuned() if self.config.cycles else self._rescale(model, data)

    def curves(self, model: TaskModel, data: TrialData, tuned: Any = None) -> Report:
        """Of a sweep: validation, test and OOD over the grid of λ.

        λ = 1 is the tuned network before its rescaling; in the cyclic framework, whose rescaled norms were trained on,
        it is the finished network.

        Args:
            tuned: a `Rescaled`; None in the cyclic framework.
        """
        if self.config.lam_choice != "sweep":
            return {}
        source = source_norms(model, data)
        finished = take(model, source)
        scores: Mapping[float, Mapping[str, float]] = {}
        if tuned is not None:
            put_back(model, tuned.norms)
            scores = tuned.scores
        at_one = take(model, source)
        rows = []
        for lam in LAMBDA_GRID:
            rescale_layer_norm(model, source, lam, self.config.rescale)
            # The sweep has validated every λ already; in the cyclic framework that was before later cycles.
            validation = scores.get(lam) or validation_scores(model, data)
            rows.append({"lambda": lam, **validation, **final_scores(model, data)})
            # Every λ starts from the tuned norms: rescaling what is rescaled already would compound.
            put_back(model, at_one)
        put_back(model, finished)
        note = f"λ is chosen on {task_of(data).metrics.validation}."
        return {"lambda": Curve({name: [row[name] for row in rows] for name in rows[0]}, note)}

    def _finish_cycle(self, model: TaskModel, data: TrialData) -> Report:
        return self._rescale(model, data).report

    def _rescale(self, model: TaskModel, data: TrialData) -> Tuned:
        config = self.config
        metrics = task_of(data).metrics
        source = source_norms(model, data)
        norms = take(model, source)
        scores: dict[float, dict[str, float]] = {}
        lam: float | Tensor = config.lam
        if config.lam_choice == "sweep":
            scores = grid_scores(model, data, source, config.rescale)
            lam = best_lambda(scores, metrics)
        elif config.lam_choice == "learned":
            lam = fitted(model, data, source, config.rescale, config.lam_scope == "layer")
        # Before rescaling: what λ = 1 scores is the value that the chosen λ is compared with.
        at_one = scores.get(1.0) or validation_scores(model, data)
        rescale_layer_norm(model, source, lam, config.rescale)
        values = torch.as_tensor(lam, dtype=torch.float64).reshape(-1)
        report: dict[str, float | Curve] = {
            LAYERNORM_LAMBDA.name: float(values.mean()),
            LAYERNORM_VAL_AT_ONE.of(metrics.selection.key): at_one[metrics.validation],
        }
        if config.lam_scope == "layer":
            columns: dict[str, Sequence[float | str | None]] = {
                "layer": list(layer_norms(model)),
                "lambda": values.tolist(),
            }
            report["layernorm_lambda"] = Curve(columns, "λ fitted on ID validation.")
        return Tuned(report, Rescaled(norms, scores))


@dataclass(frozen=True)
class Rescaled:
    """By-products of a rescaling, for the curve over λ."""

    norms: Mapping[str, Tensor]
    """The norms' tensors before it."""
    scores: Mapping[float, Mapping[str, float]]
    """λ → validation scores, where a sweep measured them."""


def source_norms(model: TaskModel, data: TrialData) -> dict[str, Tensor]:
    """The pretrained tensors of every LayerNorm, by the model's names."""
    pretrained = data.reference.state_dict()
    names = [name for group in scaled_names(model, "both").values() for name in group]
    return {name: pretrained[name.removeprefix("backbone.")] for name in names}


def _attention_norms(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    before_attention = {id(inner) for block in find_blocks(model) for inner in block.ln1.modules()}
    return {name: layer for name, layer in layers.items() if id(layer) in before_attention}


STRATEGY = LayerNorm
