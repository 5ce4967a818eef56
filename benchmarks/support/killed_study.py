"""A tiny study whose driver is killed (SIGKILL) at given moments and restarted until the study is done.

Also reads the contents of a study that must not depend on kills. Used by `benchmarks.kills` and by the tests.

    python -m benchmarks.support.killed_study study.yaml     one driver, on a cluster of its own without a dashboard
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml

from benchmarks.support.synthetic import write_images, write_network
from orchestrator import Study
from orchestrator.record.journal import Journal, fold
from orchestrator.results.leaderboard import COSTS

ROOT = Path(__file__).resolve().parents[2]
VOLATILE = ("status.attempts", "status.node", "tune_trial_id", "luthier.study_uid", "luthier.trial_uid")
"""Tags of MLflow runs that name a run or an attempt."""


def write_material(folder: Path) -> Path:
    """Images and a pretrained network, for any number of studies; returns `folder`."""
    write_images(folder / "images")
    write_network("cnn", folder / "network")
    return folder


def write_study(folder: Path, material: Path, **changes: Any) -> Path:
    """A study of three strategies on drawn shapes, with a storage folder of its own; returns its file."""
    fields: dict[str, Any] = {
        "name": "shapes",
        "data": {"root": str(material / "images"), "id": ["bright", "dim"], "ood": ["inverted", "noisy"]},
        "model": {"name": f"local-dir:{material / 'network'}"},
        "strategies": ["linear_probe", "full", "daft"],
        "search": {"trials": 6, "epochs": 4, "reduction": 2, "seed": 3, "batch_size": 16},
        "confirm": {"top_k": 2, "seeds": 1},
        "resources": {"concurrent": 1, "channels_last": False},
        "storage": str(folder / "studies"),
    }
    for key, value in changes.items():
        fields[key] = {**fields[key], **value} if isinstance(fields.get(key), dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(fields))
    return file


def start(file: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A driver in a session of its own; its output goes to `driver.log` beside the study file."""
    with (file.parent / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.support.killed_study", str(file)], cwd=ROOT, stdout=log, stderr=log,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip


def run_killed(file: Path, moments: Sequence[tuple[int, float]], patience: float = 300.0) -> int:
    """Run a study to its end, its driver killed at each of `moments`; returns how many kills hit.

    Args:
        file: the study file.
        moments: (events, seconds): kill this driver so many seconds after it has written so many events.
        patience: time limit of one driver, in seconds.

    Raises:
        RuntimeError: a driver failed for another reason.
    """
    hits = 0
    for events, seconds in [*moments, (10**9, 0.0)]:
        driver = start(file)
        before = count_events(file)
        if _wait(driver, lambda events=events, before=before: count_events(file) - before >= events, patience):
            threading.Event().wait(seconds)
            if driver.poll() is None:
                driver.send_signal(signal.SIGKILL)
                hits += 1
        code = driver.wait()
        if code == 0:
            return hits
        if code != -signal.SIGKILL:
            raise RuntimeError(f"The driver ended with {code}:\n{(file.parent / 'driver.log').read_text()[-4000:]}")
    raise RuntimeError("The study did not end.")


def count_events(file: Path) -> int:
    journal = Study.from_yaml(file).folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def _wait(driver: subprocess.Popen[bytes], reached: Any, patience: float) -> bool:
    pause = threading.Event()
    for _ in range(int(patience / 0.02)):
        if driver.poll() is not None:
            return False
        if reached():
            return True
        pause.wait(0.02)
    driver.kill()
    raise RuntimeError(f"The driver did not end within {patience} s.")


@dataclass(frozen=True)
class StudyContents:
    """Contents of a finished study, without times, costs and names of attempts."""

    table: str
    trials: list[dict[str, Any]]
    search: list[tuple[Any, ...]]
    runs: list[dict[str, Any]]

    def differences(self, other: StudyContents) -> list[str]:
        """Names of the parts that are not equal."""
        return [part.name for part in dataclasses.fields(self) if getattr(self, part.name) != getattr(other, part.name)]


def read_contents(file: Path) -> StudyContents:
    """Read leaderboard, journal, Optuna storage and MLflow runs."""
    study = Study.from_yaml(file)
    table = study.results().leaderboard()
    csv = table.drop(columns=list(COSTS)).to_csv(index=False, float_format="%r")
    trials = [
        {
            "number": r.number, "label": r.label, "role": r.role, "seed": r.seed, "hparams": dict(r.hparams),
            "state": r.state, "reason": r.reason, "history": [_without_costs(unit) for unit in r.history],
            "curves": {name: dict(curve) for name, curve in r.curves.items()},
        }
        for r in fold(Journal.read(study.folder / "journal.jsonl"))
    ]  # fmt: skip
    url = f"sqlite:///{study.folder}/optuna.db"
    suggestions = [
        (t.state.name, t.values, t.params, t.intermediate_values)
        for name in ("shapes", "shapes/given")
        for t in optuna.load_study(study_name=name, storage=url).get_trials()
        if "interrupted" not in t.user_attrs
    ]
    return StudyContents(csv, trials, suggestions, _runs(study))


def _runs(study: Study) -> list[dict[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(study.spec.tracking_uri)
    experiment = client.get_experiment_by_name(study.spec.experiment)
    assert experiment is not None
    runs = []
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        points = {
            key: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
            if not key.startswith(("cost/", "system/"))
        }
        tags = {k: v for k, v in run.data.tags.items() if k not in VOLATILE and not k.startswith("mlflow.")}
        name = run.data.tags["mlflow.runName"]
        runs.append(
            {"name": name, "status": run.info.status, "tags": tags, "params": run.data.params, "points": points}
        )
    return sorted(runs, key=lambda run: str(run["name"]))


def _without_costs(unit: Any) -> dict[str, float]:
    return {key: value for key, value in unit.items() if not key.startswith("cost/")}


def _drive(file: Path) -> None:
    from orchestrator.cluster.connection import connect

    with connect(cpus=2, dashboard=False):
        Study.from_yaml(file).run(progress=False)


if __name__ == "__main__":
    _drive(Path(sys.argv[1]))
