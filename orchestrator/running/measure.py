"""Measurements of a study as a whole.

The plasticity of the pretrained network at its start, and FSR once its reference trials have ended.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray

from orchestrator.planning.preflight import layer_kinds
from orchestrator.record.records import fold, measurements
from orchestrator.results.fsr import estimates, study_metrics
from trainables.engine.start_plasticity import pretrained_plasticity

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal
    from orchestrator.study_file.schema import StudySpec
    from trainables.specs.trial_spec import SharedTrialSettings


log = logging.getLogger("luthier")

PLASTICITY = "plasticity"
"""Name of the measurement in the journal (`what`)."""


def measure_start(spec: StudySpec, task: SharedTrialSettings, journal: Journal, request: Mapping[str, float]) -> None:
    """Measure plasticity if the study asks for it and the journal has none.

    Blocks; needs a connected cluster.

    A network whose components are not defined has no plasticity, which is logged. Any other failure is a warning: the
    study is worth running without it.

    Args:
        request: resources of a trial (`cpu`, `gpu`), which the measurement requests too.
    """
    if not spec.diagnostics.plasticity or PLASTICITY in measurements(journal.events()):
        return
    if "transformer_block" not in layer_kinds(spec.model.name):
        log.info(
            "Plasticity is that of transformer blocks, and %s has none that are defined: it is left out.",
            spec.model.name,
        )
        return
    try:
        measurement = _on_cluster(task, request)
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps what a task raises
        reason = str(cause).partition("\n")[0]
        log.warning(
            "The plasticity of the pretrained network could not be measured (%s: %s). The study continues without it.",
            type(cause).__name__,
            reason,
        )
        return
    journal.append("measured", what=PLASTICITY, **measurement)


def _on_cluster(task: SharedTrialSettings, request: Mapping[str, float]) -> dict[str, Any]:
    cpus = request.get("cpu", 1.0)
    gpus = request.get("gpu", 0.0)
    # The process ends with its one task, and with it the memory that it holds on a GPU.
    measure = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1, max_calls=1)(pretrained_plasticity)
    measurement: dict[str, Any] = ray.get(measure.remote(task, max(1, int(cpus))))
    return measurement


FSR = "fsr"
"""Name of the measurement in the journal (`what`), and of its curve."""


def record_fsr(journal: Journal) -> None:
    """Append the estimates from the reference trials as a `measured` event.

    Unless the journal has the same already.
    """
    events = journal.events()
    fsr = estimates(fold(events))
    metrics = study_metrics(fsr)
    fitted = [dict(estimate.curve) for estimate in fsr if estimate.curve is not None]
    curves = {FSR: fitted[0]} if fitted else {}
    before = measurements(events).get(FSR, {"metrics": {}, "curves": {}})
    if (metrics, curves) != (before["metrics"], before["curves"]):
        journal.append("measured", what=FSR, metrics=metrics, curves=curves)
