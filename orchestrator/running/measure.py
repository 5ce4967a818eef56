"""What is measured of a study as a whole, once, at its start: the plasticity of the pretrained network's components."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal
    from orchestrator.study_file.schema import StudySpec
    from trainables.core.task import Task

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
    from orchestrator.record.folding import measurements

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
        ValueError: see `trainables.diagnostics.start_plasticity.plasticity_of`.
    """
    import torch

    from trainables.core.ending import split
    from trainables.core.resident import on_device, open_store, pretrained_for
    from trainables.core.task import TrialSpec
    from trainables.data.trial_data import TrialData
    from trainables.diagnostics.start_plasticity import plasticity_of

    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = open_store(task.store)
    backbone = pretrained_for(task.model, task.image_size, store.image_size, task.cache)
    spec = TrialSpec(task=task, strategy="linear_probe")
    data = TrialData(spec, store, backbone, device, reference=on_device(backbone, device).module)
    metrics, curves = split(plasticity_of(data).record())
    return {"metrics": metrics, "curves": {name: curve.to_dict() for name, curve in curves.items()}}
