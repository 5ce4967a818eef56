"""One way to a Ray cluster for every command: join the one of RAY_ADDRESS, or start a local one for as long as needed.

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
from orchestrator.cluster.resources import ResourceError, check_resources, gpu_share, trial_resources

__all__ = [
    "Cluster",
    "ClusterError",
    "ResourceError",
    "check_resources",
    "connect",
    "gpu_share",
    "trial_resources",
]

logger = logging.getLogger(__name__)

KNOBS: Mapping[str, str] = {
    # Half of Tune's cost per short trial is CSV and TensorBoard files that nobody reads beside the journal.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Our own progress display replaces Tune's tables; the newer reporter prints some even when it is told not to.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A trial's process would sit in a folder of Tune's, and not take its next trial once that folder has gone.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # What a trial died of is in the journal, in one line; Tune prints Ray's traceback of every attempt.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # On Ctrl-C Tune would return as if the study were complete; let KeyboardInterrupt through.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_THRESHOLD_S": "10",
    # A validation domain is measured at rungs and at the end; Tune would stop everything at the first unit without it.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # A GPU machine of an autoscaled cluster takes minutes to come; that is no reason for a warning each minute.
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S_AUTOSCALER": "900",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of Ray and Tune while connected; a variable that the user has set already wins."""

LOCAL_KNOBS: Mapping[str, str] = {
    # Seconds after which Ray ends a process whose head has gone: that of a local cluster never comes back.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}
"""Likewise, for a cluster that this process starts."""


@contextlib.contextmanager
def connect(
    cpus: int | None = None,
    gpus: int | None = None,
    *,
    address: str | None = None,
    dashboard: bool = True,
    insecure: bool = False,
    log_to_driver: bool = False,
) -> Iterator[Cluster]:
    """Connect this process to a Ray cluster for the length of a `with` block.

    The address is `address`, else RAY_ADDRESS; without either (or with "local") a cluster of this machine is started,
    with token authentication, its dashboard on 127.0.0.1, its files in a folder of its own; it is stopped at the end.
    A connection that the process already has is used and left as it is. Within the block Ctrl-C and SIGTERM both raise
    KeyboardInterrupt, also out of `Tuner.fit`, and Tune does not publish the AWS keys of this process.

    Args:
        cpus: CPU cores that a local cluster may use; None = all. Ignored when joining.
        gpus: GPUs likewise.
        dashboard: whether a local cluster serves the Ray dashboard.
        insecure: join even a network cluster that asks for no token.
        log_to_driver: print what trials write to stdout and stderr.

    Raises:
        ClusterError: the cluster cannot or must not be joined.
    """
    wanted = address or os.environ.get("RAY_ADDRESS") or "local"
    started = wanted == "local"
    with environment({**KNOBS, **(LOCAL_KNOBS if started else {})}), sigterm_restored():
        import ray

        from orchestrator.ray_internals import keep_aws_keys_private

        keep_aws_keys_private()
        if ray.is_initialized():
            yield _describe(started=False)
            return
        common = {"logging_level": logging.ERROR, "log_to_driver": log_to_driver}
        opened = _local(cpus, gpus, dashboard, common) if started else _joined(wanted, insecure, common)
        with opened:
            try:
                with sigterm_as_interrupt():
                    yield _describe(started)
            finally:
                ray.shutdown()


@contextlib.contextmanager
def _local(cpus: int | None, gpus: int | None, dashboard: bool, common: dict[str, Any]) -> Iterator[None]:
    """Start a cluster of this machine; the caller shuts it down, its folder goes unless the block failed."""
    import ray

    from orchestrator.ray_internals import session_folder

    # Unix sockets lie in the folder and their paths may have 107 bytes: macOS's own temporary folder is too long.
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 24 else "/tmp"
    folder = tempfile.mkdtemp(prefix="luthier-", dir=parent)
    shown = {"dashboard_host": "127.0.0.1", "dashboard_port": free_port()} if dashboard else {}
    ensure_token()
    with _authentication("token"):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=dashboard,
                **session_folder(folder),
                **shown,
                **common,
            )
            yield
        except (ValueError, KeyboardInterrupt):
            # A mistake in the study, or a wish of the user: nothing in Ray's logs would explain it.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except Exception:
            logger.warning("The local cluster's own logs are kept in %s", folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _joined(address: str, insecure: bool, common: dict[str, Any]) -> Iterator[None]:
    """Join a running cluster after looking at who may use it."""
    import ray

    from orchestrator.ray_internals import JOB_VARIABLE

    if JOB_VARIABLE in os.environ:
        # The cluster itself started this process, with its own token and working directory.
        ray.init(address=address, **common)
        yield
        return
    target = _gcs_address(address)
    token = find_token()
    # The probe speaks plain gRPC; where Ray is set up for mutual TLS, certificates already say who may come in.
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
    """Ray's authentication mode for the length of a block; Ray finds the token in the places of `find_token`."""
    try:
        with environment({"RAY_AUTH_MODE": mode}, override=True):
            refresh_ray_auth()
            yield
    finally:
        refresh_ray_auth()


def _gcs_address(address: str) -> str:
    """`host:port` of the head, from what stands in RAY_ADDRESS."""
    if address.startswith(("http://", "https://", "ray://")):
        raise ClusterError(
            f"RAY_ADDRESS must be host:port of the cluster's head (usually port 6379) or auto, but got {address!r}. "
            "To send a study to a dashboard address use `luthier submit study.yaml --address http://…`."
        )
    if address != "auto":
        return address if ":" in address else f"{address}:6379"
    from orchestrator.ray_internals import address_of_this_machine

    running = address_of_this_machine()
    if not running:
        raise ClusterError(
            "RAY_ADDRESS=auto means the cluster of this machine, but none is running here. Start one with "
            "`ray start --head`, give its host:port, or unset RAY_ADDRESS to start a local one."
        )
    return running


def _shipped_packages() -> dict[str, Any] | None:
    """The runtime environment that puts this checkout's packages on every worker; None for an installed Luthier."""
    if not shipping.is_checkout():
        return None
    folders = shipping.package_folders()
    shipping.check_size([file for folder in folders for file in shipping.shipped_files(folder)])
    return {"py_modules": [str(folder) for folder in folders], "excludes": list(shipping.EXCLUDES)}


def _describe(started: bool) -> Cluster:
    import ray

    from orchestrator.ray_internals import dashboard_address

    context = ray.get_runtime_context()
    url = dashboard_address()
    return Cluster(
        address=str(context.gcs_address),
        dashboard=f"http://{url}" if url else None,
        started=started,
    )
