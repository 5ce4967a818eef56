"""A synthetic study, followers of its journal, the contents of an MLflow database, and servers that fail."""

from __future__ import annotations

import http.server
import math
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from orchestrator.cli import app
from orchestrator.record.journal import Journal
from orchestrator.running.study_run import plain_spec
from orchestrator.running.tracking_process import MODULE, summarizer
from orchestrator.study_file.schema import StudySpec
from orchestrator.study_file.yaml_text import write_yaml
from orchestrator.tracking.follower import FollowerSettings, GiveUp, MlflowFollower
from orchestrator.tracking.process import TrackingProcess

SPEC = {
    "name": "pets",
    "data": {"source": "digits"},
    "model": {"name": "digits_vit"},
    "search": {"epochs": 3, "batch_size": 64},
}


def write_study(journal: Journal, trials: int = 4, finish: bool = True, curves: dict[str, Any] | None = None) -> None:
    """Record complete, pruned, failed and interrupted trials in turn; trial 0 has a NaN in unit 1.

    Args:
        curves: of every result.
    """
    journal.append("study_started", study="pets", spec=SPEC, versions={"ray": "1"}, dataset_digest="d" * 64)
    for number in range(trials):
        trial_id = f"t{number}"
        ending = number % 4
        suggest(journal, trial_id, number)
        journal.append("trial_started", trial_id=trial_id, node=None, pid=None)
        for unit in range(1, 4 if ending == 0 else 3):
            metrics = {"val/acc": 0.5 + unit / 10, "train/loss": math.nan if (number, unit) == (0, 1) else 1 / unit}
            if unit == 3:
                metrics |= {"best/val/acc": 0.8, "best/epoch": 3, "test/acc": 0.7, "ood/mean/acc": 0.6, "pid": 3}
            journal.append("result", trial_id=trial_id, unit=unit, metrics=metrics, node="n1", curves=curves or {})
        if ending < 2:
            journal.append("trial_finished", trial_id=trial_id, state=("complete", "pruned")[ending])
        else:
            journal.append("trial_failed", trial_id=trial_id, reason=("nan", "interrupted")[ending - 2], error="E: x")
    if finish:
        journal.append("study_finished", state="complete")


def make_study(storage: Path, uri: str | None = None) -> tuple[StudySpec, Path]:
    """A study's spec, and its folder with the copy of its file, as a run leaves it."""
    fields: dict[str, Any] = {"name": "pets", "data": {"source": "digits"}, "model": {"name": "digits_vit"}}
    fields |= {"strategies": ["full"], "storage": str(storage), "tracking": {"uri": uri}}
    spec = StudySpec.from_fields(fields)
    (storage / "pets").mkdir()
    (storage / "pets" / "study.yaml").write_text(write_yaml(plain_spec(spec)))
    return spec, storage / "pets"


def luthier(*args: str | Path) -> Result:
    """Run the command in the test's process."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def suggest(journal: Journal, trial_id: str, number: int, **hparams: Any) -> None:
    journal.append(
        "trial_suggested", trial_id=trial_id, number=number, strategy="full", label="full", seed=7, role="search",
        hparams={"lr_backbone": 1e-4, "lr_head": 0.01, "momentum": 0.9, **hparams}, held_out=None,
        config_hash=f"h{number}", search_values={},
    )  # fmt: skip


def contents(database: Path, experiment: str | None = None) -> dict[str, list[Any]]:
    """Contents of the active runs (of one experiment), without MLflow's random ids."""
    with sqlite3.connect(database) as connection:

        def rows(query: str) -> list[Any]:
            return sorted(connection.execute(query, {"name": experiment}).fetchall(), key=repr)

        in_experiment = "(:name is null or experiment_id = (select experiment_id from experiments where name = :name))"
        active = f"lifecycle_stage = 'active' and {in_experiment}"
        of = f"join (select run_uuid, name as run from runs where {active}) using (run_uuid)"
        return {
            "runs": rows(f"select name, status, start_time, end_time from runs where {active}"),
            "metrics": rows(f"select run, key, value, timestamp, step from metrics {of}"),
            "params": rows(f"select run, key, value from params {of}"),
            "tags": rows(f"select run, key, value from tags {of} where key != 'mlflow.parentRunId'"),
            "inputs": rows("select destination_id, source_id from inputs"),
        }


def settings(journal: Path, target: Path | str, **changes: Any) -> FollowerSettings:
    """Settings of a delivery to a database (artifacts beside it) or to a server."""
    fields: dict[str, Any] = {"experiment": "pets", "study": "pets", "poll_s": 0.02}
    if isinstance(target, Path):
        fields |= {"uri": f"sqlite:///{target}", "artifact_location": (target.parent / "artifacts").as_uri()}
    else:
        fields |= {"uri": target}
    return FollowerSettings(journal=str(journal), **(fields | changes))


def follower(journal: Path, target: Path | str, *, all_pictures: bool = False, **options: Any) -> MlflowFollower:
    """A follower in the test's own process.

    Args:
        options: of `FollowerSettings` and `MlflowFollower`.
    """
    names = ("delivered", "is_abandoned", "lock", "on_change", "exporter")
    arguments = {name: options.pop(name) for name in names if name in options}
    return MlflowFollower(settings(journal, target, **options), summarizer(all_pictures), **arguments)


def tracking_process(journal: Path, target: Path | str, **changes: Any) -> TrackingProcess:
    """A delivery in a process of its own, as the driver of a study starts it."""
    return TrackingProcess(settings(journal, target, **changes), MODULE)


class FollowerThread:
    """A follower in a thread of the test's process, where MLflow's client can be patched while it runs."""

    def __init__(self, followed: MlflowFollower) -> None:
        self.follower = followed
        self._finishing = threading.Event()
        self._limit: GiveUp | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def backlog(self) -> int:
        """Number of events that are not delivered."""
        return self.follower.backlog

    @property
    def problem(self) -> str | None:
        """The server's last failure."""
        return self.follower.problem

    def start(self) -> FollowerThread:
        """Start to follow."""
        self._thread.start()
        return self

    def close(self, timeout_s: float = 30.0, patience_s: float = 30.0) -> int:
        """Deliver what remains; returns the number of events that are not delivered."""
        self._limit = self._limit or GiveUp(timeout_s, patience_s)
        self._finishing.set()
        self._thread.join()
        return self.backlog

    def __enter__(self) -> FollowerThread:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        self.follower.run(self._finishing, self._is_over)

    def _is_over(self) -> bool:
        return self._limit is not None and self._limit.is_due(self.follower.problem, self.follower.progress)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        tick.wait(0.02)


def serve(answer: Callable[[http.server.BaseHTTPRequestHandler], object]) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            """Keep the test's output clean."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def fail_with(status: int, body: bytes) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer
