"""WiSE-FT (Wortsman et al., CVPR 2022): weights between those that training started from and the tuned ones.

The start is the network after `prepare`: DAFT's converted BatchNorm, and the head as it began (the paper starts from a
head that classifies already, so that α = 0 means something: use `head_init: linear_probe`, or lp_ft). Statistics of
BatchNorm are interpolated like weights; integer buffers keep their tuned value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainables.core.contract import Curve, Report
from trainables.core.scoring import final_scores, validation_scores
from trainables.core.snapshot import put_back, take

if TYPE_CHECKING:
    from trainables.core.backbone import Classifier
    from trainables.data.trial_data import TrialData

GRID = tuple(round(0.1 * k, 1) for k in range(11))
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
            (`trainables.core.snapshot.changed_start`).
        wise: α, or "sweep": the best of `GRID` on ID validation (ties: the lower NLL, then the larger α).
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
        """Of a sweep: validation, test and OOD over `GRID`; the model is left as it was found."""
        if self._wise != "sweep":
            return {}
        kept, rows = take(self._model, self._model.state_dict()), []
        for alpha in GRID:
            self._at(alpha)
            scores = {**validation_scores(self._model, self._data), **final_scores(self._model, self._data)}
            rows.append({"alpha": alpha, **scores})
        put_back(self._model, kept)
        return {"wise": Curve({name: [row[name] for row in rows] for name in rows[0]}, "α is chosen on val/acc.")}

    def _at(self, alpha: float) -> None:
        interpolate(self._model, self._start, self._tuned, alpha)

    def _best(self) -> float:
        scores = {}
        for alpha in GRID:
            self._at(alpha)
            found = validation_scores(self._model, self._data)
            scores[alpha] = (found["val/acc"], -found["val/nll"], alpha)
        return max(scores, key=lambda alpha: scores[alpha])
