"""The connected cluster: its machines, those an autoscaler may add, and what they can hold."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster import resources
from orchestrator.cluster.auth import ClusterError
from orchestrator.ray_internals import BOOTSTRAP_CONFIG, KUBERAY_VARIABLE


@dataclass(frozen=True)
class MachineKind:
    """A node type that an autoscaler may start."""

    resources: dict[str, float]
    """Resources of one machine, in Ray's units."""
    max_count: int


@dataclass(frozen=True)
class Cluster:
    """The connected cluster."""

    address: str
    """`host:port` of its head."""
    dashboard: str | None
    """URL of the dashboard; None = it has none."""
    started: bool
    """Whether `connect` started it, and stops it at the end."""

    def nodes(self) -> list[dict[str, float]]:
        """Resources of each machine that is up or may be started.

        One entry per machine that is up, and per node type that a `ray up` autoscaler may start.
        """
        return self._alive_nodes() + [kind.resources for kind in self._kinds()]

    def trial_resources(self, cpus: float, gpus: float | Literal["auto"]) -> dict[str, float]:
        """Tune's request of one trial, see `orchestrator.cluster.resources.trial_resources`.

        On Kubernetes the operator may start machines of sizes unknown here; the request is then not checked.
        """
        nodes = self.nodes()
        if self._on_kubernetes() and gpus != "auto":
            nodes.append({"CPU": cpus, "GPU": float(gpus)})
        return resources.trial_resources(cpus, gpus, nodes)

    def concurrency(self, requested: int | None, cpus: float, gpus: float) -> int:
        """Number of concurrent trials.

        `requested`, but at most as many as can fit at once, and at least 1. Machines that a `ray up` autoscaler may
        still start count, because it starts them only when trials are pending. On Kubernetes their number is unknown
        here: `requested` is not limited, and None = what fits on the machines that are up.
        """
        fitting = max(1, self.trial_slots(cpus, gpus))
        if requested is None:
            return fitting
        return requested if self._on_kubernetes() else min(requested, fitting)

    def trial_slots(self, cpus: float, gpus: float) -> int:
        """Number of trials that fit at once.

        On the machines that are up, or on all that the autoscaler may start.
        """
        slots = [resources.trial_slots(cpus, gpus, self._alive_nodes())]
        for kind in self._kinds():
            slots.append(kind.max_count * resources.trial_slots(cpus, gpus, [kind.resources]))
        return max(slots)

    def _alive_nodes(self) -> list[dict[str, float]]:
        return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]

    def _kinds(self) -> list[MachineKind]:
        return [] if self.started else autoscaled_kinds()

    def _on_kubernetes(self) -> bool:
        return not self.started and os.environ.get(KUBERAY_VARIABLE) == "1"

    def check_shared(self, *paths: str | Path) -> None:
        """Refuse paths that do not exist on some machine of the cluster.

        Before any trial needs them. Covers the machines that are up; an autoscaler's later ones are not checked.

        Raises:
            ClusterError: names each machine and path.
        """
        unseen = [] if self.started else _unseen([str(path) for path in paths])
        if unseen:
            raise ClusterError(
                "Data and storage must be visible to every machine of the cluster, but "
                + ", ".join(f"{node} does not see {path}" for node, path in unseen)
                + ". Give paths on storage that every machine mounts at the same place (such as NFS, EFS or FSx)."
            )


def autoscaled_kinds(config: Path | None = None) -> list[MachineKind]:
    """The node types that `ray up` may start.

    From the configuration file that it writes to the head's home folder.

    Args:
        config: path of a cluster file; None = that file.
    """
    file = config or Path.home() / BOOTSTRAP_CONFIG
    if not file.is_file():
        return []
    cluster = yaml.safe_load(file.read_text()) or {}
    kinds = [
        MachineKind(
            resources={name: float(amount) for name, amount in kind.get("resources", {}).items()},
            max_count=min(kind.get("max_workers", 0), cluster.get("max_workers", 0)),
        )
        for kind in cluster.get("available_node_types", {}).values()
    ]
    return [kind for kind in kinds if kind.max_count > 0]


def _unseen(paths: list[str]) -> list[tuple[str, str]]:
    """(machine, path) for each path that a machine does not have."""
    find_missing = ray.remote(num_cpus=0, max_retries=0)(_missing)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    pending = []
    for node in nodes:
        # Not soft: Ray would otherwise run the look-up on another machine.
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        pending.append(find_missing.options(scheduling_strategy=on_node).remote(paths))
    unseen = []
    for node, missing in zip(nodes, ray.get(pending), strict=True):
        unseen += [(node["NodeManagerAddress"], path) for path in missing]
    return unseen


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]
