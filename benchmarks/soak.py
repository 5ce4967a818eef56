"""A study through thirty faults and more, for Luthier and for plain Ray Tune with Ray's MLflow callback.

    make soak
    python -m benchmarks.soak --seed 2023 --faults 32

Twelve trials of ten units on a cluster of two machines with one CPU each, an MLflow server beside it; everything runs
on this machine. Trials are killed within an epoch, before, while and after writing a checkpoint; their disk is full or
fails; one is stopped (SIGSTOP). The driver is killed and its command repeated, once with the newest checkpoint cut in
half; machines are killed and come back; the tracking server is killed and stopped for ten seconds. Which fault comes
where is drawn from the seed and is the same for both. Each side is compared with itself undisturbed, one JSON row each:

    trials_lost       trials that did not use their budget in the end
    epochs_repeated   units that were begun more than once
    points_lost       numbers (trial, metric, step) that the tracker lacks;  points_dup: those that it has twice;
                      points_extra: those that the undisturbed study has not
    runs_dup          runs of the tracker beyond one per trial;  zombies: runs that stay RUNNING
    overhead_x        wall time as a multiple of the undisturbed one
    bit_exact         every trial's curve and final numbers are those of the undisturbed study, bit for bit
    max_stall_s       longest time that one callback (journal, tracker) held up Tune's loop
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.support import soak_comparison
from benchmarks.support.soak_faults import NONE, Schedule, draw
from benchmarks.support.soak_machines import machines, tracker
from benchmarks.support.soak_plain import NAME, SETTINGS
from benchmarks.support.soak_run import LOG as FAULTS
from benchmarks.support.soak_run import Outcome, Soak
from trainables.specs.fault_injection import ENV_FAULT_LOG, ENV_FAULTS

STUDY = "soak"


def study_fields(args: argparse.Namespace, storage: Path, uri: str) -> dict[str, Any]:
    """Luthier's study: random search, so that configurations do not depend on the order in which trials finish."""
    return {
        "name": STUDY,
        "data": {"source": "digits"},
        "model": {"name": "digits_cnn"},
        "strategies": ["full", "lp_ft", "daft"],
        "search": {
            "trials": args.trials, "epochs": args.units, "steps_per_unit": args.steps, "sampler": "random",
            "scheduler": "none", "seed": args.seed,
        },
        "confirm": {"top_k": 0},
        "failures": {"stall_floor": 20},
        "resources": {"cpus": 1, "concurrent": 2, "channels_last": False},
        "tracking": {"uri": uri, "experiment": STUDY},
        "storage": str(storage),
    }  # fmt: skip


def soak_luthier(
    args: argparse.Namespace, folder: Path, schedule: Schedule
) -> tuple[Outcome, soak_comparison.StudyEnd]:
    """Luthier through a schedule."""
    from orchestrator import Study

    folder.mkdir(parents=True)
    with tracker(folder / "tracker") as server:
        fields = study_fields(args, folder / "studies", server.uri)
        (folder / "study.yaml").write_text(yaml.safe_dump(fields))
        study = Study(**fields)
        study.prepare()
        damage = lambda: truncate(study.folder, "tensors.safetensors")  # noqa: E731
        outcome = _soaked("luthier", folder, schedule, server, damage, args)
    return outcome, soak_comparison.luthier(study.folder, server.database, args.units)


def soak_plain(args: argparse.Namespace, folder: Path, schedule: Schedule) -> tuple[Outcome, soak_comparison.StudyEnd]:
    """Plain Ray Tune through a schedule, on the same images."""
    from orchestrator import Study

    folder.mkdir(parents=True)
    with tracker(folder / "tracker") as server:
        store = Study(**study_fields(args, folder / "studies", server.uri)).prepare()
        settings = {"store": str(store.path), "uri": server.uri, "trials": args.trials}
        (folder / SETTINGS).write_text(json.dumps({**settings, "units": args.units, "steps": args.steps}))
        damage = lambda: truncate(folder / NAME, "state.safetensors")  # noqa: E731
        outcome = _soaked("plain", folder, schedule, server, damage, args)
    return outcome, soak_comparison.plain(folder, server.database, args.units)


SIDES: dict[str, Callable[[argparse.Namespace, Path, Schedule], tuple[Outcome, soak_comparison.StudyEnd]]] = {
    "luthier": soak_luthier,
    "plain": soak_plain,
}


def _soaked(side: str, folder: Path, schedule: Schedule, server: Any, damage: Any, args: Any) -> Outcome:
    with machines({ENV_FAULTS: schedule.environment, ENV_FAULT_LOG: str(folder / FAULTS)}) as cluster:
        return Soak(side, folder, schedule, cluster, server, damage, args.patience).run()


def truncate(folder: Path, name: str) -> bool:
    """Cut the newest file of this name below a folder in half; False = there is none."""
    files = sorted(folder.rglob(name), key=lambda file: file.stat().st_mtime)
    large = [file for file in files if file.stat().st_size > 1000]
    if not large:
        return False
    with large[-1].open("r+b") as file:
        file.truncate(large[-1].stat().st_size // 2)
    return True


def main() -> None:
    """Soak both sides and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2023)
    parser.add_argument("--faults", type=int, default=32)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--units", type=int, default=10)
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of one unit: a few seconds")
    parser.add_argument("--patience", type=float, default=1200.0, help="time limit of one study, in seconds")
    parser.add_argument("--side", choices=sorted(SIDES), action="append", help="only this one")
    parser.add_argument("--quick", action="store_true", help="six faults on a small study, to try the machinery")
    parser.add_argument("--folder", type=Path, help="keep all files in this folder")
    args = parser.parse_args()
    if args.quick:
        args.faults = min(args.faults, 6)
        args.trials = 4
        args.units = 4
        args.steps = 20
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that context managers end its processes and remove its folders
    schedule = draw(args.seed, args.faults, args.trials, args.units, args.steps)
    print(json.dumps(schedule.kinds, indent=1), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        root = (args.folder or Path(temporary)).absolute()
        for side in args.side or ("luthier", "plain"):
            calm, whole = SIDES[side](args, root / side / "whole", NONE)
            rough, disturbed = SIDES[side](args, root / side / "disturbed", schedule)
            print(json.dumps({"side": side, **soak_comparison.row(whole, disturbed, calm, rough)}), flush=True)
            print(json.dumps(rough.faults, indent=1), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
