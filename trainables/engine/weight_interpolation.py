"""WiSE-FT (Wortsman et al., CVPR 2022): weights between those that training started from and the tuned ones.

The start is the network after `prepare`: DAFT's converted BatchNorm, and the head as it began (the paper starts from a
head that classifies already, so that α = 0 means something: use `head_init: linear_probe`, or lp_ft). Statistics of
BatchNorm are interpolated like weights; integer buffers keep their tuned value.

λ: how much of the shift that tuning gave the LayerNorms is kept, and how validation data choose it (papers/000).

λ costs no training: one tuned network is evaluated at θ_S + λ·(θ_T − θ_S).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.diagnostics.norm_shift import layer_norms
from trainables.engine.best_weights import put_back, take
from trainables.engine.evaluation import final_scores, validation_scores
from trainables.models.micro_batch import MicroBatch
from trainables.models.precision import autocast, resolve_precision
from trainables.specs.measurements import Curve, Report

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Classifier


LAMBDA_GRID = tuple(round(0.1 * k, 1) for k in range(21))
"""Values of λ that a sweep looks at: 0 (the source's γ) to 2 (twice the learned shift), 1 among them. papers/000 gives
no range, only that λ < 1 and λ > 1 both occur. On the digits at 2, 5, 10 and 100 % of the training images, two rates
and two seeds, a grid from 0 to 5 had its best validation accuracy at 2.0 once and below that otherwise."""
FIT_PASSES = 25
"""Passes over the validation split after which learning λ starts no further search along a line."""

Rescale = Literal["gamma", "both"]
"""What λ scales: γ alone, so that β keeps its tuned value, or both."""


@torch.no_grad()
def rescale_layer_norm(
    model: nn.Module, source_state: Mapping[str, Tensor], lam: float | Tensor, rescale: Rescale = "gamma"
) -> None:
    """γ ← γ_S + λ·(γ_T − γ_S) in every LayerNorm, in place (papers/000); with `both`, β likewise.

    λ = 1 leaves every bit as it is, λ = 0 puts the source's bits back.

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
    for name in (name for group in names.values() for name in group):
        _check_source(name, parameters[name], source_state)
    for group, value in zip(names.values(), values * (len(names) // len(values)), strict=True):
        for name in group:
            tuned, source = parameters[name], source_state[name].to(parameters[name].device)
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
    found = {
        layer: [
            f"{layer}.{kind}" if layer else kind for kind, _ in module.named_parameters(recurse=False) if kind in kinds
        ]
        for layer, module in layer_norms(model).items()
    }
    if not found:
        raise ValueError(
            "LayerNorm tuning needs a network with LayerNorm, but this one has none. For BatchNorm networks use daft, "
            "which adapts BatchNorm to the target data."
        )
    return found


def grid_scores(
    model: Classifier, data: TrialData, source: Mapping[str, Tensor], rescale: Rescale
) -> dict[float, dict[str, float]]:
    """λ → `val/acc` and `val/nll` over `LAMBDA_GRID`, one validation pass per value. The model is left unchanged."""
    tuned, scores = take(model, source), {}
    for lam in LAMBDA_GRID:
        rescale_layer_norm(model, source, lam, rescale)
        scores[lam] = validation_scores(model, data)
        put_back(model, tuned)
    return scores


def best_lambda(scores: Mapping[float, Mapping[str, float]]) -> float:
    """The highest validation accuracy; ties go to the lower NLL, then to the λ nearest to 1."""
    return max(scores, key=lambda lam: (scores[lam]["val/acc"], -scores[lam]["val/nll"], -abs(lam - 1)))


def fitted(
    model: Classifier, data: TrialData, source: Mapping[str, Tensor], rescale: Rescale, per_layer: bool
) -> Tensor:
    """λ (L,) float64 in the range of `LAMBDA_GRID` that minimises the mean cross-entropy of ID validation, by gradient,
    everything else frozen.

    Without the range, λ falls below 0 on scarce data, where the loss of an overconfident network falls with the scale
    of its features while its accuracy suffers (digits, 2 % of the training images: λ = -1.7 to -1.3).

    L-BFGS from λ = 1 on the whole split, so that the result depends on no order, no batch size (to rounding) and no
    random number; of all points looked at the best is taken, so that it is never worse than λ = 1. It ends soon after
    `FIT_PASSES` passes forward and backward, or where λ stands still. The network is in eval mode, and left as it was.

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
    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return loss.best.expand(loss.layers).cpu()


class _ValidationLoss:
    """Mean cross-entropy of ID validation and its gradient in `angle`, λ = 1 + sin(angle), which keeps λ in 0 to 2 and
    reaches both ends; remembers the best λ that it was asked for.

    Where memory runs out, a batch goes through the network in pieces.
    """

    def __init__(
        self, model: Classifier, data: TrialData, source: Mapping[str, Tensor], rescale: Rescale, per_layer: bool
    ) -> None:
        self._model, self._data, self._source, self._micro = model.eval(), data, source, MicroBatch()
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._groups = list(scaled_names(model, rescale).values())
        self.layers = len(self._groups)
        size = self.layers if per_layer else 1
        self.angle = torch.zeros(size, device=data.device, dtype=torch.float64, requires_grad=True)
        self.best, self._best_loss = self._lam().detach(), math.inf

    def __call__(self) -> float:
        total, gradient = 0.0, torch.zeros_like(self.angle)
        for images, labels in self._data.batches("val", batch_size=self._data.spec.task.batch_size):
            work = partial(self._sums, images, labels)
            loss, slope = self._micro.attempt(work, len(labels), "learning λ on")
            total, gradient = total + loss, gradient + slope
        count = self._data.size("val")
        self.angle.grad = gradient / count
        if total / count < self._best_loss:
            self.best, self._best_loss = self._lam().detach(), total / count
        return total / count

    def _sums(self, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        """Summed loss of a batch, and its gradient."""
        total, gradient = 0.0, torch.zeros_like(self.angle)
        dtype = resolve_precision(self._data.spec.task.precision, self._data.device)
        for piece in self._micro.pieces(len(labels)):
            with autocast(self._data.device, dtype):
                logits = torch.func.functional_call(self._model, self._rescaled(), (images[piece],))
            loss = functional.cross_entropy(logits.float(), labels[piece], reduction="sum")
            total, gradient = total + float(loss.detach()), gradient + torch.autograd.grad(loss, self.angle)[0]
        return total, gradient

    def _lam(self) -> Tensor:
        return 1 + self.angle.sin()

    def _rescaled(self) -> dict[str, Tensor]:
        """All tensors of the network, those of the norms as functions of `angle`."""
        values, found = self._lam().expand(self.layers), dict(self._state)
        for i, names in enumerate(self._groups):
            for name in names:
                found[name] = self._source[name] + values[i] * (self._state[name] - self._source[name])
        return found


def _check_source(name: str, parameter: Tensor, source_state: Mapping[str, Tensor]) -> None:
    found = source_state.get(name)
    if found is None or found.shape != parameter.shape:
        got = "none" if found is None else f"one of shape {tuple(found.shape)}"
        raise ValueError(
            f"Rescaling needs the source tensor {name!r} of shape {tuple(parameter.shape)}, but the source has {got}."
        )


ALPHA_GRID = tuple(round(0.1 * k, 1) for k in range(11))
"""Values of α that a sweep looks at."""


@torch.no_grad()
def interpolate(model: nn.Module, start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> None:
    """θ ← θ_start + α·(θ_tuned − θ_start), in place, for every floating tensor of both; α = 0 and 1 copy the bits."""
    state = model.state_dict()
    for name, target in state.items():
        if alpha == 1 or not target.is_floating_point():
            target.copy_(tuned[name])
        elif alpha == 0:
            target.copy_(start[name])
        else:
            begin = start[name].to(target.device)
            target.copy_(begin + alpha * (tuned[name] - begin))


class WiseFt:
    """One trial's interpolation.

    Args:
        start: tensors that differ from the pretrained network's when training starts
            (`trainables.engine.best_weights.changed_start`).
        wise: α, or "sweep": the best of `ALPHA_GRID` on ID validation (ties: the lower NLL, then the larger α).
    """

    def __init__(self, model: Classifier, data: TrialData, start: Mapping[str, Tensor], wise: float | str) -> None:
        self._model, self._data, self._wise = model, data, wise
        pretrained = {f"backbone.{name}": value for name, value in data.reference.state_dict().items()}
        self._start = {**pretrained, **start}
        self._tuned = take(model, model.state_dict())

    def apply(self) -> Report:
        """Put the network at its α."""
        alpha = self._best() if self._wise == "sweep" else float(self._wise)
        self._at(alpha)
        return {"wise/alpha": alpha}

    def curve(self) -> Report:
        """Of a sweep: validation, test and OOD over `ALPHA_GRID`; the model is left as it was found."""
        if self._wise != "sweep":
            return {}
        kept, rows = take(self._model, self._model.state_dict()), []
        for alpha in ALPHA_GRID:
            self._at(alpha)
            scores = {**validation_scores(self._model, self._data), **final_scores(self._model, self._data)}
            rows.append({"alpha": alpha, **scores})
        put_back(self._model, kept)
        return {"wise": Curve({name: [row[name] for row in rows] for name in rows[0]}, "α is chosen on val/acc.")}

    def _at(self, alpha: float) -> None:
        interpolate(self._model, self._start, self._tuned, alpha)

    def _best(self) -> float:
        scores = {}
        for alpha in ALPHA_GRID:
            self._at(alpha)
            found = validation_scores(self._model, self._data)
            scores[alpha] = (found["val/acc"], -found["val/nll"], alpha)
        return max(scores, key=lambda alpha: scores[alpha])
