"""Diagnostics of a trial, measured once at its end by `trainables.diagnostics`."""

from __future__ import annotations

import dataclasses
import logging
from itertools import islice
from typing import TYPE_CHECKING

from trainables.diagnostics.change import change_report, parameter_change
from trainables.diagnostics.cka import SMALLEST_BATCH, block_cka, cka_report
from trainables.diagnostics.distortion import FeatureDistortion
from trainables.diagnostics.norm_shift import shift_report
from trainables.diagnostics.plasticity import plasticity_after
from trainables.engine.best_weights import is_pristine
from trainables.engine.contract import Strategy
from trainables.models.precision import resolve_precision
from trainables.specs.measurements import Curve
from trainables.specs.metrics import TEST
from trainables.specs.seeds import stream_seed
from trainables.tasks.registry import task_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from trainables.data.trial_data import TrialData
    from trainables.engine.evaluation import Watch
    from trainables.models.task_model import TaskModel

log = logging.getLogger("luthier")

CKA_IMAGES = 256
"""Images of the ID test split that CKA is estimated on: the same, in the same order, for all trials on one store."""
CKA_BATCH = 64


class Diagnosis:
    """The diagnostics that the study asks for, or that belong to the strategy.

    Args:
        strategy, data, model: the trial's; `data.reference` is the pretrained network.
    """

    def __init__(self, strategy: Strategy, data: TrialData, model: TaskModel) -> None:
        self._names = {*strategy.measures, *data.spec.shared.diagnostics}
        self._data = data
        self._distortion: FeatureDistortion | None = None
        self.watch: Watch | None = None
        """Watches the features in the pass that scores the finalized network; None = nothing needs them."""
        if "distortion" not in self._names:
            return
        if not model.pooled:
            task = data.spec.shared.task
            log.warning("Feature distortion is left out: it compares pooled features, and task %r has none.", task)
            return
        self._distortion = FeatureDistortion(data)
        self.watch = self._distortion.watch

    def report(
        self, model: TaskModel, start: Mapping[str, Tensor], kept: Mapping[str, Tensor], last: Mapping[str, Tensor]
    ) -> dict[str, float | Curve]:
        """Metrics and curves, by recorded name.

        Args:
            model: the finalized network, scored already.
            start: see `trainables.engine.best_weights.changed_start`.
            kept: tensors of the best unit that training may have changed, before `finalize` (names of the model).
            last: those of the norms after the last unit.
        """
        report: dict[str, float | Curve] = {}
        if "shift" in self._names:
            report |= shift_report(self._data.reference, start, kept, last)
        if self._distortion is not None:
            report |= self._distortion.report()
        if "distortion" in self._names:
            report |= change_report(parameter_change(self._data.reference, start, model.state_dict()))
        if "cka" in self._names:
            report |= self._cka(model)
        if "plasticity" in self._names:
            report |= self._plasticity(model)
        return report

    def _cka(self, model: TaskModel) -> dict[str, float | Curve]:
        data = self._data
        model.eval()
        # Not an error: the trial has its scores by now.
        if data.size(TEST) < SMALLEST_BATCH:
            rule = "CKA is left out: it needs at least %d images, but the ID test has %d"
            log.warning(rule, SMALLEST_BATCH, data.size(TEST))
            return {}
        # As the task reads it: a head may have the last stage dilated, which changes activations but no weight.
        before: nn.Module = data.reference
        if not model.pooled:
            before = task_of(data).build_model(dataclasses.replace(data.backbone, module=data.reference), 0).backbone
        after: nn.Module = model.backbone
        size = CKA_BATCH
        count = CKA_IMAGES // CKA_BATCH
        if is_pristine(model.backbone, before):
            # CKA of a network with itself is 1 on any images.
            after = before
            size = SMALLEST_BATCH
            count = 1
        # A constant seed, not the trial's: CKA of two trials is compared, so both are to see the same images.
        batches = data.batches(TEST, batch_size=size, shuffle_seed=stream_seed(0, "cka"))
        images = (batch for batch, _ in islice(batches, count))
        dtype = resolve_precision(data.spec.shared.precision, data.device)
        return cka_report(block_cka(before, after, images, dtype))

    def _plasticity(self, model: TaskModel) -> dict[str, float | Curve]:
        try:
            return plasticity_after(model, self._data).record()
        except ValueError as reason:  # not an error of the trial, which has its scores by now
            log.warning("Plasticity after tuning is left out: %s", reason)
            return {}
