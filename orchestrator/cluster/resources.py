"""Resource requests of trials: pure functions over Ray's resource dicts (`{"CPU": 8.0, "GPU": 1.0, …}`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

Resources = Mapping[str, float]


class ResourceError(ValueError):
    """No machine of the cluster can hold one trial, or the request is invalid."""


def check_resources(cpus: float, gpus: float, nodes: Sequence[Resources]) -> None:
    """Refuse a request that could never be scheduled: a trial runs on one machine.

    Args:
        cpus: CPU cores of one trial.
        gpus: GPUs of one trial; below 1 is a share of one GPU.
        nodes: resources of every machine that is up or that the autoscaler may start.

    Raises:
        ResourceError: negative, no resource at all, more than one GPU, or more than the largest machine has.

    >>> check_resources(2, 0.5, [{"CPU": 4.0, "GPU": 1.0}])
    """
    if cpus < 0 or gpus < 0 or cpus + gpus == 0:
        raise ResourceError(
            f"A trial needs at least a share of a CPU or of a GPU, but got cpus={cpus:g} and gpus={gpus:g}. "
            "Set `resources.cpus` to 1 or more in the study."
        )
    if gpus > 1:
        raise ResourceError(
            f"A trial trains on one GPU or a share of it (0 to 1), but got gpus={gpus:g}. Set `resources.gpus` to 1 in "
            "the study."
        )
    if any(_fits(cpus, gpus, node) for node in nodes):
        return
    raise ResourceError(
        f"A trial asks for {_amount(cpus, gpus)}, but {_largest(nodes)}: it would wait for ever. Lower "
        "`resources.cpus` or `resources.gpus` in the study, or add a machine of that size to the cluster."
    )


def trial_resources(cpus: float, gpus: float | Literal["auto"], nodes: Sequence[Resources]) -> dict[str, float]:
    """A trial's request as Tune takes it: `{"cpu": …, "gpu": …}`.

    Checked with `check_resources`. `gpus="auto"` is one GPU if any machine has one, else none. Ray does not divide a
    GPU's memory: a share such as 0.25 only says that several trials fit on one GPU.

    >>> trial_resources(2, "auto", [{"CPU": 4.0, "GPU": 1.0}])
    {'cpu': 2.0, 'gpu': 1.0}
    """
    if gpus == "auto":
        amount = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    else:
        amount = float(gpus)
    check_resources(cpus, amount, nodes)
    return {"cpu": float(cpus), "gpu": amount}


def trial_slots(cpus: float, gpus: float, nodes: Sequence[Resources]) -> int:
    """Number of trials that fit on these machines at once when nothing else runs.

    >>> trial_slots(1, 0.4, [{"CPU": 8.0, "GPU": 2.0}])  # a share never spans two GPUs
    4
    """
    return sum(_slots(cpus, gpus, node) for node in nodes)


def _fits(cpus: float, gpus: float, node: Resources) -> bool:
    return cpus <= node.get("CPU", 0) and gpus <= node.get("GPU", 0)


def _slots(cpus: float, gpus: float, node: Resources) -> int:
    if not _fits(cpus, gpus, node):
        return 0
    by_cpu = node.get("CPU", 0) / cpus if cpus else math.inf
    if gpus == 0:
        return int(by_cpu)
    # A share never spans two GPUs: 0.4 fits twice on each. (1e-9: 1 / 0.2 may be 4.999….)
    by_gpu = int(node.get("GPU", 0)) * math.floor(1 / gpus + 1e-9)
    return int(min(by_cpu, by_gpu))


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU{'' if cpus == 1 else 's'} and {gpus:g} GPU{'' if gpus == 1 else 's'}"


def _largest(nodes: Sequence[Resources]) -> str:
    """The sizes of machines that no other machine exceeds in CPUs and GPUs, in words."""
    sizes = {(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes}
    largest = []
    for cpus, gpus in sorted(sizes, reverse=True):
        exceeded = any(other != (cpus, gpus) and other[0] >= cpus and other[1] >= gpus for other in sizes)
        if not exceeded:
            largest.append(_amount(cpus, gpus))
    if not largest:
        return "the cluster has no machine yet"
    return f"the largest machine has {' or '.join(largest)}"
