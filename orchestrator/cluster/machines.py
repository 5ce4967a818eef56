"""The cluster that this process is connected to, as its machines are seen from here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from orchestrator.cluster import resources
from orchestrator.cluster.auth import ClusterError


@dataclass(frozen=True)
class MachineKind:
    """One kind of machine that an autoscaler may start."""

    resources: dict[str, float]
    """Of one machine, as Ray counts them."""
    most: int
    """How many of them at most."""


@dataclass(frozen=True)
class Cluster:
    """The cluster that this process is connected to."""

    address: str
    """`host:port` of its head."""
    dashboard: str | None
    """URL of the dashboard; None when it has none."""
    started: bool
    """Whether `connect` started it (and stops it at the end)."""

    def nodes(self) -> list[dict[str, float]]:
        """Resources of each machine that is there, and of each kind that a `ray up` autoscaler may start."""
        return self._there() + [kind.resources for kind in self._kinds()]

    def trial_resources(self, cpus: float, gpus: float | Literal["auto"]) -> dict[str, float]:
        """Tune's request of one trial, see `orchestrator.cluster.resources.trial_resources`.

        On Kubernetes the operator may start machines that nobody can list here; the check is left to it.
        """
        nodes = self.nodes()
        if self._on_kubernetes() and gpus != "auto":
            nodes.append({"CPU": cpus, "GPU": float(gpus)})
        return resources.trial_resources(cpus, gpus, nodes)

    def concurrency(self, wanted: int | None, cpus: float, gpus: float) -> int:
        """How many trials to keep going: `wanted`, but no more than ever fit at once; at least 1.

        Machines that a `ray up` autoscaler may still start count, for it starts them only when trials wait. On
        Kubernetes their number cannot be known here: `wanted` is taken at its word, and without it only the machines
        that are there count.
        """
        fitting = max(1, self.trial_slots(cpus, gpus))
        if wanted is None:
            return fitting
        return wanted if self._on_kubernetes() else min(wanted, fitting)

    def trial_slots(self, cpus: float, gpus: float) -> int:
        """How many trials fit at once, on the machines that are there or on all that the autoscaler may start."""
        there = resources.trial_slots(cpus, gpus, self._there())
        to_come = [kind.most * resources.trial_slots(cpus, gpus, [kind.resources]) for kind in self._kinds()]
        return max([there, *to_come])

    def _there(self) -> list[dict[str, float]]:
        import ray

        return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]

    def _kinds(self) -> list[MachineKind]:
        return [] if self.started else autoscaled_kinds()

    def _on_kubernetes(self) -> bool:
        from orchestrator.ray_internals import KUBERAY_VARIABLE

        return not self.started and os.environ.get(KUBERAY_VARIABLE) == "1"

    def check_shared(self, *paths: str | Path) -> None:
        """Refuse paths that some machine of the cluster does not see, before any trial needs them.

        URLs (`s3://…`) are not looked at. Raises ClusterError naming each machine and path.
        """
        local = [str(path) for path in paths if "://" not in str(path)]
        unseen = [] if self.started else _unseen(local)
        if unseen:
            raise ClusterError(
                "Data and storage must lie where every machine of the cluster sees them, but "
                + ", ".join(f"{node} does not see {path}" for node, path in unseen)
                + ". Put them on a shared folder mounted at the same place everywhere, or give a URL (s3://…, gs://…)."
            )


def autoscaled_kinds(config: Path | None = None) -> list[MachineKind]:
    """The kinds of machines that `ray up` may start, read from the file it leaves in the head's home folder.

    Args:
        config: that file; any cluster file will do.
    """
    from orchestrator.ray_internals import BOOTSTRAP_CONFIG

    file = config or Path.home() / BOOTSTRAP_CONFIG
    if not file.is_file():
        return []
    cluster = yaml.safe_load(file.read_text()) or {}
    kinds = [
        MachineKind(
            resources={name: float(amount) for name, amount in kind.get("resources", {}).items()},
            most=min(kind.get("max_workers", 0), cluster.get("max_workers", 0)),
        )
        for kind in cluster.get("available_node_types", {}).values()
    ]
    return [kind for kind in kinds if kind.most > 0]


def _unseen(paths: list[str]) -> list[tuple[str, str]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_missing)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(paths)
        for node in nodes
    ]
    answers = ray.get(asked)
    return [(node["NodeManagerAddress"], path) for node, lost in zip(nodes, answers, strict=True) for path in lost]


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]
