"""A driver killed (SIGKILL) again and again, its command repeated until the study is done: what is lost or double?

    python -m benchmarks.kills --kills 20 --seed 2023 --concurrent 1

One trial at a time: the leaderboard, every trial's history, the sampler's suggestions and the MLflow runs must equal
those of the study that nobody killed, exactly. Several at a time (`--concurrent 2`): the same counts, nothing lost or
double, and every trial's history equal to that of its configuration trained alone.
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
    draw = random.Random(seed)
    return [(draw.choice((1, 3, 4, 5, 6, 7, 8, 9)), draw.uniform(0.0, 0.6)) for _ in range(kills)]


def row(whole: StudyContents, killed: StudyContents, hits: int, concurrent: int) -> dict[str, Any]:
    """The findings of one comparison."""
    expected = {json.dumps([t["label"], t["hparams"], t["seed"]], sort_keys=True): t["history"] for t in whole.trials}
    mine = {json.dumps([t["label"], t["hparams"], t["seed"]], sort_keys=True): t["history"] for t in killed.trials}
    shared = expected.keys() & mine.keys()
    points = [
        (run["name"], key, step)
        for run in killed.runs
        if run["tags"]["luthier.kind"] == "trial"
        for key, found in run["points"].items()
        for step, _ in found
    ]
    found: dict[str, Any] = {
        "kills": hits,
        "trials": len(killed.trials),
        "trials_lost": len(whole.trials) - len(killed.trials),
        "runs_dup": len(killed.runs) - len({run["name"] for run in killed.runs}),
        "points_dup": len(points) - len(set(points)),
        "points_lost": sum(len(t["history"]) for t in killed.trials)
        - len({(name, step) for name, key, step in points if key == "val/acc"}),
        "zombies": sum(run["status"] == "RUNNING" for run in killed.runs),
        "histories_compared": len(shared),
        "bit_exact": all(_same(expected[key], mine[key]) for key in shared),
    }
    return found | ({"differences": whole.differences(killed)} if concurrent == 1 else {})


def _same(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    """As far as both go: with several trials at a time ASHA may stop one of the two earlier."""
    return all(x == y for x, y in list(zip(a, b, strict=False))[: min(len(a), len(b)) - (len(a) != len(b))])


def main() -> None:
    """Run the study whole and killed, and print one JSON row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2023)
    parser.add_argument("--concurrent", type=int, default=1)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="keep everything here")
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
        found = row(read_contents(whole), read_contents(killed), hits, args.concurrent)
        print(json.dumps(found | {"seconds": seconds}))


if __name__ == "__main__":
    main()
