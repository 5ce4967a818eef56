"""Measurements of a study as a whole.

The plasticity of the pretrained network and the faster memory layout at its start, and FSR once its reference trials
have ended.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray

from orchestrator.planning.preflight import layer_kinds
from orchestrator.record.records import MEMORY_LAYOUT, fold, measurements
from orchestrator.results.fsr import estimates, study_metrics
from trainables.engine.memory_layout import measure_layouts
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
        measurement = _on_cluster(pretrained_plasticity, task, request)
    except Exception as error:
        log.warning(
            "The plasticity of the pretrained network could not be measured (%s). The study continues without it.",
            _cause(error),
        )
        return
    journal.append("measured", what=PLASTICITY, **measurement)


def _on_cluster(
    function: Callable[[SharedTrialSettings, int], dict[str, Any]],
    task: SharedTrialSettings,
    request: Mapping[str, float],
) -> dict[str, Any]:
    """Result of a measurement in a process of the cluster that has a trial's resources."""
    cpus = request.get("cpu", 1.0)
    gpus = request.get("gpu", 0.0)
    # The process ends with its one task, and with it the memory that it holds on a GPU.
    measure = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1, max_calls=1)(function)
    measurement: dict[str, Any] = ray.get(measure.remote(task, max(1, int(cpus))))
    return measurement


def _cause(error: Exception) -> str:
    """Type and first line of what a task raised."""
    cause = getattr(error, "cause", None) or error  # Ray wraps it
    first_line = str(cause).partition("\n")[0]
    return f"{type(cause).__name__}: {first_line}"


def with_layout(
    spec: StudySpec, task: SharedTrialSettings, journal: Journal, request: Mapping[str, float]
) -> SharedTrialSettings:
    """The settings of the study's trials with their memory layout (`resources.channels_last`).

    `auto` is measured once, before the first trial, and journalled; a study whose trials ran without a measurement
    keeps the layout of their device. Blocks; needs a connected cluster. A measurement that fails is a warning: the
    study is as good in the device's own layout.

    Args:
        spec: of the study.
        task: `make_task` of the study.
        journal: of the study.
        request: resources of a trial (`cpu`, `gpu`), which the measurement requests too.
    """
    if spec.resources.channels_last != "auto":
        return task
    events = journal.events()
    decisions = [event for event in events if event["kind"] == MEMORY_LAYOUT]
    if not decisions and any(event["kind"] == "trial_started" for event in events):
        return task
    if not decisions:
        try:
            measurement = _on_cluster(measure_layouts, task, request)
        except Exception as error:
            log.warning(
                "Which memory layout is faster could not be measured (%s). Trials have that of their device.",
                _cause(error),
            )
            return task
        decisions = [journal.append(MEMORY_LAYOUT, **measurement)]
    decision = decisions[-1]
    # None, the device's own layout, wherever the answer is that one: such trials are those of earlier versions.
    return dataclasses.replace(task, channels_last=True) if _is_choice(decision) else task


def _is_choice(decision: Mapping[str, Any]) -> bool:
    return bool(decision["channels_last"]) and decision["device"] == "cpu"


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
