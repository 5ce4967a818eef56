"""`luthier submit`: runs a study on a cluster as a Ray job and follows it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import ray
from ray.job_submission import JobSubmissionClient

from orchestrator.cluster import shipping
from orchestrator.cluster.auth import ClusterError, check_access, find_token, is_loopback, probe_dashboard
from orchestrator.cluster.driver_process import environment
from orchestrator.cluster.job import ENDED, INTERRUPTED, Follower
from orchestrator.ray_internals import server_version
from orchestrator.study_file.load import resolved_study
from orchestrator.study_file.yaml_text import write_yaml

ENTRYPOINT = "python -m orchestrator.cli run study.yaml"
STOP_SECONDS = 30
AGENT_PATIENCE_S = 30.0
_FOLDER = "luthier.study_folder"


def submit(
    study_path: str | Path,
    address: str | None = None,
    *,
    token: str | None = None,
    follow: bool = True,
    stop_on_interrupt: bool | None = None,
    insecure: bool = False,
    entrypoint: str = ENTRYPOINT,
    out: TextIO | None = None,
    notes: TextIO | None = None,
) -> int:
    """Submit a study file to the cluster behind a dashboard address.

    The job contains Luthier's packages and a copy of the study with absolute paths; data, weights and storage are not
    uploaded and must be visible to the machines of the cluster. A study that is already running there is followed, not
    started twice; one that has ended is started again and continues from its journal.

    Args:
        study_path: the study file.
        address: `http://host:8265`; None = RAY_API_SERVER_ADDRESS, or RAY_ADDRESS when that is a URL.
        token: the cluster's token; None = as in `orchestrator.cluster.auth.find_token`.
        follow: print the job's output to `out` until it ends; False returns 0 as soon as it is accepted.
        stop_on_interrupt: what Ctrl-C does to the job: True stops it, False leaves it running, None asks on a
            terminal and leaves it running elsewhere. A second Ctrl-C always returns at once.
        insecure: submit even to a network cluster that asks for no token.
        entrypoint: shell command of the job; its folder holds the packages and `study.yaml`.
        out: where the job's output goes (None = stdout).
        notes: where our own lines go (None = stderr).

    Returns:
        The job's exit code; 130 when it was stopped or when following was interrupted.

    Raises:
        StudyError: the study file is wrong.
        ClusterError: the cluster cannot be reached, asks for a token that is missing or wrong, asks for none, or does
            not take jobs.
    """
    out = out or sys.stdout
    notes = notes or sys.stderr
    fields = resolved_study(study_path)
    url = dashboard_url(address)
    host = urlsplit(url).hostname or ""
    token = token or find_token()
    check_access(url, host, probe_dashboard(url, token), insecure)
    for line in cautions(fields, url):
        print(f"Warning: {line}", file=notes)
    client = _client(url, token)
    _compare_versions(client, notes)
    job = _start(client, fields, entrypoint, notes)
    # `ray job stop` sends the token only with RAY_AUTH_MODE=token.
    stop = f"{'RAY_AUTH_MODE=token ' if token else ''}ray job stop --address {url} {job}"
    print(f"Follow it (again) with the same command; stop it with: {stop}", file=notes)
    if not follow:
        return 0
    return _follow_with_interrupts(Follower(client, job, out), stop_on_interrupt, notes)


def dashboard_url(address: str | None) -> str:
    """The URL of a cluster's dashboard, from the given address or the environment.

    Raises:
        ClusterError: no address, or one of another kind.
    """
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if address and "://" not in address:
        url = f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(
            f"Submitting needs the address of the cluster's dashboard, but got {url or 'none'!r}. "
            "Give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def cautions(study: Mapping[str, Any], url: str) -> list[str]:
    """What may go wrong when the cluster behind `url` is another machine, one sentence each."""
    parts = urlsplit(url)
    if is_loopback(parts.hostname or ""):
        return []
    sentences = []
    if parts.scheme == "http":
        sentences.append(f"the token travels to {parts.netloc} unencrypted; use an SSH tunnel or https.")
    tracking = str((study.get("tracking") or {}).get("uri") or "")
    if tracking.startswith("http") and is_loopback(urlsplit(tracking).hostname or ""):
        sentences.append(f"tracking.uri {tracking} means the cluster's head node there, not this machine.")
    sentences.append(f"storage {study['storage']} must be one folder shared by all machines of the cluster.")
    return sentences


def submission_id(fields: Mapping[str, Any], attempt: int) -> str:
    """The job's id.

    Equal for equal studies, so that a study cannot run twice at the same time.
    """
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(fields["name"]))
    return f"luthier-{name}-{digest}-{attempt}"


def _client(url: str, token: str | None) -> JobSubmissionClient:
    """A job client for this address and token, independent of the environment."""
    # RAY_ADDRESS overrides the client's argument unless this variable is set.
    with environment({"RAY_API_SERVER_ADDRESS": url}, override=True):
        for module in (
            "dashboard.modules.dashboard_sdk",
            "dashboard.modules.job.sdk",
            "_private.runtime_env.packaging",
        ):
            logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
        return JobSubmissionClient(url, headers={"Authorization": f"Bearer {token}"} if token else None)


def _compare_versions(client: JobSubmissionClient, notes: TextIO) -> None:
    cluster_version = server_version(client) or ray.__version__
    if cluster_version.split(".")[:2] != ray.__version__.split(".")[:2]:
        print(
            f"Warning: the cluster runs Ray {cluster_version}, Luthier here was tested with {ray.__version__}.",
            file=notes,
        )


def _start(client: JobSubmissionClient, fields: Mapping[str, Any], entrypoint: str, notes: TextIO) -> str:
    """Submit the job unless it is already running; returns its submission id."""
    jobs = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
    attempt = 1
    while (job := jobs.get(submission_id(fields, attempt))) and job.status.value in ENDED:
        # Ray accepts an id once, also when its job has ended.
        attempt += 1
    name = submission_id(fields, attempt)
    if job:
        print(f"{name} is already {job.status.value.lower()} on the cluster; following it.", file=notes)
        return name
    folder = f"{fields['storage']}/{fields['name']}"
    for other in jobs.values():
        if (other.metadata or {}).get(_FOLDER) == folder and other.status.value not in ENDED:
            # Two drivers with the same study folder would write the same journal.
            raise ClusterError(
                f"The study {fields['name']!r} is running on the cluster as {other.submission_id}, from another "
                "version of its file. Wait for it, stop it with `ray job stop`, or give this study another name."
            )
    with tempfile.TemporaryDirectory(prefix="luthier-submit-") as code:
        size = shipping.copy_packages(Path(code))
        (Path(code) / "study.yaml").write_text(write_yaml(fields))
        _submit_when_ready(client, name, entrypoint, code, {"study": str(fields["name"]), _FOLDER: folder})
    print(f"Submitted {name} ({size / 2**20:.1f} MiB of code).", file=notes)
    return name


def _submit_when_ready(
    client: JobSubmissionClient, job: str, entrypoint: str, folder: str, metadata: dict[str, str]
) -> None:
    """Submit with retries: a new cluster's job agent takes some seconds to start."""
    deadline = time.monotonic() + AGENT_PATIENCE_S
    while True:
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                metadata=metadata,
                runtime_env={
                    "working_dir": folder,
                    # Ray's default, SIGTERM and SIGKILL 3 s later, leaves no time for checkpoints.
                    "env_vars": {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                },
            )
            return
        except (OSError, RuntimeError) as error:
            if "No available agent" not in str(error):
                raise ClusterError(f"The cluster refused the job: {error}") from error
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"The cluster is up, but for {AGENT_PATIENCE_S:.0f} s no agent of it took the job. Usually another "
                    "Ray on the head node holds the agent's port: restart the head with "
                    "`ray start --head --dashboard-agent-listen-port=<a free port>` (see docs/cluster.md)."
                ) from error
        time.sleep(1.0)


def _follow_with_interrupts(follower: Follower, stop: bool | None, notes: TextIO) -> int:
    """Follow the job; the first Ctrl-C stops it or leaves it running, the second returns."""
    try:
        return follower.run()
    except KeyboardInterrupt:
        print(file=notes)
    try:
        if _ask_to_stop(follower.job, notes) if stop is None else stop:
            stop = True
            print(f"Stopping {follower.job}; it saves its state first (up to {STOP_SECONDS} s).", file=notes)
            follower.client.stop_job(follower.job)
            return follower.run()
    except KeyboardInterrupt:
        print(file=notes)
    state = "is being stopped" if stop else "keeps running on the cluster"
    print(f"{follower.job} {state}.", file=notes)
    return INTERRUPTED


def _ask_to_stop(job: str, notes: TextIO) -> bool:
    if not sys.stdin.isatty():
        return False
    print(f"Stop {job} too? It keeps running otherwise. [y/N] ", end="", file=notes, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
