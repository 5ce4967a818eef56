"""Cost of each diagnostic, relative to its trial.

    python -m benchmarks.diagnostics --models digits_vit digits_cnn --strategies full linear_probe

Real trials on the built-in digits, one torch thread. A trial runs to its end without diagnostics (pretrained features
are in the cache, a linear probe is not solved yet). On its network the end of the trial is then repeated, with every
diagnostic alone and with none, all in turn, so that a busy machine slows all; `gradients` is the difference of units
with and without the observer, times the trial's units. Times are CPU seconds of the process (on a GPU: wall time),
medians over rounds. `share` is cost / trial.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainables.data.trial_data import TrialData
from trainables.engine.best_weights import changed_start, take
from trainables.engine.contract import TrainingConfig
from trainables.engine.diagnosis import Diagnosis
from trainables.engine.evaluation import final_scores
from trainables.engine.phase_trainer import PhaseTrainer
from trainables.engine.trial import Trial
from trainables.models.precision import resolve_precision
from trainables.specs.trial_spec import DIAGNOSTICS, ModelSpec, SharedTrialSettings, TrialSpec

AT_THE_END = tuple(name for name in DIAGNOSTICS if name != "gradients")


def clock(device: torch.device) -> float:
    """CPU seconds of this process; on a GPU wall seconds, after a synchronisation."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    began = clock(device)
    work()
    return clock(device) - began


def digits_store(folder: Path) -> str:
    """Path of the built-in data set, written as a study would."""
    from orchestrator import Study

    fields = {"name": "costs", "data": {"source": "digits"}, "strategies": ["linear_probe"]}
    Study(**fields, model={"name": "digits_vit"}, storage=str(folder)).prepare()
    return str(next(path.parent for path in folder.rglob("data.arrow")))


def costs(task: SharedTrialSettings, strategy: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """One case: seconds of the trial, and seconds and share of every diagnostic."""
    spec = TrialSpec(shared=dataclasses.replace(task, diagnostics=()), strategy=strategy)
    data = Trial(spec, device=device).data
    splits = ["test", *(f"ood/{domain}" for domain in data.ood_domains)]
    once = timed(lambda: [data.features(split) for split in splits], device)
    data.features("train"), data.features("val")
    run = Trial(spec, device=device)
    trial = timed(lambda: finish(run), device)
    ends = repeated({name: end_of(run, name) for name in ("", *AT_THE_END)}, device, rounds)
    cost = {name: ends[name] - ends[""] for name in AT_THE_END}
    if isinstance(run.strategy.config, TrainingConfig):
        cost["gradients"] = task.epochs * observer_cost(run, rounds)
    return {
        "model": task.model.name,
        "strategy": strategy,
        "epochs": task.epochs,
        "trial_s": trial,
        "scores_s": ends[""],
        "pretrained_features_once_s": once,
        "cost_s": cost,
        "share": {name: seconds / trial for name, seconds in cost.items()},
    }


def finish(run: Trial) -> None:
    """Do all remaining units."""
    while not run.finished:
        run.step()


def with_diagnostics(data: TrialData, *names: str) -> TrialData:
    """The same data under settings with these diagnostics."""
    spec = dataclasses.replace(data.spec, shared=dataclasses.replace(data.spec.shared, diagnostics=names))
    return TrialData(spec, data.store, data.backbone, data.device, data.reference)


def end_of(run: Trial, name: str) -> Callable[[], None]:
    """The scores of a finished trial, with one diagnostic ("" = none)."""
    data = with_diagnostics(run.data, *([name] if name else []))
    start = changed_start(run.model, {f"backbone.{k}": v for k, v in data.reference.state_dict().items()})
    tensors = take(run.model, run.model.state_dict())

    def end() -> None:
        diagnosis = Diagnosis(run.strategy, data, run.model)
        final_scores(run.model, data, diagnosis.watch)
        diagnosis.report(run.model, start, tensors, tensors)

    return end


def observer_cost(run: Trial, rounds: int) -> float:
    """Seconds that gradient norms add to one unit of the trial's longest phase."""
    phase = max((p for p in run.strategy.phases(run.spec.shared.epochs) if p.solve is None), key=lambda p: p.units)
    dtype = resolve_precision(run.spec.shared.precision, run.device)
    steps = run.data.steps_per_epoch

    def unit(*names: str) -> Callable[[], object]:
        training = PhaseTrainer(
            copy.deepcopy(run.model),
            run.strategy,
            run.task,
            phase,
            with_diagnostics(run.data, *names),
            prepared=run.prepared,
            unit_steps=steps,
            dtype=dtype,
        )
        return lambda: training.unit(0, 0, 0)

    seconds = repeated({"plain": unit(), "watched": unit("gradients")}, run.device, rounds)
    return seconds["watched"] - seconds["plain"]


def repeated(works: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each over alternating rounds; the first is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            took = timed(work, device)
            if number > 0:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Print one JSON object per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits_vit", "digits_cnn"])
    parser.add_argument("--strategies", nargs="+", default=["full", "linear_probe"])
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 20], help="4 is the demo's, 20 the default")
    parser.add_argument("--train-fraction", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = digits_store(Path(folder))
        for name in args.models:
            for strategy in args.strategies:
                for epochs in args.epochs:
                    model = ModelSpec(name=name)
                    cache = tempfile.mkdtemp(dir=folder)
                    task = SharedTrialSettings(
                        store=store, model=model, epochs=epochs, train_fraction=args.train_fraction, cache=cache
                    )
                    print(json.dumps(costs(task, strategy, device, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
