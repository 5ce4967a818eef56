"""Training of a landscape's trials in processes of one thread, and the tables of what was trained."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.landscapes.design import Point, first_points, hyperparameters, repeated_points
from benchmarks.landscapes.pairs import PAIRS, prepare
from trainables.engine.trial import Trial
from trainables.specs.errors import NonFiniteError
from trainables.specs.trial_spec import SharedTrialSettings, TrialSpec

TABLES = Path(__file__).parent / "tables"
SCORES = ("train/loss", "val/acc", "val/nll", "test/acc", "test/nll", "ood/mean/acc")
"""Recorded of every unit, beside the accuracy of each OOD domain."""
COSTS = ("cost/images_per_second", "cost/unit_seconds", "cost/trainable_parameters")


def run(source: Path, out: Path, names: list[str], workers: int) -> None:
    """Train what is missing of the named pairs, in turn."""
    for name in names:
        pair = PAIRS[name]
        shared = prepare(name, pair, source, out)
        _in_processes(name, shared, out, first_points(pair), workers)
        _in_processes(name, shared, out, repeated_points(pair, recorded(out, name)), workers)


def _in_processes(name: str, shared: SharedTrialSettings, out: Path, points: list[Point], workers: int) -> None:
    done = {Point(t["strategy"], t["configuration"], t["seed"]) for t in recorded(out, name)}
    missing = [point for point in points if point not in done]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_train, args=(shared, out / name / f"trials-{worker}.jsonl", missing[worker::workers]))
        for worker in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"A process that trains {name} ended with an error; what is finished is kept.")


def _train(shared: SharedTrialSettings, file: Path, points: list[Point]) -> None:
    """Train points one after another; each is a line of the file as soon as it is finished."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file.parent.mkdir(parents=True, exist_ok=True)
    for point in points:
        began = time.perf_counter()
        line = json.dumps(train(shared, point))
        with file.open("a") as lines:
            lines.write(line + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        print(f"{file.parent.name}: {point} {time.perf_counter() - began:.0f} s", flush=True)


def train(shared: SharedTrialSettings, point: Point) -> dict[str, Any]:
    """Train one trial; every unit is evaluated. A diverged one has the units before its loss became infinite."""
    hparams = hyperparameters(point.strategy, point.configuration)
    trial = Trial(TrialSpec(shared=shared, strategy=point.strategy, hparams=hparams, seed=point.seed))
    units: list[dict[str, float]] = []
    diverged = False
    try:
        while not trial.finished:
            metrics = trial.step()
            kept = {key: value for key, value in metrics.items() if key in (*SCORES, *COSTS) or _is_domain(key)}
            units.append({"unit": metrics["unit"], **kept})
    except NonFiniteError:
        diverged = True
    return {**vars(point), "hparams": hparams, "diverged": diverged, "units": units}


def _is_domain(key: str) -> bool:
    return key.startswith("ood/") and key.endswith("/acc") and not key.startswith(("ood/mean/", "ood/worst/"))


def recorded(out: Path, name: str) -> list[dict[str, Any]]:
    """All finished trials of a pair; a line that an interruption cut off is left out."""
    trials = []
    for file in sorted((out / name).glob("trials-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                trials.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return trials


def rows(trials: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per unit of every trial, ordered by strategy, configuration and seed."""
    for trial in sorted(trials, key=lambda t: (t["strategy"], t["configuration"], t["seed"])):
        head = {key: trial[key] for key in ("strategy", "configuration", "seed", "diverged")}
        head["hparams"] = json.dumps(trial["hparams"], sort_keys=True)
        for unit in trial["units"] or [{"unit": 0}]:
            yield head | unit


def missing(out: Path, name: str) -> int:
    """How many trials of a pair are not finished."""
    trials = recorded(out, name)
    done = {Point(t["strategy"], t["configuration"], t["seed"]) for t in trials}
    first = set(first_points(PAIRS[name])) - done
    # The best are known once every configuration was trained.
    return len(first) or len(set(repeated_points(PAIRS[name], trials)) - done)


def collect(out: Path, names: list[str], tables: Path = TABLES) -> None:
    """Write the tables of all complete pairs."""
    tables.mkdir(parents=True, exist_ok=True)
    for name in names:
        trials = recorded(out, name)
        if missing(out, name):
            print(f"{name}: not complete")
            continue
        units = list(rows(trials))
        columns = list(dict.fromkeys(key for unit in units for key in unit))
        table = pa.table({column: [unit.get(column) for unit in units] for column in columns})
        schema = pa.schema(
            [pa.field(f.name, pa.float32() if pa.types.is_floating(f.type) else f.type) for f in table.schema]
        )
        pq.write_table(table.cast(schema), tables / f"{name}.parquet", compression="zstd", compression_level=19)
        print(f"{name}: {len(trials)} trials, {len(units)} rows")
