"""What is measured of a study as a whole, once, at its start: the plasticity of the pretrained network's components.

FSR in a study's record: a measurement of the study as a whole, with the fitted curve, as soon as it is known.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.record.records import fold, measurements
from orchestrator.results.fsr import estimates, study_metrics

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal
    from orchestrator.study_file.schema import StudySpec
    from trainables.specs.trial_spec import Task


log = logging.getLogger("luthier")

PLASTICITY = "plasticity"
"""Name of the measurement in the journal (`what`)."""


def measure_start(spec: StudySpec, task: Task, journal: Journal, request: Mapping[str, float]) -> None:
    """Measure what the study asks for and the journal does not have yet. Needs a connected cluster; waits for it.

    A network whose components are not defined has no plasticity, which is said once. Whatever else goes wrong is said
    as a warning: the study is worth running without.

    Args:
        request: resources of a trial (`cpu`, `gpu`), which the measurement takes too.
    """
    from orchestrator.planning.preflight import layer_kinds
    from orchestrator.record.records import measurements

    if not spec.diagnostics.plasticity or PLASTICITY in measurements(journal.events()):
        return
    if "transformer_block" not in layer_kinds(spec.model.name):
        log.info(
            "Plasticity is that of transformer blocks, and %s has none that are defined: it is left out.",
            spec.model.name,
        )
        return
    try:
        found = _on_cluster(task, request)
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps what a task raises
        reason = str(cause).partition("\n")[0][:300]
        log.warning(
            "The plasticity of the pretrained network could not be measured (%s: %s). The study goes on without it.",
            type(cause).__name__,
            reason,
        )
        return
    journal.append("measured", what=PLASTICITY, **found)


def _on_cluster(task: Task, request: Mapping[str, float]) -> dict[str, Any]:
    import ray

    cpus, gpus = request.get("cpu", 1.0), request.get("gpu", 0.0)
    # The process ends with its one task, and with it the memory that it holds on a GPU.
    measure = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1, max_calls=1)(pretrained_plasticity)
    found: dict[str, Any] = ray.get(measure.remote(task, max(1, int(cpus))))
    return found


def pretrained_plasticity(task: Task, threads: int | None = None) -> dict[str, Any]:
    """`metrics` and `curves` of the pretrained network's plasticity, in this process.

    Args:
        task: what the study's trials share; its probe, source and pairs are used.
        threads: of torch on the CPU; None = as they are.

    Raises:
        ValueError: see `trainables.diagnostics.plasticity.plasticity_of`.
    """
    import torch

    from trainables.data.trial_data import TrialData
    from trainables.diagnostics.plasticity import plasticity_of
    from trainables.engine.final_evaluation import split
    from trainables.engine.process_cache import on_device, open_store, pretrained_for
    from trainables.specs.trial_spec import TrialSpec

    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = open_store(task.store)
    backbone = pretrained_for(task.model, task.image_size, store.image_size, task.cache)
    spec = TrialSpec(task=task, strategy="linear_probe")
    data = TrialData(spec, store, backbone, device, reference=on_device(backbone, device).module)
    metrics, curves = split(plasticity_of(data).record())
    return {"metrics": metrics, "curves": {name: curve.to_dict() for name, curve in curves.items()}}


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
