"""Golden record of three small studies: proves that a refactoring changed no number, to the last bit.

    python -m benchmarks.golden record OUT.json            run the studies, write the record (`.json.gz`: compressed)
    python -m benchmarks.golden compare A.json B.json      0 and "identical", or 1 and every difference by its name

Of each study: leaderboard, choice, regret, findings, measurements; of each trial: what was asked, every metric of every
unit and the curves, without costs. Then every trial is trained again alone, without Ray, in this process: its metrics
must be those of the journal, and of its network (before the first unit and after each) and its optimiser the digests
are recorded. Everything on one thread of the CPU, with a cache of its own, so that nothing comes from earlier runs.
Floats are bits, and bits are those of one kind of CPU and one set of library versions: compare says where these differ.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks._golden_studies import STUDIES, fields, write_images

# Everything of Luthier that this file uses:
from orchestrator import Study
from orchestrator.cluster.connection import connect
from orchestrator.planning.build import make_task, references_of
from orchestrator.record.records import TrialRecord
from orchestrator.results.fsr import draw_of
from trainables.engine.trial import Trial
from trainables.specs.trial_spec import SharedTrialSettings, TrialSpec

FIXED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Environment of this process and of the trials' ones."""
VERSIONS = ("torch", "timm", "numpy", "scipy", "scikit-learn", "optuna", "ray", "peft", "pillow")
TRIAL_FIELDS = ("number", "label", "strategy", "role", "seed", "held_out", "sample", "config_hash", "state", "reason")
RESULT_FIELDS = ("problem", "leaderboard", "best", "regret", "findings", "warnings", "measurements")
MISSING = "(missing)"


def record() -> dict[str, Any]:
    """Run the studies, then each trial of theirs alone."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["LUTHIER_CACHE"] = str(root / "cache")
        images = write_images(root / "images")
        studies = {name: Study(**fields(name, root / "studies", images)) for name in STUDIES}
        with connect(cpus=1, dashboard=False):
            for name, study in studies.items():
                with timed(f"{name} as a study"):
                    study.run(progress=False)
        torch.set_num_threads(1)
        records = {}
        for name, study in studies.items():
            with timed(f"{name} trial by trial"):
                records[name] = study_record(study)
        return {"environment": environment(), "studies": records}


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print to stderr how long a block took."""
    began = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """CPU and versions, on which floats may depend beside the code."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {"cpu": _cpu(), "python": platform.python_version(), "threads": str(torch.get_num_threads()), **versions}


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def study_record(study: Study) -> dict[str, Any]:
    """Results of a study, and its trials."""
    results = study.results()
    summary = results.to_dict()
    store = study.prepare()
    task = make_task(study.spec, store)
    samples = references_of(study.spec, task, store, study.spec.diagnostics.fsr).samples()
    trials = {
        f"{r.number:02d} {r.label}": {
            **journalled(r),
            **retrained(r, samples[draw_of(r.sample)[0]] if r.sample else task),
        }
        for r in results.records
    }
    return {**{name: repeatable(summary[name]) for name in RESULT_FIELDS}, "trials": trials}


def repeatable(value: Any) -> Any:
    """The value without costs and Tune's random names, which differ between equal runs."""
    if isinstance(value, Mapping):
        return {str(k): repeatable(v) for k, v in value.items() if "cost" not in str(k) and k != "trial_id"}
    return [repeatable(v) for v in value] if isinstance(value, list | tuple) else value


def journalled(trial: TrialRecord) -> dict[str, Any]:
    """A trial as journalled: fields, curves, and each metric's values by unit (None = not measured)."""
    units = [without_costs(unit) for unit in trial.history]
    names = sorted({name for unit in units for name in unit})
    return {
        **{name: getattr(trial, name) for name in TRIAL_FIELDS},
        "hparams": dict(trial.hparams),
        "search_values": dict(trial.search_values),
        "history": {name: [unit.get(name) for unit in units] for name in names},
        "curves": {name: dict(curve) for name, curve in trial.curves.items()},
    }


def without_costs(unit: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a unit, costs left out."""
    return {key: float(value) for key, value in unit.items() if "/" in key and not key.startswith("cost/")}


def retrained(trial: TrialRecord, task: SharedTrialSettings) -> dict[str, Any]:
    """Train a trial again without Ray, up to its last unit in the study; returns the digests.

    Raises:
        RuntimeError: a metric or a curve is not that of the journal.
    """
    run = Trial(spec_of(trial, task), device="cpu")
    weights = [network(run)]
    optimizer = list[str | None]()
    curves = dict[str, Any]()
    problems = []
    for unit in trial.history:
        result = run.step()
        curves |= result.pop("curves", {})
        metrics = {key: value for key, value in result.items() if isinstance(value, int | float)}
        problems += differences(without_costs(unit), without_costs(metrics), f"unit {run.unit}")
        weights.append(network(run))
        optimizer.append(digest({k: v for k, v in run.state().tensors.items() if k.startswith("optimizer/")}))
    problems += differences(as_json(trial.curves), as_json(curves), "curves")
    if problems:
        raise RuntimeError(f"Retrained, trial {trial.number} ({trial.label}) differs:\n" + "\n".join(problems))
    return {"network": weights, "optimizer": optimizer}


def spec_of(trial: TrialRecord, task: SharedTrialSettings) -> TrialSpec:
    """Specification of a journalled trial."""
    names = ("strategy", "seed", "label", "role", "held_out", "sample")
    if trial.role != "search":  # trials of the stages have no rungs
        task = dataclasses.replace(task, evaluate_at=(), interim_splits=None)
    draw = draw_of(trial.sample)[1] if trial.sample else 0
    values = {name: getattr(trial, name) for name in names}
    return TrialSpec(shared=task, hparams=dict(trial.hparams), train_draw=draw, **values)


def network(run: Trial) -> str | None:
    """Digest of the present parameters and buffers."""
    model = run.model
    return digest({**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())})


def digest(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """SHA-256 over names, types, shapes and bytes; None = no tensors."""
    parts = []
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        parts.append([name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if parts else None


def as_json(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return json.loads(json.dumps(value))


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """One line, with its path, per value that is not the same to the last bit."""
    return list(_differences(a, b, where))


def _differences(a: Any, b: Any, where: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from _differences(a.get(key, MISSING), b.get(key, MISSING), f"{where} > {key}" if where else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{where}[{number}]")
    # By `repr`: it separates 1 from 1.0, 0.0 from -0.0 and each float from its neighbours, and NaN equals NaN.
    elif repr(a) != repr(b):
        far = f" (by {abs(a - b):.3g})" if _finite(a) and _finite(b) else ""
        yield f"{where}: {a!r} is now {b!r}{far}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, a line per trial; equal records give equal bytes."""
    text = json.dumps(record, separators=(",", ":")).replace('},"', '},\n"') + "\n"
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    record: dict[str, Any] = json.loads(text)
    return record


def compare(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Print the differences; returns the exit status."""
    for line in differences(a["environment"], b["environment"]):
        print(f"Warning: floats may differ for this reason alone: {line}")
    lines = differences(a["studies"], b["studies"])
    print("\n".join(lines) if lines else "identical")
    if lines:
        print(f"{len(lines)} differences")
    return 1 if lines else 0


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("out", type=Path)
    both = commands.add_parser("compare")
    both.add_argument("a", type=Path)
    both.add_argument("b", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        sys.exit(compare(read(args.a), read(args.b)))
    if any(os.environ.get(name) != value for name, value in FIXED.items()):  # read when numpy and torch are loaded
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.golden", *sys.argv[1:]], os.environ | FIXED)
    write(args.out, record())


if __name__ == "__main__":
    main()
