"""Who may be joined, what a trial may ask, and what the driver process does to itself: no cluster is started here."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from orchestrator.cluster.auth import (
    Access,
    check_access,
    ensure_token,
    find_token,
    is_loopback,
    probe_dashboard,
    probe_gcs,
)
from orchestrator.cluster.connection import (
    NICENESS,
    ClusterError,
    ResourceError,
    check_resources,
    connect,
    trial_resources,
)
from orchestrator.cluster.driver_process import (
    environment,
    free_port,
    sigterm_as_interrupt,
    sigterm_restored,
)
from orchestrator.cluster.resources import trial_slots
from orchestrator.errors import Terminated
from orchestrator.ray_internals import keep_aws_keys_private

SMALL, LARGE, GPU = {"CPU": 2.0}, {"CPU": 32.0}, {"CPU": 4.0, "GPU": 2.0}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)


class TestResources:
    def test_c5_more_than_the_largest_machine_would_wait_for_ever(self) -> None:
        with pytest.raises(ResourceError) as caught:
            check_resources(64, 0, [SMALL, LARGE])
        assert str(caught.value) == (
            "A trial asks for 64 CPUs and 0 GPUs, but the largest machine has 32 CPUs and 0 GPUs: it would wait for "
            "ever. Lower `resources.cpus` or `resources.gpus` in the study, or add a machine of that size to the "
            "cluster."
        )

    def test_cpus_of_one_machine_and_gpus_of_another_do_not_add_up(self) -> None:
        with pytest.raises(ResourceError) as caught:
            check_resources(8, 1, [SMALL, LARGE, GPU])
        assert str(caught.value).startswith(
            "A trial asks for 8 CPUs and 1 GPU, but the largest machine has 32 CPUs and 0 GPUs or 4 CPUs and 2 GPUs: "
        )

    def test_no_machine(self) -> None:
        with pytest.raises(ResourceError, match="but the cluster has no machine yet: it would wait for ever"):
            check_resources(1, 0, [])

    @pytest.mark.parametrize(("cpus", "gpus"), [(2, 0), (0.5, 0), (32, 0), (4, 1), (1, 0.25), (0, 1)])
    def test_what_fits_passes(self, cpus: float, gpus: float) -> None:
        """It raises nothing; a request for more than the largest machine has beyond it does."""
        check_resources(cpus, gpus, [SMALL, LARGE, GPU])
        with pytest.raises(ResourceError):
            check_resources(cpus + 32.5, gpus, [SMALL, LARGE, GPU])

    @pytest.mark.parametrize("gpus", [1.5, 2])
    def test_more_than_one_gpu(self, gpus: float) -> None:
        with pytest.raises(ResourceError) as caught:
            check_resources(1, gpus, [GPU])
        assert str(caught.value) == (
            f"A trial trains on one GPU or a share of it (0 to 1), but got gpus={gpus}. Set `resources.gpus` to 1 in "
            "the study."
        )

    @pytest.mark.parametrize(("cpus", "gpus"), [(0, 0), (-1, 0), (1, -0.5)])
    def test_nothing_or_less_than_nothing(self, cpus: float, gpus: float) -> None:
        with pytest.raises(ResourceError, match="A trial needs at least a share of a CPU or of a GPU, but got cpus="):
            check_resources(cpus, gpus, [GPU])

    def test_auto_takes_a_whole_gpu_where_there_is_one(self) -> None:
        assert trial_resources(2, "auto", [SMALL, GPU]) == {"cpu": 2.0, "gpu": 1.0}
        assert trial_resources(2, "auto", [SMALL]) == {"cpu": 2.0, "gpu": 0.0}
        assert trial_resources(1, 0.25, [GPU]) == {"cpu": 1.0, "gpu": 0.25}

    def test_slots(self) -> None:
        assert trial_slots(1, 0, [SMALL, LARGE]) == 34
        assert trial_slots(2, 1, [SMALL, LARGE, GPU]) == 2
        assert trial_slots(1, 0.4, [GPU]) == 4  # two on each of two GPUs, never one across both
        assert trial_slots(0.5, 0.25, [GPU]) == 8
        assert trial_slots(64, 0, [LARGE]) == 0


class TestToken:
    def test_order_is_rays_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert find_token() is None
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
        assert find_token() == "from-home"
        (tmp_path / "other").write_text("from-path")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
        assert find_token() == "from-path"
        monkeypatch.setenv("RAY_AUTH_TOKEN", "from-variable")
        assert find_token() == "from-variable"

    def test_a_named_file_must_be_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/such/token")
        with pytest.raises(ClusterError) as caught:
            find_token()
        assert str(caught.value) == (
            "RAY_AUTH_TOKEN_PATH must name a file with a token, but got '/no/such/token' (No such file or directory). "
            "Correct the path, or unset it to use ~/.ray/auth_token."
        )

    def test_a_new_token_is_for_its_owner_alone_and_stays(self, tmp_path: Path) -> None:
        token = ensure_token()
        file = tmp_path / ".ray" / "auth_token"
        assert len(token) == 64
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        file.chmod(0o644)  # as Ray itself writes it
        assert ensure_token() == token
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_no_place_for_a_token(self, tmp_path: Path) -> None:
        (tmp_path / ".ray").write_text("a file in the way")
        with pytest.raises(ClusterError, match="Set RAY_AUTH_TOKEN to a secret of your own"):
            ensure_token()


class TestAccess:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "head.localhost"])
    def test_loopback(self, host: str) -> None:
        assert is_loopback(host)

    @pytest.mark.parametrize("host", ["10.0.0.7", "0.0.0.0", "example.org", "localhost.example.org", "", "fe80::1"])
    def test_not_loopback(self, host: str) -> None:
        assert not is_loopback(host)

    def test_an_open_cluster_of_a_network_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ClusterError) as caught:
            check_access("10.0.0.7:6379", "10.0.0.7", "open")
        assert str(caught.value) == (
            "The cluster at 10.0.0.7:6379 asks for no token: anybody who reaches it can run code on it and read your "
            "data. Restart it with token authentication (`ray get-auth-token --generate`, RAY_AUTH_MODE=token before "
            "`ray start`; see docs/cluster.md), or set LUTHIER_INSECURE_CLUSTER=1 if its network is yours alone."
        )
        check_access("10.0.0.7:6379", "10.0.0.7", "open", insecure=True)
        check_access("127.0.0.1:6379", "127.0.0.1", "open")
        check_access("10.0.0.7:6379", "10.0.0.7", "accepted")
        monkeypatch.setenv("LUTHIER_INSECURE_CLUSTER", "1")
        check_access("10.0.0.7:6379", "10.0.0.7", "open")

    @pytest.mark.parametrize(
        ("access", "message"),
        [
            (
                "missing",
                "The cluster at head:6379 asks for a token, but none was found here. Copy ~/.ray/auth_token of the "
                "cluster's head node to this machine's ~/.ray/auth_token, or set RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH.",
            ),
            (
                "wrong",
                "The cluster at head:6379 refuses this machine's token. Copy ~/.ray/auth_token of the cluster's head "
                "node to this machine's ~/.ray/auth_token, or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
            ),
            (
                "unreachable",
                "No Ray cluster answers at head:6379. Check the address, that the cluster is up (`ray status` on its "
                "head node), and that an SSH tunnel to it is open if it needs one.",
            ),
        ],
    )
    def test_messages(self, access: Access, message: str) -> None:
        with pytest.raises(ClusterError) as caught:
            check_access("head:6379", "head", access, insecure=True)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("http://10.0.0.7:8265", "RAY_ADDRESS must be host:port of the cluster's head"),
            ("ray://10.0.0.7:10001", "use `luthier submit study.yaml --address http://…`"),
            ("127.0.0.1:1", "No Ray cluster answers at 127.0.0.1:1"),
        ],
    )
    def test_connect_refuses_before_ray_waits(self, address: str, message: str) -> None:
        with pytest.raises(ClusterError, match=message.replace("(", r"\(")), connect(address=address):
            pytest.fail("connected")


class _Dashboard(BaseHTTPRequestHandler):
    token: str | None = None

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        if self.token is None or given == f"Bearer {self.token}":
            self.send_response(200)
        else:
            self.send_response(401 if given is None else 403)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Keep the test's output quiet."""


@pytest.fixture(params=[None, "right"])
def dashboard(request: pytest.FixtureRequest) -> Iterator[tuple[str, str | None]]:
    """URL and token (None = open) of something that answers like Ray's dashboard."""
    handler = type("Handler", (_Dashboard,), {"token": request.param})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", request.param
    server.shutdown()
    server.server_close()


def test_probe_dashboard(dashboard: tuple[str, str | None]) -> None:
    url, token = dashboard
    if token is None:
        assert probe_dashboard(url, None) == probe_dashboard(url, "any") == "open"
    else:
        assert probe_dashboard(url, None) == "missing"
        assert probe_dashboard(url, "other") == "wrong"
        assert probe_dashboard(url, token) == "accepted"
    assert probe_dashboard(f"http://127.0.0.1:{free_port()}", token) == "unreachable"


@pytest.mark.parametrize("demanded", [None, "right"])
def test_probe_gcs(demanded: str | None) -> None:
    import grpc

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if demanded and ("authorization", f"Bearer {demanded}") not in [
            tuple(m) for m in context.invocation_metadata()
        ]:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    server = grpc.server(futures.ThreadPoolExecutor(1))
    handlers = {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        if demanded is None:
            assert probe_gcs(address, None) == probe_gcs(address, "any") == "open"
        else:
            assert probe_gcs(address, None) == "missing"
            assert probe_gcs(address, "other") == "wrong"
            assert probe_gcs(address, demanded) == "accepted"
    finally:
        server.stop(grace=None)
    assert probe_gcs(f"127.0.0.1:{free_port()}", demanded) == "unreachable"


class TestDriverProcess:
    def test_environment_is_undone_and_does_not_overrule_the_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LUTHIER_TEST_SET", "mine")
        monkeypatch.delenv("LUTHIER_TEST_NEW", raising=False)
        with environment({"LUTHIER_TEST_SET": "other", "LUTHIER_TEST_NEW": "new"}):
            assert (os.environ["LUTHIER_TEST_SET"], os.environ["LUTHIER_TEST_NEW"]) == ("mine", "new")
        with environment({"LUTHIER_TEST_SET": None}, override=True):
            assert "LUTHIER_TEST_SET" not in os.environ
        assert os.environ["LUTHIER_TEST_SET"] == "mine"
        assert "LUTHIER_TEST_NEW" not in os.environ

    def test_sigterm_acts_like_ctrl_c_and_is_given_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with sigterm_restored():
            with pytest.raises(Terminated), sigterm_as_interrupt():
                os.kill(os.getpid(), signal.SIGTERM)
            received: list[int] = []
            ctrl_c = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
            with sigterm_as_interrupt():
                os.kill(os.getpid(), signal.SIGTERM)  # a handler of Ctrl-C (Tune has one) receives it instead
            signal.signal(signal.SIGINT, ctrl_c)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt) as ctrl_c_itself, sigterm_as_interrupt():
                signal.raise_signal(signal.SIGINT)
            assert ctrl_c_itself.type is KeyboardInterrupt
        assert signal.getsignal(signal.SIGTERM) == before

    def test_sigterm_interrupts_even_where_ctrl_c_is_ignored(self) -> None:
        with sigterm_restored():
            ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
            try:
                with pytest.raises(Terminated), sigterm_as_interrupt():
                    os.kill(os.getpid(), signal.SIGTERM)
            finally:
                signal.signal(signal.SIGINT, ctrl_c)

    def test_tune_does_not_publish_aws_keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ray.tune.execution.class_cache import _ActorClassCache

        class Anything:
            pass

        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sentinel-5b1e")
        keep_aws_keys_private()
        description = _ActorClassCache().get(Anything)._default_options["runtime_env"]
        assert "PL_DISABLE_FORK" in description["env_vars"]
        assert "sentinel-5b1e" not in str(description)
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == "sentinel-5b1e"  # the driver's own storage may need it


@pytest.mark.ray
@pytest.mark.parametrize(("given", "variable", "expected"), [(3, None, 3), (0, None, 0), (None, None, 15), (3, "5", 5)])
def test_workers_of_a_local_cluster_add_the_niceness_that_is_given(
    monkeypatch: pytest.MonkeyPatch, given: int | None, variable: str | None, expected: int
) -> None:
    """Ray adds its own 15 otherwise; what the user set for Ray takes precedence."""
    import ray

    before = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(NICENESS, raising=False)
    if variable is not None:
        monkeypatch.setenv(NICENESS, variable)
    with connect(cpus=1, dashboard=False, nice=given):
        worker = ray.get(ray.remote(_niceness).remote())
    assert worker == min(before + expected, 19)
    assert os.environ.get(NICENESS) == variable


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)
