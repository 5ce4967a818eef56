"""The table of all policies on all landscapes; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path

import optuna

import benchmarks.landscapes
from benchmarks.search.policies import POLICIES
from benchmarks.search.tables import errors, rank_correlations, replay, report, tasks

TABLES = Path(benchmarks.landscapes.__file__).parent / "tables"
BUDGETS = (12, 24, 60, 200)


def main() -> None:
    """Print all tables; `--json` keeps every outcome."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--tables", type=Path, default=TABLES)
    parser.add_argument("--policies", nargs="+", choices=[p.name for p in POLICIES], default=[p.name for p in POLICIES])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tables = sorted(args.tables.glob("*.parquet"))
    if not tables:
        raise SystemExit(f"Landscapes are needed in {args.tables}: python -m benchmarks.landscapes makes them.")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print("\n".join([*errors(tables), "", *rank_correlations(tables)]), flush=True)
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        parts = pool.imap_unordered(replay, tasks(tables, args.policies, args.budgets, args.repeats))
        rows = [row for part in parts for row in part]
    if args.json is not None:
        args.json.write_text(json.dumps(rows))
    print()
    print("\n".join(report(rows)))


if __name__ == "__main__":
    main()
