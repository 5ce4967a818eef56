"""Following a job: output exactly once, exit codes, lost connections and Ctrl-C; no cluster is started here."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.cluster.auth import ClusterError
from orchestrator.cluster.job import Follower
from orchestrator.commands.submit import _follow_with_interrupts


class _Jobs:
    """A job client without a cluster: each entry of `tails` is one connection's output, or its failure."""

    def __init__(self, tails: list[list[str] | Exception], status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.tails = tails
        self.status = status
        self.code = code

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


class TestFollower:
    def test_a_lost_connection_continues_where_it_broke(self) -> None:
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
        expected = "The job did not start: no such image\n" if (status, code) == ("FAILED", None) else ""
        assert Follower(_Jobs([[]], status, code), "job", out).run() == returned  # type: ignore[arg-type]
        assert out.getvalue() == expected

    def test_contact_lost_for_good(self) -> None:
        jobs = _Jobs([OSError("refused")] * 3)
        with pytest.raises(ClusterError) as caught:
            Follower(jobs, "luthier-toy-1", io.StringIO(), patience_s=0.1).run()  # type: ignore[arg-type]
        assert str(caught.value) == (
            "Lost the connection to the cluster while following luthier-toy-1: refused. The job keeps running; run the "
            "same command again to follow it."
        )


class _InterruptedJobs(_Jobs):
    """The person presses Ctrl-C during the first connections."""

    def __init__(self, interrupts: int, status: str) -> None:
        super().__init__([["epoch 1\n"], []], status, None)
        self.interrupts = interrupts
        self.stopped = False

    async def tail_job_logs(self, job: str) -> Any:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        yield "stopping\n"

    def stop_job(self, job: str) -> None:
        self.stopped = True


class TestCtrlC:
    @pytest.mark.parametrize(
        ("stop", "answer", "terminal", "stopped"),
        [
            (None, "", False, False),
            (None, "\n", True, False),
            (None, "y\n", True, True),
            (False, "", True, False),
            (True, "", False, True),
        ],
    )
    def test_once(
        self, stop: bool | None, answer: str, terminal: bool, stopped: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keyboard = io.StringIO(answer)
        monkeypatch.setattr(keyboard, "isatty", lambda: terminal)
        monkeypatch.setattr(sys, "stdin", keyboard)
        jobs = _InterruptedJobs(1, "STOPPED")
        notes = io.StringIO()
        follower = Follower(jobs, "luthier-toy-1", io.StringIO())  # type: ignore[arg-type]
        assert _follow_with_interrupts(follower, stop, notes) == 130
        assert jobs.stopped == stopped
        assert ("Stop luthier-toy-1 too? It keeps running otherwise. [y/N]" in notes.getvalue()) == (
            terminal and stop is None
        )
        assert ("luthier-toy-1 keeps running on the cluster." in notes.getvalue()) != stopped

    def test_twice_returns_while_the_job_is_still_stopping(self) -> None:
        jobs = _InterruptedJobs(2, "RUNNING")
        notes = io.StringIO()
        follower = Follower(jobs, "luthier-toy-1", io.StringIO())  # type: ignore[arg-type]
        assert _follow_with_interrupts(follower, True, notes) == 130
        assert jobs.stopped
        assert notes.getvalue().endswith("luthier-toy-1 is being stopped.\n")
