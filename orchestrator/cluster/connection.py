"""Connection to a Ray cluster, for the duration of a block.

The cluster of RAY_ADDRESS is joined; without one a local cluster is started.

    with connect(cpus=4) as cluster:
        request = cluster.trial_resources(cpus=1, gpus="auto")
        tuner.fit()
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import ray

from orchestrator.cluster import shipping
from orchestrator.cluster.auth import (
    Access,
    ClusterError,
    check_access,
    ensure_token,
    find_token,
    probe_gcs,
    refresh_ray_auth,
)
from orchestrator.cluster.driver_process import (
    environment,
    free_port,
    sigterm_as_interrupt,
    sigterm_restored,
)
from orchestrator.cluster.machines import Cluster
from orchestrator.cluster.resources import ResourceError, check_resources, trial_resources
from orchestrator.ray_internals import (
    JOB_VARIABLE,
    address_of_this_machine,
    dashboard_address,
    keep_aws_keys_private,
    session_folder,
)

__all__ = [
    "Cluster",
    "ClusterError",
    "ResourceError",
    "check_resources",
    "connect",
    "trial_resources",
]

logger = logging.getLogger(__name__)

KNOBS: Mapping[str, str] = {
    # Half of Tune's cost per short trial is writing CSV and TensorBoard files; the journal replaces them.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Luthier's progress display replaces Tune's tables; the newer reporter prints some even with verbose=0.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Tune would change each actor's working directory to a trial folder; a reused actor fails once that is deleted.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The journal has the cause of a failure in one line; Tune prints Ray's traceback of every attempt.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # On Ctrl-C Tune would return as if the study were complete; KeyboardInterrupt must propagate.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_THRESHOLD_S": "10",
    # A validation domain is evaluated only at rungs and at the end; Tune would abort at the first result without it.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # An autoscaled GPU machine takes minutes to start, without a warning every minute.
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S_AUTOSCALER": "900",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment variables of Ray and Tune while connected; the user's own values take precedence."""

NICENESS = "RAY_worker_niceness"
"""Environment variable of the process that starts a cluster's machine: niceness that its workers add to its own."""
LOCAL_KNOBS: Mapping[str, str] = {
    # Seconds after which Ray ends a process that lost its head node; a local head never returns.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
"""The same for a cluster that this process starts."""


@contextlib.contextmanager
def connect(
    cpus: int | None = None,
    gpus: int | None = None,
    *,
    address: str | None = None,
    dashboard: bool = True,
    insecure: bool = False,
    log_to_driver: bool = False,
    nice: int | None = None,
) -> Iterator[Cluster]:
    """Connect this process to a Ray cluster for the duration of a `with` block.

    The address is `address`, else RAY_ADDRESS. Without either (or with "local") a cluster is started on this machine,
    with token authentication, its dashboard on 127.0.0.1 and a temporary folder; it is stopped at the end. An existing
    connection of the process is used and left open. Within the block Ctrl-C and SIGTERM both raise KeyboardInterrupt,
    also out of `Tuner.fit`, and Tune does not publish the AWS keys of this process.

    Args:
        cpus: CPU cores of a local cluster; None = all. Ignored when joining.
        gpus: GPUs of a local cluster; None = all. Ignored when joining.
        address: see above.
        dashboard: whether a local cluster serves the Ray dashboard.
        insecure: join even a network cluster without authentication.
        log_to_driver: print what trials write to stdout and stderr.
        nice: niceness of a local cluster's workers, added to that of this process; None = Ray's own, 15. Ignored when
            joining.

    Raises:
        ClusterError: the cluster cannot or must not be joined.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    started = target == "local"
    knobs = {**KNOBS, **(LOCAL_KNOBS if started else {})}
    if started and nice is not None:
        knobs[NICENESS] = str(nice)
    with environment(knobs), sigterm_restored():
        keep_aws_keys_private()
        if ray.is_initialized():
            yield _describe(started=False)
            return
        common = {"logging_level": logging.ERROR, "log_to_driver": log_to_driver}
        opened = _local(cpus, gpus, dashboard, common) if started else _joined(target, insecure, common)
        with opened:
            try:
                with sigterm_as_interrupt():
                    yield _describe(started)
            finally:
                ray.shutdown()


@contextlib.contextmanager
def _local(cpus: int | None, gpus: int | None, dashboard: bool, common: dict[str, Any]) -> Iterator[None]:
    """Start a local cluster; the caller shuts it down.

    Its folder is deleted unless the block failed.
    """
    # Ray puts Unix sockets there, whose paths have at most 107 bytes: macOS's own temporary folder is too long.
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 24 else "/tmp"
    folder = tempfile.mkdtemp(prefix="luthier-", dir=parent)
    dashboard_options = {"dashboard_host": "127.0.0.1", "dashboard_port": free_port()} if dashboard else {}
    ensure_token()
    with _authentication("token"):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=dashboard,
                **session_folder(folder),
                **dashboard_options,
                **common,
            )
            yield
        except (ValueError, KeyboardInterrupt):
            # A user error or an interrupt: Ray's logs would not explain either.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except Exception:
            logger.warning("The local cluster's own logs are kept in %s", folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _joined(address: str, insecure: bool, common: dict[str, Any]) -> Iterator[None]:
    """Join a running cluster after checking its authentication."""
    if JOB_VARIABLE in os.environ:
        # A Ray job: the cluster started this process, with its token and working directory.
        ray.init(address=address, **common)
        yield
        return
    target = _gcs_address(address)
    token = find_token()
    # The probe uses plain gRPC; with mutual TLS the certificates already authenticate.
    access: Access = "accepted" if os.environ.get("RAY_USE_TLS") == "1" else probe_gcs(target, token)
    check_access(address, target.rpartition(":")[0], access, insecure)
    with _authentication("disabled" if access == "open" else "token"):
        try:
            ray.init(address=target, runtime_env=_shipped_packages(), **common)
        except (ConnectionError, RuntimeError) as error:
            raise ClusterError(
                f"The cluster at {address} answers, but this machine cannot join it: {error}. `luthier run` joins from "
                "a machine of the cluster itself; from elsewhere use `luthier submit study.yaml --address http://…`."
            ) from error
        yield


@contextlib.contextmanager
def _authentication(mode: Literal["token", "disabled"]) -> Iterator[None]:
    """Set Ray's authentication mode for the duration of a block.

    Ray looks for the token as `find_token` does.
    """
    try:
        with environment({"RAY_AUTH_MODE": mode}, override=True):
            # Ray reads the variable once per process and caches mode and token.
            refresh_ray_auth()
            yield
    finally:
        refresh_ray_auth()


def _gcs_address(address: str) -> str:
    """`host:port` of the head, from a value of RAY_ADDRESS."""
    if address.startswith(("http://", "https://", "ray://")):
        raise ClusterError(
            f"RAY_ADDRESS must be host:port of the cluster's head (usually port 6379) or auto, but got {address!r}. "
            "To send a study to a dashboard address use `luthier submit study.yaml --address http://…`."
        )
    if address != "auto":
        return address if ":" in address else f"{address}:6379"
    head = address_of_this_machine()
    if not head:
        raise ClusterError(
            "RAY_ADDRESS=auto means the cluster of this machine, but none is running here. Start one with "
            "`ray start --head`, give its host:port, or unset RAY_ADDRESS to start a local one."
        )
    return head


def _shipped_packages() -> dict[str, Any] | None:
    """Runtime environment that ships this checkout's packages to every worker.

    None for an installed Luthier.
    """
    if not shipping.is_checkout():
        return None
    folders = shipping.package_folders()
    shipping.check_size([file for folder in folders for file in shipping.shipped_files(folder)])
    return {"py_modules": [str(folder) for folder in folders], "excludes": list(shipping.EXCLUDES)}


def _describe(started: bool) -> Cluster:
    context = ray.get_runtime_context()
    url = dashboard_address()
    return Cluster(
        address=str(context.gcs_address),
        dashboard=f"http://{url}" if url else None,
        started=started,
    )
