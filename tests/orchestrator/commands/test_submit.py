"""Submitting to a real `ray start --head` cluster with token authentication: its own ports, folder, home and token."""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml

from orchestrator.cluster.auth import ClusterError, probe_dashboard
from orchestrator.cluster.connection import connect
from orchestrator.cluster.driver_process import free_port
from orchestrator.commands import submit as submission
from orchestrator.commands.submit import cautions, dashboard_url, submission_id, submit
from orchestrator.study_file.load import absolute_paths


@dataclass(frozen=True)
class Head:
    url: str
    gcs: str
    token: str


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with two CPUs; its processes are children of the one that is started and end with it."""
    # Sockets lie below the folder and their paths may have 107 bytes: pytest's own folders are too deep.
    home = Path(tempfile.mkdtemp(prefix="lh-", dir="/tmp"))
    token = secrets.token_hex(32)
    gcs, dashboard, agent, client = (free_port() for _ in range(4))
    variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    variables |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={gcs}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", "--num-cpus=2", "--object-store-memory=80000000"),
        *(f"--temp-dir={home}", "--disable-usage-stats"),
    ]
    with (home / "output").open("w") as output:
        process = subprocess.Popen(
            command, env=variables, cwd=home, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{dashboard}"
    pause = Event()
    try:
        for _ in range(300):
            if probe_dashboard(url, token) == "accepted" or process.poll() is not None:
                break
            pause.wait(0.1)
        assert probe_dashboard(url, token) == "accepted", (home / "output").read_text()
        yield Head(url=url, gcs=f"127.0.0.1:{gcs}", token=token)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # Ray sometimes waits for itself
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's token and address but those of a test; a study is whatever stands in its file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(submission, "resolved_study", unchecked_fields)


def unchecked_fields(path: str | Path) -> dict[str, Any]:
    """The fields of any file, with absolute paths."""
    return absolute_paths(yaml.safe_load(Path(path).read_text()), Path(path).parent)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(f"name: toy\ndata: {{source: folder, root: pets}}\nnote: {tmp_path.name}\n")
    return file


def _python(code: str) -> str:
    return f'python -c "{code}"'


@pytest.mark.ray
class TestRealCluster:
    def test_exit_code_and_output_are_the_jobs_and_the_job_reaches_its_cluster(self, head: Head, study: Path) -> None:
        code = (
            "import ray, orchestrator; from orchestrator.cluster.connection import connect\n"
            "with connect() as cluster:\n"
            "    here = ray.get(ray.remote(lambda: __import__('trainables').__file__).remote())\n"
            "    print('started', cluster.started, 'fits', cluster.trial_resources(1, 'auto'))\n"
            "print('same code', here.split('/trainables')[0] == orchestrator.__file__.split('/orchestrator')[0])\n"
            "print(open('study.yaml').read()); raise SystemExit(3)"
        )
        out, notes = io.StringIO(), io.StringIO()
        returned = submit(study, head.url, token=head.token, entrypoint=_python(code), out=out, notes=notes)
        assert returned == 3, out.getvalue()
        assert "started False fits {'cpu': 1.0, 'gpu': 0.0}" in out.getvalue()
        assert "same code True" in out.getvalue()
        assert f"root: {study.parent}/pets" in out.getvalue()
        assert f"storage: {study.parent}/studies" in out.getvalue()
        assert re.search(r"Submitted luthier-toy-[0-9a-f]{8}-1 \(\d\.\d MiB of code\)\.", notes.getvalue())
        assert head.token not in out.getvalue() + notes.getvalue()

    def test_running_job_is_followed_not_doubled_and_ctrl_c_stops_it_gracefully(self, head: Head, study: Path) -> None:
        code = (
            "import signal\n"
            "print('ready', flush=True)\n"
            "try:\n    signal.pause()\nexcept KeyboardInterrupt:\n    print('state saved')"
        )
        name = submission_id(unchecked_fields(study), 1)
        first = io.StringIO()
        second = io.StringIO()
        out = _InterruptsAt("ready")
        same = {"token": head.token, "entrypoint": _python(code)}
        assert submit(study, head.url, follow=False, notes=first, **same) == 0
        text = study.read_text()
        study.write_text(text + "more: 1\n")
        with pytest.raises(ClusterError, match=f"^The study 'toy' is running on the cluster as {name}, ") as refused:
            submit(study, head.url, **same)
        study.write_text(text)
        assert submit(study, head.url, stop_on_interrupt=True, out=out, notes=second, **same) == 130
        assert f"Submitted {name}" in first.getvalue()
        assert re.search(rf"{name} is already (pending|running) on the cluster; following it\.", second.getvalue())
        assert f"Stopping {name}; it saves its state first (up to 30 s)." in second.getvalue()
        assert "from another version of its file. Wait for it, stop it" in str(refused.value)
        lines = out.getvalue().splitlines()
        assert lines.count("ready") == lines.count("state saved") == 1

    def test_no_token_and_a_wrong_token(
        self, head: Head, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        way_out = (
            "Copy ~/.ray/auth_token of the cluster's head node to this machine's ~/.ray/auth_token, or set "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )
        with pytest.raises(ClusterError) as caught:
            submit(study, head.url)
        assert str(caught.value) == f"The cluster at {head.url} asks for a token, but none was found here. {way_out}"
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("f" * 64)
        with pytest.raises(ClusterError) as caught:
            submit(study, head.url)
        assert str(caught.value) == f"The cluster at {head.url} refuses this machine's token. {way_out}"
        with pytest.raises(ClusterError, match="refuses this machine's token"), connect(address=head.gcs):
            pytest.fail("connected")

    def test_a_driver_joins_ships_its_packages_and_leaves_the_cluster_running(
        self, head: Head, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import ray

        monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
        monkeypatch.setenv("RAY_ADDRESS", head.gcs)
        with connect() as cluster:
            assert (cluster.started, cluster.dashboard) == (False, head.url)
            assert os.environ["RAY_AUTH_MODE"] == "token"
            sent = ray.get_runtime_context().runtime_env["py_modules"]
            assert len(set(sent)) == 4
            assert all(module.startswith("gcs://") for module in sent)
            assert ray.get(ray.remote(_shipped_packages).remote()) == [
                "luthier",
                "orchestrator",
                "search_spaces",
                "trainables",
            ]
            assert cluster.trial_slots(1, 0) == 2
            cluster.check_shared(Path.cwd())
            with pytest.raises(ClusterError, match=r"^Data and storage .*, but \S+ does not see /no/such/data\. Give"):
                cluster.check_shared("/no/such/data")
            with connect() as inner:
                assert inner.address == cluster.address
            assert ray.is_initialized()
        assert not ray.is_initialized()
        assert "RAY_AUTH_MODE" not in os.environ
        assert probe_dashboard(head.url, head.token) == "accepted"


@pytest.mark.ray
def test_a_local_cluster_is_private_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    scratch = Path(tempfile.mkdtemp(prefix="lt-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with connect(cpus=1) as cluster:
        assert cluster.started
        assert cluster.dashboard is not None
        assert cluster.dashboard.startswith("http://127.0.0.1:")
        assert probe_dashboard(cluster.dashboard, None) == "missing"
        assert probe_dashboard(cluster.dashboard, (tmp_path / ".ray" / "auth_token").read_text()) == "accepted"
        assert [node["CPU"] for node in cluster.nodes()] == [1.0]
        assert [folder.name[:8] for folder in scratch.iterdir() if folder.is_dir()] == ["luthier-"]
        with pytest.raises(KeyboardInterrupt):
            _tuner_that_is_terminated(tmp_path).fit()
    assert not ray.is_initialized()
    scratch.rmdir()  # fails if anything is left in it


def _shipped_packages() -> list[str]:
    """On a worker: the packages that it would import from what was sent, had it no copy of its own."""
    folders = [Path(entry) for entry in sys.path if "py_modules_files" in entry]
    return sorted({path.parent.name for folder in folders for path in folder.glob("*/__init__.py")})


def _tuner_that_is_terminated(storage: Path) -> Any:
    """A Tune run that would never end; at its first result this process gets SIGTERM."""
    from ray import tune

    class Endless(tune.Trainable):
        def step(self) -> dict[str, float]:
            return {"val/acc": 0.5}

    class Terminates(tune.Callback):
        def on_trial_result(self, *args: Any, **details: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    return tune.Tuner(
        tune.with_resources(Endless, {"cpu": 1, "gpu": 0}),
        run_config=tune.RunConfig(
            storage_path=str(storage),
            callbacks=[Terminates()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


class _InterruptsAt(io.StringIO):
    """Presses Ctrl-C when a word is printed for the first time."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word: str | None = word

    def write(self, text: str) -> int:
        written = super().write(text)
        # The job's log begins with its command, which holds the word as well: wait for a line of its own.
        if self.word and self.word in self.getvalue().splitlines():
            self.word = None
            signal.raise_signal(signal.SIGINT)
        return written


class _Refusing:
    """A job client that refuses with these errors, one after the other, and then accepts."""

    def __init__(self, *refusals: Exception) -> None:
        self.refusals = list(refusals)
        self.submitted = list[str]()

    def submit_job(self, **request: Any) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        self.submitted.append(request["submission_id"])


def test_cautions() -> None:
    study = {"storage": "/home/ann/studies", "tracking": {"uri": "http://127.0.0.1:5000"}}
    assert cautions(study, "http://127.0.0.1:8265") == []
    assert cautions(study, "http://10.0.0.7:8265") == [
        "the token travels to 10.0.0.7:8265 unencrypted; use an SSH tunnel or https.",
        "tracking.uri http://127.0.0.1:5000 means the cluster's head node there, not this machine.",
        "storage /home/ann/studies must be one folder shared by all machines of the cluster.",
    ]


class TestSubmitting:
    def test_waits_for_the_agent(self) -> None:
        jobs = _Refusing(RuntimeError("Request failed with status code 500: No available agent to submit job."))
        submission._submit_when_ready(jobs, "job", "true", ".", {})  # type: ignore[arg-type]
        assert jobs.submitted == ["job"]

    def test_gives_up_with_a_hint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(submission, "AGENT_PATIENCE_S", 0.0)
        jobs = _Refusing(RuntimeError("No available agent to submit job, please try again later."))
        with pytest.raises(ClusterError) as caught:
            submission._submit_when_ready(jobs, "job", "true", ".", {})  # type: ignore[arg-type]
        assert str(caught.value) == (
            "The cluster is up, but for 0 s no agent of it took the job. Usually another Ray on the head node holds "
            "the agent's port: restart the head with `ray start --head --dashboard-agent-listen-port=<a free port>` "
            "(see docs/cluster.md)."
        )

    def test_other_refusals_are_passed_on(self) -> None:
        jobs = _Refusing(RuntimeError("Request failed with status code 413"))
        with pytest.raises(ClusterError, match="The cluster refused the job: Request failed with status code 413"):
            submission._submit_when_ready(jobs, "job", "true", ".", {})  # type: ignore[arg-type]

    def test_addresses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert dashboard_url("head:8265") == dashboard_url("http://head:8265/") == "http://head:8265"
        assert dashboard_url("https://ray.example.org/pets/") == "https://ray.example.org/pets"
        with pytest.raises(ClusterError) as caught:
            dashboard_url(None)
        assert str(caught.value) == (
            "Submitting needs the address of the cluster's dashboard, but got 'none'. "
            "Give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS."
        )
        monkeypatch.setenv("RAY_ADDRESS", "head:6379")
        with pytest.raises(ClusterError, match="but got 'head:6379'"):
            dashboard_url(None)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
        assert dashboard_url(None) == "http://other:8265"
        with pytest.raises(ClusterError, match="but got 'ray://head:10001'"):
            dashboard_url("ray://head:10001")

    def test_name_follows_the_study(self) -> None:
        one = submission_id({"name": "pets of Ann", "search": {"trials": 3}}, 1)
        assert re.fullmatch(r"luthier-pets-of-Ann-[0-9a-f]{8}-1", one)
        assert submission_id({"search": {"trials": 3}, "name": "pets of Ann"}, 1) == one
        assert submission_id({"name": "pets of Ann", "search": {"trials": 4}}, 1) != one
