"""What a trial measures beside its scores, once at its end: a thin caller of `trainables.diagnostics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainables.core.contract import Curve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trainables.core.backbone import Classifier
    from trainables.data.trial_data import TrialData


def end_of_trial(
    model: Classifier, data: TrialData, kept: Mapping[str, Tensor], last: Mapping[str, Tensor]
) -> dict[str, float | Curve]:
    """The diagnostics that the task asks for.

    Args:
        model: the finalised network.
        data: the trial's data; `data.reference` is the pretrained network.
        kept: tensors of the best unit that training may have changed, before `finalize` (names of the classifier).
        last: the same after the last unit.
    """
    return {}
