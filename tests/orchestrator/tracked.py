"""A study that nobody trained, what an MLflow database holds of it, and servers that fail."""

from __future__ import annotations

import http.server
import math
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.record.journal import Journal

SPEC = {
    "name": "pets",
    "data": {"source": "digits"},
    "model": {"name": "digits_vit"},
    "search": {"epochs": 3, "batch_size": 64},
}


def write_study(journal: Journal, trials: int = 4, finish: bool = True) -> None:
    """Complete, pruned, failed and interrupted trials in turn; trial 0 has a NaN in unit 1."""
    journal.append("study_started", study="pets", spec=SPEC, versions={"ray": "1"}, dataset_digest="d" * 64)
    for number in range(trials):
        trial_id, ending = f"t{number}", number % 4
        suggest(journal, trial_id, number)
        journal.append("trial_started", trial_id=trial_id, node=None, pid=None)
        for unit in range(1, 4 if ending == 0 else 3):
            metrics = {"val/acc": 0.5 + unit / 10, "train/loss": math.nan if (number, unit) == (0, 1) else 1 / unit}
            if unit == 3:
                metrics |= {"best/val/acc": 0.8, "best/epoch": 3, "test/acc": 0.7, "ood/mean/acc": 0.6, "pid": 3}
            journal.append("result", trial_id=trial_id, unit=unit, metrics=metrics, node="n1")
        if ending < 2:
            journal.append("trial_finished", trial_id=trial_id, state=("complete", "pruned")[ending])
        else:
            journal.append("trial_failed", trial_id=trial_id, reason=("nan", "interrupted")[ending - 2], error="E: x")
    if finish:
        journal.append("study_finished", state="complete")


def suggest(journal: Journal, trial_id: str, number: int, **hparams: Any) -> None:
    journal.append(
        "trial_suggested", trial_id=trial_id, number=number, strategy="full", label="full", seed=7, role="search",
        hparams={"lr_backbone": 1e-4, "lr_head": 0.01, "momentum": 0.9, **hparams}, held_out=None,
        config_hash=f"h{number}", search_values={},
    )  # fmt: skip


def contents(database: Path, experiment: str | None = None) -> dict[str, list[Any]]:
    """Everything of the active runs (of one experiment) that a person can see, run by run, without MLflow's random
    ids."""
    with sqlite3.connect(database) as connection:

        def rows(query: str) -> list[Any]:
            return sorted(connection.execute(query, {"name": experiment}).fetchall(), key=repr)

        chosen = "(:name is null or experiment_id = (select experiment_id from experiments where name = :name))"
        active = f"lifecycle_stage = 'active' and {chosen}"
        of = f"join (select run_uuid, name as run from runs where {active}) using (run_uuid)"
        return {
            "runs": rows(f"select name, status, start_time, end_time from runs where {active}"),
            "metrics": rows(f"select run, key, value, timestamp, step from metrics {of}"),
            "params": rows(f"select run, key, value from params {of}"),
            "tags": rows(f"select run, key, value from tags {of} where key != 'mlflow.parentRunId'"),
            "inputs": rows("select destination_id, source_id from inputs"),
        }


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline, tick = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
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
