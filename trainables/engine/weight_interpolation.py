"""Weights between two networks: λ for LayerNorms, α of WiSE-FT for the whole network.

λ scales how far tuning moved the LayerNorms from the pretrained ones: γ_S + λ·(γ_T − γ_S) (Tan et al., 2025). It costs
no training: one tuned network is evaluated at several λ, and ID validation chooses.

WiSE-FT (Wortsman et al., 2022) interpolates between the weights that training started from and the tuned ones. The
start is the network after `prepare`: DAFT's converted BatchNorm, and the head as it began (the paper starts from a head
that classifies already, so that α = 0 means something: use `head_init: linear_probe`, or lp_ft). Statistics of
BatchNorm are interpolated like weights; integer buffers keep their tuned value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from trainables.diagnostics.norm_shift import layer_norms
from trainables.engine.best_weights import put_back, take
from trainables.engine.evaluation import final_scores, validation_scores
from trainables.models.micro_batch import MicroBatch
from trainables.models.precision import autocast, resolve_precision
from trainables.specs.measurements import Curve, Report
from trainables.specs.metrics import VAL, WISE_ALPHA
from trainables.tasks.registry import task_of

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel
    from trainables.specs.metrics import TaskMetrics


LAMBDA_GRID = tuple(round(0.1 * k, 1) for k in range(21))
"""λ of a sweep: 0 (the source's γ) to 2 (twice the learned shift), 1 among them. Tan et al. (2025) give no range, only
that λ < 1 and λ > 1 both occur. On the digits at 2, 5, 10 and 100 % of the training images, two rates and two seeds, a
grid from 0 to 5 had its best validation accuracy at 2.0 once and below that otherwise."""
FIT_PASSES = 25
"""Passes over the validation split after which learning λ starts no further search along a line."""

Rescale = Literal["gamma", "both"]
"""What λ scales: γ alone, so that β keeps its tuned value, or both."""


@torch.no_grad()
def rescale_layer_norm(
    model: nn.Module, source_state: Mapping[str, Tensor], lam: float | Tensor, rescale: Rescale = "gamma"
) -> None:
    """Scale every LayerNorm's shift by λ, in place (Tan et al., 2025).

    γ ← γ_S + λ·(γ_T − γ_S); with `both`, β likewise. λ = 1 leaves every bit as it is, λ = 0 restores the source's bits.

    Args:
        model: the tuned network.
        source_state: source tensors by the names of `model.state_dict()`.
        lam: one λ for all layers, or a tensor (L,) of one per layer in the order of the network.

    Raises:
        ValueError: λ is not finite or not one per layer, `rescale` is neither of the two, the network has no LayerNorm,
            or the source lacks one of its tensors or has it in another shape. The model is as it was then.
    """
    names = scaled_names(model, rescale)
    values = torch.as_tensor(lam, dtype=torch.float64).reshape(-1).tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError(f"λ must be finite, but got {lam!r}.")
    if len(values) not in (1, len(names)):
        raise ValueError(f"λ is one number, or one for each of the {len(names)} LayerNorms, but got {len(values)}.")
    parameters = dict(model.named_parameters())
    # All of them before the first is written, so that an error leaves the model as it was.
    for name in (name for group in names.values() for name in group):
        _check_source(name, parameters[name], source_state)
    for group, value in zip(names.values(), values * (len(names) // len(values)), strict=True):
        for name in group:
            tuned, source = parameters[name], source_state[name].to(parameters[name].device)
            # The ends are exact: s + 1·(t − s) may round to other bits than t's.
            if value == 0:
                tuned.copy_(source)
            elif value != 1:
                tuned.copy_(source + value * (tuned - source))


def scaled_names(model: nn.Module, rescale: Rescale) -> dict[str, list[str]]:
    """Layer → names of its parameters that λ scales.

    Raises:
        ValueError: the network has no LayerNorm, or `rescale` is neither of the two.
    """
    if rescale not in get_args(Rescale):
        raise ValueError(f"rescale must be one of {', '.join(map(repr, get_args(Rescale)))}, but got {rescale!r}.")
    kinds = {"gamma": ("weight",), "both": ("weight", "bias")}[rescale]
    names: dict[str, list[str]] = {}
    for layer, module in layer_norms(model).items():
        prefix = f"{layer}." if layer else ""
        scaled = [kind for kind, _ in module.named_parameters(recurse=False) if kind in kinds]
        names[layer] = [f"{prefix}{kind}" for kind in scaled]
    if not names:
        raise ValueError(
            "LayerNorm tuning needs a network with LayerNorm, but this one has none. For BatchNorm networks use daft, "
            "which adapts BatchNorm to the target data."
        )
    return names


def grid_scores(
    model: TaskModel, data: TrialData, source: Mapping[str, Tensor], rescale: Rescale
) -> dict[float, dict[str, float]]:
    """λ → validation scores over `LAMBDA_GRID`, one pass per value. The model is left unchanged."""
    tuned = take(model, source)
    scores = {}
    for lam in LAMBDA_GRID:
        rescale_layer_norm(model, source, lam, rescale)
        scores[lam] = validation_scores(model, data)
        # From a copy, not by inverting the rescaling, which would round.
        put_back(model, tuned)
    return scores


def best_lambda(scores: Mapping[float, Mapping[str, float]], metrics: TaskMetrics) -> float:
    """The best λ on validation.

    Ties go to the better tie-breaker, then to the λ nearest to 1.

    Example:
        >>> from trainables.specs.metrics import CLASSIFICATION
        >>> scores = {0.5: {"val/acc": 0.9, "val/nll": 0.3}, 1.0: {"val/acc": 0.9, "val/nll": 0.3}}
        >>> best_lambda(scores, CLASSIFICATION)
        1.0
    """
    return max(scores, key=lambda lam: (*validation_order(scores[lam], metrics), -abs(lam - 1)))


def validation_order(scores: Mapping[str, float], metrics: TaskMetrics) -> tuple[float, float]:
    """Sort key of recorded validation scores: the larger key is the better one."""
    return metrics.order(scores[metrics.validation], scores[metrics.tie_breaker.on(VAL)])


def fitted(
    model: TaskModel, data: TrialData, source: Mapping[str, Tensor], rescale: Rescale, per_layer: bool
) -> Tensor:
    """λ (L,) float64 that minimises the mean loss on ID validation, by gradient.

    In the range of `LAMBDA_GRID`.

    Without the range, λ falls below 0 on scarce data, where the loss of an overconfident network falls with the scale
    of its features while its accuracy suffers (digits, 2 % of the training images: λ = -1.7 to -1.3).

    L-BFGS from λ = 1 on the whole split, so that the result depends on no order, no batch size (to rounding) and no
    random number; of all points looked at the best is taken, so that it is never worse than λ = 1. It ends soon after
    `FIT_PASSES` passes forward and backward, or where λ stands still. The network is in eval mode, everything but λ is
    frozen and left as it was.

    Args:
        per_layer: one λ for every layer (1 where tuning left the layer as it was); False = one for all, repeated.
    """
    loss = _ValidationLoss(model, data, source, rescale, per_layer)
    end = FIT_PASSES
    optimizer = torch.optim.LBFGS(
        [loss.angle],
        max_iter=end,
        max_eval=end,
        tolerance_grad=1e-5,
        tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )
    # One `step` of torch's L-BFGS is a whole minimisation of up to `max_iter` iterations.
    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return loss.best.expand(loss.layers).cpu()


class _ValidationLoss:
    """Mean loss on ID validation and its gradient in `angle`.

    Keeps the best λ that it was evaluated at. λ = 1 + sin(angle) keeps λ in 0 to 2 and reaches both ends. On
    out-of-memory, falls back to micro-batches.
    """

    def __init__(
        self, model: TaskModel, data: TrialData, source: Mapping[str, Tensor], rescale: Rescale, per_layer: bool
    ) -> None:
        self._model = model.eval()
        self._task = task_of(data)
        self._data = data
        self._source = source
        self._micro_batch = MicroBatch()
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._groups = list(scaled_names(model, rescale).values())
        self.layers = len(self._groups)
        size = self.layers if per_layer else 1
        self.angle = torch.zeros(size, device=data.device, dtype=torch.float64, requires_grad=True)
        self.best = self._lam().detach()
        self._best_loss = math.inf

    def __call__(self) -> float:
        total = 0.0
        gradient = torch.zeros_like(self.angle)
        # In training batches: this pass keeps activations for its gradient, as training does.
        for images, targets in self._data.batches(VAL, batch_size=self._data.spec.shared.batch_size):
            attempt = partial(self._sums, images, targets)
            loss, slope = self._micro_batch.attempt(attempt, len(images), "learning λ on")
            total = total + loss
            gradient = gradient + slope
        count = self._data.size(VAL)
        # Summed by hand: each batch's graph is released before the next, where a sum of losses would keep them all.
        self.angle.grad = gradient / count
        if total / count < self._best_loss:
            self.best = self._lam().detach()
            self._best_loss = total / count
        return total / count

    def _sums(self, images: Tensor, targets: Tensor) -> tuple[float, Tensor]:
        """Summed loss of a batch, and its gradient."""
        total = 0.0
        gradient = torch.zeros_like(self.angle)
        dtype = resolve_precision(self._data.spec.shared.precision, self._data.device)
        for piece in self._micro_batch.pieces(len(images)):
            with autocast(self._data.device, dtype):
                inputs = (images[piece], targets[piece])
                # λ enters as a function of the parameters: written into them in place, it would have no gradient.
                outputs = torch.func.functional_call(self._model, self._rescaled(), inputs)
            loss = self._task.loss(outputs, targets[piece], reduction="sum")
            total = total + float(loss.detach())
            gradient = gradient + torch.autograd.grad(loss, self.angle)[0]
        return total, gradient

    def _lam(self) -> Tensor:
        return 1 + self.angle.sin()

    def _rescaled(self) -> dict[str, Tensor]:
        """All tensors of the network, those of the norms as functions of `angle`."""
        values = self._lam().expand(self.layers)
        tensors = dict(self._state)
        for i, names in enumerate(self._groups):
            for name in names:
                tensors[name] = self._source[name] + values[i] * (self._state[name] - self._source[name])
        return tensors


def _check_source(name: str, parameter: Tensor, source_state: Mapping[str, Tensor]) -> None:
    source = source_state.get(name)
    if source is None or source.shape != parameter.shape:
        got = "none" if source is None else f"one of shape {tuple(source.shape)}"
        raise ValueError(
            f"Rescaling needs the source tensor {name!r} of shape {tuple(parameter.shape)}, but the source has {got}."
        )


ALPHA_GRID = tuple(round(0.1 * k, 1) for k in range(11))
"""α of a WiSE-FT sweep."""


@torch.no_grad()
def interpolate(model: nn.Module, start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> None:
    """θ ← θ_start + α·(θ_tuned − θ_start), in place, for floating tensors.

    α = 0 and 1 copy the bits; integer tensors keep their tuned value.
    """
    state = model.state_dict()
    for name, target in state.items():
        # The ends are copied: begin + 1·(tuned − begin) may round to other bits than the tuned ones.
        if alpha == 1 or not target.is_floating_point():
            target.copy_(tuned[name])
        elif alpha == 0:
            target.copy_(start[name])
        else:
            begin = start[name].to(target.device)
            target.copy_(begin + alpha * (tuned[name] - begin))


class WiseFt:
    """WiSE-FT weight interpolation of one trial.

    Args:
        start: tensors that differ from the pretrained network's when training starts
            (`trainables.engine.best_weights.changed_start`).
        alpha: α, or "sweep": the best of `ALPHA_GRID` on ID validation (ties: the tie-breaker, then the larger α).
    """

    def __init__(self, model: TaskModel, data: TrialData, start: Mapping[str, Tensor], alpha: float | str) -> None:
        self._model = model
        self._data = data
        self._alpha = alpha
        pretrained = {f"backbone.{name}": value for name, value in data.reference.state_dict().items()}
        self._start = {**pretrained, **start}
        # A copy: `_set` writes into the same model that it interpolates to.
        self._tuned = take(model, model.state_dict())

    def apply(self) -> Report:
        """Set the network to its α."""
        alpha = self._best() if self._alpha == "sweep" else float(self._alpha)
        self._set(alpha)
        return {WISE_ALPHA.name: alpha}

    def curve(self) -> Report:
        """Of a sweep: validation, test and OOD over `ALPHA_GRID`. The model is left unchanged."""
        if self._alpha != "sweep":
            return {}
        kept = take(self._model, self._model.state_dict())
        rows = []
        for alpha in ALPHA_GRID:
            self._set(alpha)
            scores = {**validation_scores(self._model, self._data), **final_scores(self._model, self._data)}
            rows.append({"alpha": alpha, **scores})
        put_back(self._model, kept)
        note = f"α is chosen on {task_of(self._data).metrics.validation}."
        return {"wise": Curve({name: [row[name] for row in rows] for name in rows[0]}, note)}

    def _set(self, alpha: float) -> None:
        interpolate(self._model, self._start, self._tuned, alpha)

    def _best(self) -> float:
        metrics = task_of(self._data).metrics
        keys = {}
        for alpha in ALPHA_GRID:
            self._set(alpha)
            keys[alpha] = (*validation_order(validation_scores(self._model, self._data), metrics), alpha)
        return max(keys, key=lambda alpha: keys[alpha])
