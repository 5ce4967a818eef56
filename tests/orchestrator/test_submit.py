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
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from orchestrator import shipping
from orchestrator import submit as submission
from orchestrator.cluster import connect
from orchestrator.cluster_auth import ClusterError, probe_dashboard
from orchestrator.driver_process import free_port
from orchestrator.job import Follower
from orchestrator.portable_study import absolute_paths, cautions
from orchestrator.shipping import ShippingError
from orchestrator.submit import dashboard_url, submission_id, submit


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
    url, pause = f"http://127.0.0.1:{dashboard}", Event()
    try:
        for _ in range(300):
            if probe_dashboard(url, token) == "accepted" or process.poll() is not None:
                break
            pause.wait(0.1)
        assert probe_dashboard(url, token) == "accepted", (home / "output").read_text()
        yield Head(url=url, gcs=f"127.0.0.1:{gcs}", token=token)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's token and address but those of a test; a study is whatever stands in its file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)

    def fields(path: str | Path) -> dict[str, Any]:
        return absolute_paths(yaml.safe_load(Path(path).read_text()), Path(path).parent)

    monkeypatch.setattr(submission, "resolved_study", fields)


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
            "import ray, orchestrator; from orchestrator.cluster import connect\n"
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
        name = submission_id(submission.resolved_study(study), 1)
        first, second, out = io.StringIO(), io.StringIO(), _InterruptsAt("ready")
        same = {"token": head.token, "entrypoint": _python(code)}
        assert submit(study, head.url, follow=False, notes=first, **same) == 0
        assert submit(study, head.url, stop_on_interrupt=True, out=out, notes=second, **same) == 130
        assert f"Submitted {name}" in first.getvalue()
        assert re.search(f"{name} is (pending|running) on the cluster already; following it.", second.getvalue())
        assert f"Stopping {name}; it saves its state first (up to 30 s)." in second.getvalue()
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
            assert len(sent) == 3
            assert all(module.startswith("gcs://") for module in sent)
            assert cluster.trial_slots(1, 0) == 2
            cluster.check_shared(Path.cwd(), "s3://bucket/luthier")
            with pytest.raises(ClusterError, match=r"^Data and storage .*, but \S+ does not see /no/such/data\. Put"):
                cluster.check_shared("/no/such/data")
            with connect() as inner:
                assert inner.address == cluster.address
            assert ray.is_initialized()
        assert not ray.is_initialized()
        assert "RAY_AUTH_MODE" not in os.environ
        assert probe_dashboard(head.url, head.token) == "accepted"


@pytest.mark.ray
def test_a_local_cluster_is_private_and_leaves_nothing(tmp_path: Path) -> None:
    import ray

    folders = set(Path(tempfile.gettempdir()).glob("luthier-*"))
    with connect(cpus=1) as cluster:
        assert cluster.started
        assert cluster.dashboard is not None
        assert cluster.dashboard.startswith("http://127.0.0.1:")
        assert probe_dashboard(cluster.dashboard, None) == "missing"
        assert probe_dashboard(cluster.dashboard, (tmp_path / ".ray" / "auth_token").read_text()) == "accepted"
        assert [node["CPU"] for node in cluster.nodes()] == [1.0]
    assert not ray.is_initialized()
    assert set(Path(tempfile.gettempdir()).glob("luthier-*")) == folders


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


class _Jobs:
    """A job client without a cluster: each entry of `tails` is one connection's output, or its failure."""

    def __init__(self, tails: list[list[str] | Exception], status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.tails, self.status, self.code = tails, status, code
        self.submitted: list[str] = []

    async def tail_job_logs(self, job: str) -> Any:
        tail = self.tails.pop(0)
        for text in tail if isinstance(tail, list) else []:
            yield text
        if isinstance(tail, Exception):
            raise tail
        if self.tails:
            raise OSError("connection lost")

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(
            status=SimpleNamespace(value=self.status), driver_exit_code=self.code, message="no such image"
        )

    def submit_job(self, **request: Any) -> None:
        if self.tails:
            failure = self.tails.pop(0)
            assert isinstance(failure, Exception)
            raise failure
        self.submitted.append(request["submission_id"])


class TestFollower:
    def test_a_lost_connection_goes_on_where_it_broke(self) -> None:
        out = io.StringIO()
        tails = [["epoch 1\nepo"], OSError("refused"), ["epoch 1\n", "epoch 2\nep"], ["epoch 1\nepoch 2\nepoch 3\n"]]
        assert Follower(_Jobs(tails), "job", out).run() == 0  # type: ignore[arg-type]
        assert out.getvalue() == "epoch 1\nepoch 2\nepoch 3\n"

    @pytest.mark.parametrize(
        ("status", "code", "returned"),
        [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("STOPPED", None, 130), ("STOPPED", 0, 130)],
    )
    def test_exit_codes(self, status: str, code: int | None, returned: int) -> None:
        out = io.StringIO()
        told = "The job did not start: no such image\n" if (status, code) == ("FAILED", None) else ""
        assert Follower(_Jobs([[]], status, code), "job", out).run() == returned  # type: ignore[arg-type]
        assert out.getvalue() == told

    def test_contact_lost_for_good(self) -> None:
        jobs = _Jobs([OSError("refused")] * 3)
        with pytest.raises(ClusterError) as caught:
            Follower(jobs, "luthier-toy-1", io.StringIO(), patience_s=0.1).run()  # type: ignore[arg-type]
        assert str(caught.value) == (
            "Lost contact with the cluster while following luthier-toy-1: refused. The job goes on; run the same "
            "command again to follow it."
        )


class TestSubmitting:
    def test_waits_for_the_agent(self) -> None:
        jobs = _Jobs([RuntimeError("Request failed with status code 500: No available agent to submit job.")])
        submission._submit_when_ready(jobs, "job", "true", ".", "toy")  # type: ignore[arg-type]
        assert jobs.submitted == ["job"]

    def test_gives_up_with_a_hint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(submission, "AGENT_PATIENCE_S", 0.0)
        jobs = _Jobs([RuntimeError("No available agent to submit job, please try again later.")])
        with pytest.raises(ClusterError) as caught:
            submission._submit_when_ready(jobs, "job", "true", ".", "toy")  # type: ignore[arg-type]
        assert str(caught.value) == (
            "The cluster is up, but for 0 s no agent of it took the job. Usually another Ray on the head node holds "
            "the agent's port: restart the head with `ray start --head --dashboard-agent-listen-port=<a free port>` "
            "(see docs/cluster.md)."
        )

    def test_other_refusals_are_passed_on(self) -> None:
        jobs = _Jobs([RuntimeError("Request failed with status code 413")])
        with pytest.raises(ClusterError, match="The cluster refused the job: Request failed with status code 413"):
            submission._submit_when_ready(jobs, "job", "true", ".", "toy")  # type: ignore[arg-type]

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


class TestShipping:
    def test_only_code_travels(self, tmp_path: Path) -> None:
        size = shipping.copy_packages(tmp_path / "job")
        names = {str(file.relative_to(tmp_path / "job")) for file in (tmp_path / "job").rglob("*") if file.is_file()}
        assert {"orchestrator/submit.py", "trainables/__init__.py", "search_spaces/py.typed"} <= names
        assert not [name for name in names if "__pycache__" in name or "/." in name]
        assert size == sum(f.stat().st_size for f in (tmp_path / "job").rglob("*") if f.is_file()) < 5 * 2**20

    def test_too_large(self, tmp_path: Path) -> None:
        (tmp_path / "weights.safetensors").write_bytes(bytes(3 * 2**20))
        (tmp_path / "model.py").write_text("x")
        with pytest.raises(ShippingError) as caught:
            shipping.check_size([tmp_path / "weights.safetensors", tmp_path / "model.py"], limit_bytes=2 * 2**20)
        assert str(caught.value) == (
            "Luthier's packages must stay below 2 MiB to be sent to a cluster, but they hold 3 MiB. The largest files: "
            f"{tmp_path}/weights.safetensors (3 MiB), {tmp_path}/model.py (0 MiB). "
            "Move data and weights out of the packages; studies name them by path."
        )

    def test_relative_paths_are_taken_from_the_studys_folder(self) -> None:
        fields = {
            "name": "pets",
            "data": {"source": "folder", "root": "images"},
            "model": {"name": "local-dir:models/vit", "weights": "w.safetensors"},
            "tracking": {"uri": "sqlite:///runs.db"},
            "storage": "../studies",
        }
        assert absolute_paths(fields, Path("/home/ann/pets")) == {
            "name": "pets",
            "data": {"source": "folder", "root": "/home/ann/pets/images"},
            "model": {"name": "local-dir:/home/ann/pets/models/vit", "weights": "/home/ann/pets/w.safetensors"},
            "tracking": {"uri": "sqlite:////home/ann/pets/runs.db"},
            "storage": "/home/ann/pets/../studies",
        }
        assert fields["data"] == {"source": "folder", "root": "images"}

    def test_absolute_paths_and_urls_stay(self) -> None:
        fields = {
            "data": {"source": "digits"},
            "model": {"name": "resnet18"},
            "tracking": {"uri": "http://mlflow:5000"},
            "storage": "s3://bucket/luthier",
        }
        assert absolute_paths(fields, Path("/home/ann")) == fields
        assert absolute_paths({"data": {"root": "/data"}}, Path("/home/ann")) == {
            "data": {"root": "/data"},
            "storage": "/home/ann/studies",
        }

    def test_cautions(self) -> None:
        study = {"storage": "/home/ann/studies", "tracking": {"uri": "http://127.0.0.1:5000"}}
        assert cautions(study, "http://127.0.0.1:8265") == []
        assert cautions(study, "http://10.0.0.7:8265") == [
            "the token travels to 10.0.0.7:8265 unencrypted; use an SSH tunnel or https.",
            "tracking.uri http://127.0.0.1:5000 means the cluster's head node there, not this machine.",
            "storage /home/ann/studies must be one folder shared by all machines of the cluster.",
        ]
        assert cautions({"storage": "s3://bucket"}, "https://ray.example.org") == []
