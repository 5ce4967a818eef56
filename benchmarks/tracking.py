"""What tracking costs per run: Luthier's delivery against MLflow's own calls for the same contents.

    python -m benchmarks.tracking --trials 100 --interval 0.3

A synthetic journal of one-epoch trials (98 metrics, five curves and eight parameters each) goes to MLflow on a SQLite
file, three times:

    floor      create_run, log_batch, log_inputs, log_text and set_terminated, once per run, with contents that are
               ready: the least that a program spends
    backlog    a follower delivers the finished journal
    beside     the tracking process delivers while the trials are recorded, one per `--interval` seconds

Prints one JSON object: wall and CPU seconds per run, their ratios to the floor, and how many events were left when the
study ended. The summary of the study (leaderboard, report, pictures of the best trials) is timed alone: it is made once
per study, and the floor has none.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from orchestrator.record.journal import Journal
from orchestrator.running.tracking_process import MODULE, summarizer
from orchestrator.tracking.follower import FollowerSettings, JournalReader, MlflowFollower, SendBuffer
from orchestrator.tracking.process import TrackingProcess
from orchestrator.tracking.run_update import RunUpdate
from orchestrator.tracking.writer import MlflowWriter

METRICS = 98
LAYERS = [f"blocks.{index}.norm1" for index in range(12)]
CLOSING_TIMEOUT_S = 600.0


def curves() -> dict[str, Any]:
    """Curves of the size that a trial of a small vision transformer has."""
    rising = [index / 12 for index in range(12)]
    return {
        "change": {"columns": {"tensor": [f"t{index}" for index in range(60)], "relative": [0.1] * 60}, "note": ""},
        "change_by_stage": {"columns": {"stage": LAYERS, "l2": rising}, "note": "per stage"},
        "cka": {"columns": {"layer": LAYERS, "cka": rising}, "note": "against the pretrained network"},
        "ln_shift": {"columns": {"layer": LAYERS, "gamma": rising, "beta": rising}, "note": "L2"},
        "plasticity": {"columns": {"block": LAYERS, "mha": rising, "fc1": rising, "fc2": rising}, "note": "P"},
    }


def record_trial(journal: Journal, number: int) -> None:
    """Record one complete trial of one unit."""
    hparams = {"lr_backbone": 1e-4, "lr_head": 0.01, "momentum": 0.9, "weight_decay": 0.0}
    trial_id = f"t{number}"
    journal.append(
        "trial_suggested", trial_id=trial_id, number=number, strategy="full", label="full", seed=0, role="search",
        hparams=hparams, held_out=None, config_hash=f"h{number}", search_values={},
    )  # fmt: skip
    journal.append("trial_started", trial_id=trial_id, node="n1", pid=1)
    accuracy = 0.5 + (number % 40) / 100
    metrics = {f"val/m{index}": 0.5 for index in range(METRICS - 4)}
    metrics |= {"val/acc": accuracy, "best/val/acc": accuracy, "best/epoch": 1.0, "test/acc": accuracy}
    journal.append("result", trial_id=trial_id, unit=1, metrics=metrics, curves=curves(), node="n1")
    journal.append("trial_finished", trial_id=trial_id, state="complete")


def start_study(journal: Journal) -> None:
    """Record the start of the study."""
    spec = {"name": "bench", "search": {"epochs": 1, "batch_size": 64}, "data": {"source": "digits"}}
    journal.append("study_started", study="bench", spec=spec, dataset_digest="d" * 64, dataset="digits")


def settings(journal: Journal, folder: Path) -> FollowerSettings:
    """Settings of a delivery to a database that exists."""
    MlflowWriter(f"sqlite:///{folder}/mlflow.db", "bench", "none", (folder / "artifacts").as_uri())
    return FollowerSettings(journal=str(journal.path), uri=f"sqlite:///{folder}/mlflow.db", experiment="bench")


def floor(journal: Journal, folder: Path) -> dict[str, float]:
    """MLflow's own calls for the runs of a journal."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    from orchestrator.tracking.client import dataset_input

    target = settings(journal, folder)
    client = MlflowClient(target.uri, target.uri)
    experiment = client.get_experiment_by_name("bench").experiment_id
    buffer = SendBuffer()
    buffer.add(JournalReader(journal.path, "bench", summarizer()).read())
    runs = [(update, rendered(update)) for update in buffer]
    with timed() as times:
        for update, texts in runs:
            run_id = client.create_run(experiment, update.start, update.tags, update.name).info.run_id
            metrics = [Metric(key, value, stamp, step) for key, value, stamp, step in update.points]
            client.log_batch(run_id, metrics, [Param(key, value) for key, value in update.params.items()])
            if update.dataset is not None:
                client.log_inputs(run_id, [dataset_input(*update.dataset)])
            for name, text in texts.items():
                client.log_text(run_id, text, name)
            client.set_terminated(run_id, update.status or "FINISHED", update.end)
    return per_run(times, len(runs))


def rendered(update: RunUpdate) -> dict[str, str]:
    """Texts of a run's artifacts."""
    return {name: render().decode() for name, render in update.files.items()}


def backlog(journal: Journal, folder: Path, trials: int) -> tuple[dict[str, float], dict[str, float]]:
    """A follower on a finished journal: per run, and for the summary of the study."""
    target = settings(journal, folder)
    with timed() as runs:
        deliver(target)
    journal.append("study_finished", state="complete")
    with timed() as summary:
        deliver(target)
    return per_run(runs, trials + 1), summary


def deliver(target: FollowerSettings) -> None:
    """Deliver everything (RuntimeError: something was not accepted)."""
    left = MlflowFollower(target, summarizer()).finish(CLOSING_TIMEOUT_S)
    if left:
        raise RuntimeError(f"Everything must be delivered, but {left} events are not.")


def beside(folder: Path, trials: int, interval_s: float) -> dict[str, float]:
    """The tracking process beside trials that are recorded one after another."""
    with Journal(folder / "journal.jsonl") as journal:
        process = TrackingProcess(settings(journal, folder), MODULE).start()
        start_study(journal)
        while process.delivered_offset == 0:
            time.sleep(0.1)
        child = psutil.Process(process.pid)
        start_cpu_s = cpu_seconds(child)
        began = time.perf_counter()
        for number in range(trials):
            record_trial(journal, number)
            time.sleep(max(0.0, began + (number + 1) * interval_s - time.perf_counter()))
        left = process.backlog
        cpu_s = cpu_seconds(child) - start_cpu_s
        memory = child.memory_info().rss
        journal.append("study_finished", state="complete")
        closing = time.perf_counter()
        outstanding = process.close(CLOSING_TIMEOUT_S)
    return {
        "cpu_s_per_run": cpu_s / trials,
        "events_left_at_the_last_trial": left,
        "closing_s": time.perf_counter() - closing,
        "events_left_at_the_end": outstanding,
        "start_cpu_s": start_cpu_s,
        "memory_mib": memory / 2**20,
    }


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process."""
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Wall and CPU seconds of a block in this process."""
    times = dict[str, float]()
    wall = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF)
    yield times
    after = resource.getrusage(resource.RUSAGE_SELF)
    times["wall_s"] = time.perf_counter() - wall
    times["cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def per_run(times: dict[str, float], runs: int) -> dict[str, float]:
    """Seconds per run."""
    return {f"{name}_per_run": seconds / runs for name, seconds in times.items()}


def main() -> None:
    """Measure all sides and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--interval", type=float, default=0.3, help="seconds between two trials")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = {name: Path(folder) / name for name in ("recorded", "floor", "backlog", "beside")}
        for part in parts.values():
            part.mkdir()
        with Journal(parts["recorded"] / "journal.jsonl") as journal:
            start_study(journal)
            for number in range(args.trials):
                record_trial(journal, number)
            least = floor(journal, parts["floor"])
            delivered, summary = backlog(journal, parts["backlog"], args.trials)
        during = beside(parts["beside"], args.trials, args.interval)
    ratios = {
        "backlog_wall": delivered["wall_s_per_run"] / least["wall_s_per_run"],
        "backlog_cpu": delivered["cpu_s_per_run"] / least["cpu_s_per_run"],
        "beside_cpu": during["cpu_s_per_run"] / least["cpu_s_per_run"],
    }
    print(
        json.dumps(
            {
                "trials": args.trials,
                "interval_s": args.interval,
                "floor": least,
                "backlog": delivered,
                "beside": during,
                "summary_of_the_study": summary,
                "times_the_floor": ratios,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
