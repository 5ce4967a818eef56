"""Every strategy at four data regimes: FSR, the best λ on validation, ID and OOD accuracy with intervals.

    python -m benchmarks.regimes                      # benchmarks/regimes.yaml at 2, 5, 10 and 100 per cent
    python -m benchmarks.regimes --fractions 0.1      # one regime
    python -m benchmarks.regimes --storage DIR        # keep the studies there; the same command continues them

One study per regime, each with its own search (the same number of trials for all regimes), confirmation on fresh seeds
and reference trials for FSR. Prints Markdown; `--json` prints the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import Study
from orchestrator.cluster.connection import connect
from orchestrator.results.intervals import mean_interval
from orchestrator.results.selection import reported_trials
from orchestrator.study_file.load import load_study

if TYPE_CHECKING:
    from orchestrator.results.study_results import Results

STUDY = Path(__file__).with_suffix(".yaml")
FRACTIONS = (0.02, 0.05, 0.1, 1.0)


def run_regime(fraction: float, storage: Path, progress: bool) -> Results:
    """The study at one fraction of the training images."""
    fields = load_study(STUDY).model_dump(mode="json", exclude_unset=True)
    fields["name"] = f"{fields['name']}-{100 * fraction:g}"
    fields["data"]["train_fraction"] = fraction
    fields["storage"] = str(storage)
    if fraction == 1:  # the sample is the whole pool: its FSR against itself is 1
        fields["diagnostics"]["fsr"] = [name for name in fields["diagnostics"]["fsr"] if name != "full"]
    return Study(**fields).run(progress=progress)


def rows(results: Results) -> list[dict[str, Any]]:
    """Per entry: ID and OOD accuracy over the confirmation's seeds, gain over the linear probe, chosen λ."""
    table = []
    for row in results.leaderboard().to_dict("records"):
        runs = reported_trials(results.records, row["config_hash"])
        lams = [value for run in runs if (value := run.metric("layernorm/lambda")) is not None]
        table.append({**row, "lambda": mean_interval(lams), "validation": _mean(runs, "best/val/acc")})
    return sorted(table, key=lambda row: str(row["label"]))


def _mean(runs: Sequence[Any], metric: str) -> tuple[float, float]:
    return mean_interval([value for run in runs if (value := run.metric(metric)) is not None])


def shift_ratios(results: Results) -> dict[str, dict[str, float]]:
    """FSR per reference."""
    from orchestrator.results.fsr import estimates

    return {e.reference: {"value": e.value, "low": e.low, "high": e.high} for e in estimates(results.records)}


def markdown(regimes: Mapping[float, Results]) -> str:
    """The tables."""
    lines = [
        "| training images | FSR full | FSR extrapolated | FSR oracle (mean of domains) | best λ on validation |",
        "|---" * 5 + "|",
    ]
    for fraction, results in regimes.items():
        ratios = shift_ratios(results)
        oracle = [v["value"] for name, v in ratios.items() if name.startswith("oracle") and v["value"] == v["value"]]
        lam = next((r["lambda"] for r in rows(results) if r["label"] == "layernorm_lambda"), (math.nan, math.nan))
        cells = [_ratio(ratios.get("full")), _ratio(ratios.get("extrapolated")), _number(*mean_interval(oracle))]
        lines.append(f"| {100 * fraction:g} % | {' | '.join(cells)} | {_number(*lam)} |")
    for metric, title in (("test/acc", "ID test accuracy"), ("ood/mean/acc", "OOD accuracy, mean of domains")):
        lines += ["", f"{title}, per cent (mean ± 95 % interval over 3 seeds)", ""]
        lines += [f"| strategy | {' | '.join(f'{100 * f:g} %' for f in regimes)} |", "|---" * (1 + len(regimes)) + "|"]
        tables = [{r["label"]: r for r in rows(results)} for results in regimes.values()]
        for label in tables[0]:
            cells = [_percent(t[label][metric], t[label][f"{metric}/ci95"]) for t in tables]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    for fraction, results in regimes.items():
        lines += ["", f"At {100 * fraction:g} %:", "", *(f"- {sentence}" for sentence in results.findings())]
    return "\n".join(lines)


def _ratio(interval: Mapping[str, float] | None) -> str:
    if interval is None or math.isnan(interval["value"]):
        return "–"
    return f"{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def _number(mean: float, half: float, digits: int = 2) -> str:
    if math.isnan(mean):
        return "–"
    interval = "" if math.isnan(half) else f" ± {half:.{digits}f}"
    return f"{mean:.{digits}f}{interval}"


def _percent(mean: float, half: float) -> str:
    return _number(100 * mean, 100 * half, digits=1)


def main() -> None:
    """Run the regimes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="+", default=list(FRACTIONS))
    parser.add_argument("--storage", type=Path, help="folder of the studies; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, connect():
        storage = args.storage or Path(folder)
        regimes = {f: run_regime(f, storage, progress=sys.stderr.isatty()) for f in args.fractions}
        if args.json:
            print(json.dumps({f: {**r.to_dict(), "fsr": shift_ratios(r)} for f, r in regimes.items()}, indent=2))
        else:
            print(markdown(regimes))


if __name__ == "__main__":
    main()
