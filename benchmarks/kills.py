"""A driver killed (SIGKILL) repeatedly and restarted until the study is done: lost and duplicated results.

    python -m benchmarks.kills --kills 20 --seed 2023 --concurrent 1

One trial at a time: the leaderboard, every trial's history, the sampler's suggestions and the MLflow runs must equal
those of the undisturbed study exactly. Several at a time (`--concurrent 2`): the same counts, nothing lost or
duplicated, and every trial's history equal to that of its configuration trained alone.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.support.killed_study import StudyContents, read_contents, run_killed, write_material, write_study


def moments(kills: int, seed: int) -> list[tuple[int, float]]:
    """Random (events, seconds) after a driver's start; a third of them before its first trial has a result."""
    generator = random.Random(seed)
    return [(generator.choice((1, 3, 4, 5, 6, 7, 8, 9)), generator.uniform(0.0, 0.6)) for _ in range(kills)]


def row(whole: StudyContents, killed: StudyContents, hits: int, concurrent: int) -> dict[str, Any]:
    """The result of one comparison."""
    expected = _histories(whole)
    actual = _histories(killed)
    shared = expected.keys() & actual.keys()
    points = [
        (run["name"], key, step)
        for run in killed.runs
        if run["tags"]["luthier.kind"] == "trial"
        for key, values in run["points"].items()
        for step, _ in values
    ]
    result: dict[str, Any] = {
        "kills": hits,
        "trials": len(killed.trials),
        "trials_lost": len(whole.trials) - len(killed.trials),
        "runs_dup": len(killed.runs) - len({run["name"] for run in killed.runs}),
        "points_dup": len(points) - len(set(points)),
        "points_lost": sum(len(t["history"]) for t in killed.trials)
        - len({(name, step) for name, key, step in points if key == "val/acc"}),
        "zombies": sum(run["status"] == "RUNNING" for run in killed.runs),
        "histories_compared": len(shared),
        "bit_exact": all(_same(expected[key], actual[key]) for key in shared),
    }
    if concurrent == 1:
        result["differences"] = whole.differences(killed)
    return result


def _histories(contents: StudyContents) -> dict[str, list[dict[str, float]]]:
    """Configuration and seed of each trial → its history."""
    return {
        json.dumps([trial["label"], trial["hparams"], trial["seed"]], sort_keys=True): trial["history"]
        for trial in contents.trials
    }


def _same(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    """Whether two histories are equal up to the shorter one's last unit but one.

    With several trials at a time ASHA may stop one of the two earlier, and a last unit has a final evaluation.
    """
    shared = min(len(a), len(b))
    if len(a) != len(b):
        shared -= 1
    return a[:shared] == b[:shared]


def main() -> None:
    """Run the study whole and killed, and print one JSON row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2023)
    parser.add_argument("--concurrent", type=int, default=1)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="keep all files in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = args.folder or Path(folder)
        material = write_material(root / "material")
        changes = {"resources": {"concurrent": args.concurrent}, "search": {"trials": args.trials}}
        whole, killed = (write_study(root / name, material, **changes) for name in ("whole", "killed"))
        seconds = []
        for file, planned in ((whole, []), (killed, moments(args.kills, args.seed))):
            began = time.perf_counter()
            hits = run_killed(file, planned)
            seconds.append(round(time.perf_counter() - began, 1))
        result = row(read_contents(whole), read_contents(killed), hits, args.concurrent)
        print(json.dumps(result | {"seconds": seconds}))


if __name__ == "__main__":
    main()
