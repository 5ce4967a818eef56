"""Commands that make the landscapes; see the package's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.landscapes import material
from benchmarks.landscapes.design import first_points
from benchmarks.landscapes.pairs import PAIRS, Pair
from benchmarks.landscapes.training import TABLES, collect, missing, recorded, run


def status(out: Path, names: list[str]) -> None:
    """Print how many trials of each pair are finished."""
    for name in names:
        pair: Pair = PAIRS[name]
        first = first_points(pair)
        trials = recorded(out, name)
        further = sum(trial["seed"] != first[0].seed for trial in trials)
        state = "not complete" if missing(out, name) else "complete"
        print(f"{name}: {len(trials) - further} of {len(first)} points, {further} repetitions; {state}")


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.landscapes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch").add_argument("material", type=Path)
    runner = commands.add_parser("run")
    runner.add_argument("material", type=Path)
    runner.add_argument("out", type=Path)
    runner.add_argument("--workers", type=int, default=2)
    runner.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    commands.add_parser("status").add_argument("out", type=Path)
    collector = commands.add_parser("collect")
    collector.add_argument("out", type=Path)
    collector.add_argument("--tables", type=Path, default=TABLES)
    args = parser.parse_args()
    if args.command == "fetch":
        material.fetch(args.material)
    elif args.command == "run":
        run(args.material, args.out, args.pairs, args.workers)
    elif args.command == "status":
        status(args.out, list(PAIRS))
    else:
        collect(args.out, list(PAIRS), args.tables)


if __name__ == "__main__":
    main()
