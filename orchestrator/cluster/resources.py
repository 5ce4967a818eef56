"""What one trial may ask of the machines: pure functions over Ray's resource dicts (`{"CPU": 8.0, "GPU": 1.0, …}`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

Resources = Mapping[str, float]


class ResourceError(ValueError):
    """No machine of the cluster is large enough for one trial, or the request cannot be expressed."""


def check_resources(cpus: float, gpus: float, nodes: Sequence[Resources]) -> None:
    """Refuse a trial that would wait for ever: one machine must hold the whole of it.

    Args:
        cpus: CPU cores of one trial.
        gpus: GPUs of one trial; below 1 is a share of one GPU.
        nodes: resources of every machine that is there or that the autoscaler may start.

    Raises:
        ResourceError: negative, no resource at all, 1.5 GPUs, or more than the largest machine has.
    """
    if cpus < 0 or gpus < 0 or cpus + gpus == 0:
        raise ResourceError(
            f"A trial needs at least a share of a CPU or of a GPU, but got cpus={cpus:g} and gpus={gpus:g}. "
            "Set `resources.cpus` to 1 or more in the study."
        )
    if gpus > 1 and gpus != int(gpus):
        raise ResourceError(
            f"GPUs of one trial are a share of one GPU (0 to 1) or a whole number, but got gpus={gpus:g}. "
            f"Set `resources.gpus` to {math.floor(gpus)} or {math.ceil(gpus)} in the study."
        )
    if any(_fits(cpus, gpus, node) for node in nodes):
        return
    raise ResourceError(
        f"A trial asks for {_amount(cpus, gpus)}, but {_largest(nodes)}: it would wait for ever. Lower "
        "`resources.cpus` or `resources.gpus` in the study, or add a machine of that size to the cluster."
    )


def trial_resources(cpus: float, gpus: float | Literal["auto"], nodes: Sequence[Resources]) -> dict[str, float]:
    """The request of one trial as Tune takes it, `{"cpu": …, "gpu": …}`, checked with `check_resources`.

    `gpus="auto"` is one whole GPU where any machine has one, else none. (Ray does not divide a GPU's memory; give
    a share such as 0.25 yourself when several trials fit on one, see `gpu_share`.)
    """
    if gpus == "auto":
        amount = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    else:
        amount = float(gpus)
    check_resources(cpus, amount, nodes)
    return {"cpu": float(cpus), "gpu": amount}


def trial_slots(cpus: float, gpus: float, nodes: Sequence[Resources]) -> int:
    """How many trials run at once on these machines when nothing else does."""
    return sum(_slots(cpus, gpus, node) for node in nodes)


def gpu_share(peak_bytes: int, total_bytes: int, max_share: int = 8) -> float:
    """The share of one GPU that a trial should ask for, from the peak memory of one measured training step.

    The largest k ≤ `max_share` trials for which k · peak fits into 90 % of the memory (the rest is for CUDA contexts
    and fragmentation); returns 1/k, never less than one whole GPU's worth for a trial that barely fits.

    Raises:
        ResourceError: sizes that are not positive, or a trial that does not fit on one GPU at all.
    """
    if peak_bytes <= 0 or total_bytes <= 0 or max_share < 1:
        raise ResourceError(
            "gpu_share needs positive sizes and max_share of at least 1, but got "
            f"peak_bytes={peak_bytes}, total_bytes={total_bytes}, max_share={max_share}."
        )
    if peak_bytes > total_bytes:
        raise ResourceError(
            f"One training step needs {peak_bytes / 2**30:.1f} GiB of GPU memory, but the GPU has "
            f"{total_bytes / 2**30:.1f} GiB. Lower `search.batch_size`, or choose a smaller model."
        )
    together = int(0.9 * total_bytes // peak_bytes)
    return 1.0 / min(max(together, 1), max_share)


def _fits(cpus: float, gpus: float, node: Resources) -> bool:
    return cpus <= node.get("CPU", 0) and gpus <= node.get("GPU", 0)


def _slots(cpus: float, gpus: float, node: Resources) -> int:
    if not _fits(cpus, gpus, node):
        return 0
    by_cpu = node.get("CPU", 0) / cpus if cpus else math.inf
    if gpus == 0:
        return int(by_cpu)
    # A share never spans two GPUs: 0.4 goes twice, not two and a half times, onto each.
    whole = node.get("GPU", 0)
    by_gpu = whole // gpus if gpus >= 1 else int(whole) * math.floor(1 / gpus + 1e-9)
    return int(min(by_cpu, by_gpu))


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU{'' if cpus == 1 else 's'} and {gpus:g} GPU{'' if gpus == 1 else 's'}"


def _largest(nodes: Sequence[Resources]) -> str:
    """The machine sizes that no other machine surpasses, in words."""
    sizes = {(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes}
    top = sorted(
        (a for a in sizes if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in sizes)),
        reverse=True,
    )
    if not top:
        return "the cluster has no machine yet"
    return f"the largest machine has {' or '.join(_amount(*size) for size in top)}"
