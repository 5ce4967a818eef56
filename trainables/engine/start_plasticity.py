"""Plasticity of a study's pretrained network.

Measured once before its trials, in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from trainables.data.trial_data import TrialData
from trainables.diagnostics.plasticity import plasticity_of
from trainables.engine.process_cache import on_device, open_store, pretrained_for
from trainables.specs.measurements import split_report
from trainables.specs.trial_spec import SharedTrialSettings, TrialSpec


def pretrained_plasticity(task: SharedTrialSettings, threads: int | None = None) -> dict[str, Any]:
    """`metrics` and `curves` of the pretrained network's plasticity, in this process.

    Args:
        task: the settings that all trials share; its probe, source and pairs are used.
        threads: of torch on the CPU; None = unchanged.

    Raises:
        ValueError: see `trainables.diagnostics.plasticity.plasticity_of`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = open_store(task.store)
    backbone = pretrained_for(task.model, task.image_size, store.image_size, task.cache, task.view)
    # A spec has a strategy, but what is measured here depends on none.
    spec = TrialSpec(shared=task, strategy="linear_probe")
    data = TrialData(spec, store, backbone, device, reference=on_device(backbone, device).module)
    metrics, curves = split_report(plasticity_of(data).record())
    return {"metrics": metrics, "curves": {name: curve.to_dict() for name, curve in curves.items()}}
