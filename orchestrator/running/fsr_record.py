"""FSR in a study's record: a measurement of the study as a whole, with the fitted curve, as soon as it is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.record.folding import fold, measurements
from orchestrator.results.fsr import estimates, study_metrics

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal

FSR = "fsr"
"""Name of the measurement in the journal (`what`), and of its curve."""


def record_fsr(journal: Journal) -> None:
    """Append what the reference trials say as a `measured` event, unless the journal says the same already."""
    events = journal.events()
    found = estimates(fold(events))
    metrics = study_metrics(found)
    fitted = [dict(estimate.curve) for estimate in found if estimate.curve is not None]
    curves = {FSR: fitted[0]} if fitted else {}
    before = measurements(events).get(FSR, {"metrics": {}, "curves": {}})
    if (metrics, curves) != (before["metrics"], before["curves"]):
        journal.append("measured", what=FSR, metrics=metrics, curves=curves)
