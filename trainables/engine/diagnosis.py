"""What a trial measures beside its scores, once at its end: a thin caller of `trainables.diagnostics`."""

from __future__ import annotations

import logging
from itertools import islice
from typing import TYPE_CHECKING

from trainables.engine.best_weights import is_pristine
from trainables.engine.contract import Strategy
from trainables.models.precision import resolve_precision
from trainables.specs.measurements import Curve
from trainables.specs.seeds import stream_seed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trainables.data.trial_data import TrialData
    from trainables.engine.evaluation import Watch
    from trainables.models.backbone import Classifier

log = logging.getLogger("luthier")

CKA_IMAGES, CKA_BATCH = 256, 64
"""How many images of the ID test split CKA is estimated on, and in batches of which size: the same images, in the same
order, for all trials on one store."""


class Diagnosis:
    """The diagnostics that the task asks for, or that belong to the strategy.

    Args:
        strategy, data: the trial's; `data.reference` is the pretrained network.
    """

    def __init__(self, strategy: Strategy, data: TrialData) -> None:
        self._wanted = {*strategy.measures, *data.spec.task.diagnostics}
        self._data = data
        self.watch: Watch | None = None
        """Sees the features of the pass that scores the finalised network; None = nothing needs them."""
        if "distortion" in self._wanted:
            from trainables.diagnostics.distortion import FeatureDistortion

            self._distortion = FeatureDistortion(data)
            self.watch = self._distortion.watch

    def report(
        self, model: Classifier, start: Mapping[str, Tensor], kept: Mapping[str, Tensor], last: Mapping[str, Tensor]
    ) -> dict[str, float | Curve]:
        """Metrics and curves, by the names of the record.

        Args:
            model: the finalised network, scored already.
            start: see `trainables.engine.best_weights.changed_start`.
            kept: tensors of the best unit that training may have changed, before `finalize` (names of the classifier).
            last: the same after the last unit.
        """
        found: dict[str, float | Curve] = {}
        if "shift" in self._wanted:
            from trainables.diagnostics.norm_shift import shift_report

            found |= shift_report(self._data.reference, start, kept, last)
        if "distortion" in self._wanted:
            from trainables.diagnostics.change import change_report, parameter_change

            found |= self._distortion.report()
            found |= change_report(parameter_change(self._data.reference, start, model.state_dict()))
        if "cka" in self._wanted:
            found |= self._cka(model)
        if "plasticity" in self._wanted:
            found |= self._plasticity(model)
        return found

    def _cka(self, model: Classifier) -> dict[str, float | Curve]:
        from trainables.diagnostics.cka import SMALLEST_BATCH, block_cka, cka_report

        data, model = self._data, model.eval()
        if data.size("test") < SMALLEST_BATCH:  # no fault of the trial, whose scores are known by now
            rule = "CKA is left out: it needs at least %d images, but the ID test has %d"
            log.warning(rule, SMALLEST_BATCH, data.size("test"))
            return {}
        unchanged = is_pristine(model.backbone, data.reference)
        after = data.reference if unchanged else model.backbone
        size, count = (SMALLEST_BATCH, 1) if unchanged else (CKA_BATCH, CKA_IMAGES // CKA_BATCH)  # 1 on any images
        batches = data.batches("test", batch_size=size, shuffle_seed=stream_seed(0, "cka"))
        images = (batch for batch, _ in islice(batches, count))
        dtype = resolve_precision(data.spec.task.precision, data.device)
        return cka_report(block_cka(data.reference, after, images, dtype))

    def _plasticity(self, model: Classifier) -> dict[str, float | Curve]:
        from trainables.diagnostics.plasticity import plasticity_after

        try:
            return plasticity_after(model, self._data).record()
        except ValueError as reason:  # no fault of the trial, whose scores are known by now
            log.warning("Plasticity after tuning is left out: %s", reason)
            return {}
