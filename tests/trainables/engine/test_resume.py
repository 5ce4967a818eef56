"""A trial with checkpoints of its own: killed anywhere, it resumes bit for bit in another process."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.support.synthetic import shapes, write_shapes
from tests.support.trials import CLOCK, same_numbers, same_tensors
from trainables.engine import trial as run_module
from trainables.engine.contract import Prepared, Strategy
from trainables.engine.trial import Trial
from trainables.engine.tune_trainable import TuneTrainable
from trainables.specs import fault_injection
from trainables.specs.fault_injection import ENV_FAULT_LOG, ENV_FAULTS
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.storage import checkpoint_store
from trainables.storage.checkpoint_format import CheckpointError, RunState, load_state, save_state
from trainables.storage.checkpoint_store import list_checkpoints

pytestmark = pytest.mark.usefixtures("cpu_only")
"""A Tune trial chooses its device by itself; the numbers that it must equal are those of a run on the CPU."""

ROOT = str(Path(__file__).parents[3])


@pytest.fixture(scope="module")
def task(
    tmp_path_factory: pytest.TempPathFactory, network: Callable[[str], str], one_thread: None
) -> SharedTrialSettings:
    root = tmp_path_factory.mktemp("resume")
    write_shapes(root / "store")
    model = ModelSpec(name=network("cnn"))
    return SharedTrialSettings(
        store=str(root / "store"), model=model, epochs=4, batch_size=16, cache=str(root / "cache")
    )


@pytest.fixture(scope="module")
def spec(task: SharedTrialSettings) -> TrialSpec:
    return TrialSpec(shared=task, strategy="daft", hparams={"lr_head": 0.1}, seed=5)


@pytest.fixture(scope="module")
def expected(spec: TrialSpec) -> list[dict[str, Any]]:
    """Every unit's result of the trial without any interruption."""
    run = Trial(spec, device="cpu")
    history = []
    while not run.finished:
        history.append(run.step())
    return history


@pytest.fixture
def config(spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(checkpoint_store, "MIN_INTERVAL_FACTOR", 0)  # a checkpoint after every unit, however short
    return spec.to_dict() | {"_number": 7, "_checkpoints": str(tmp_path / "checkpoints" / "trial-0007")}


def train(trial: TuneTrainable) -> list[dict[str, Any]]:
    results = [trial.train()]
    while not results[-1]["done"]:
        results.append(trial.train())
    return results


def of_run(result: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in like if name not in CLOCK}


def same(results: list[dict[str, Any]], like: list[dict[str, Any]]) -> bool:
    """Bit equality of what Tune got and what the run itself said."""
    return same_numbers([of_run(r, unit) for r, unit in zip(results, like, strict=True)], like)


def test_p2_another_process_reports_the_last_result_again_and_resumes(
    config: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    first = TuneTrainable(config)
    results = [first.train(), first.train()]
    second = TuneTrainable(config)
    again = second.train()
    assert same([*results, again], [*expected[:2], expected[1]])
    assert again["training_iteration"] == 2
    rest = train(second)
    assert same(rest, expected[2:])
    assert same(train(TuneTrainable(config)), expected[3:]), (
        "a finished trial re-reports its result and computes nothing"
    )


def test_a_reused_actor_continues_with_a_trial_as_a_fresh_one_does(
    config: dict[str, Any], spec: TrialSpec, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    TuneTrainable(config).train()
    other = dataclasses.replace(spec, seed=6).to_dict() | {"_checkpoints": str(tmp_path / "checkpoints" / "trial-0008")}
    reused = TuneTrainable(other)
    reused.train()
    reused.reset(config)
    assert same(train(reused), expected)


def test_a_trial_that_pauses_at_a_rung_resumes_there_in_another_process(
    config: dict[str, Any], spec: TrialSpec, expected: list[dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """However short its units were: without the rung, no checkpoint would have been due."""
    monkeypatch.setattr(checkpoint_store, "MIN_INTERVAL_FACTOR", 1e9)
    config["_checkpoint_at"] = [1, 2]
    process = TuneTrainable(config)
    results = [process.train(), process.train()]
    assert [path.name for path in list_checkpoints(Path(config["_checkpoints"]))] == ["unit-000001", "unit-000002"]
    other = dataclasses.replace(spec, seed=6).to_dict() | {"_checkpoints": str(tmp_path / "checkpoints" / "trial-0008")}
    process.reset(other)  # the process takes another trial, and the paused one is promoted elsewhere
    process.train()
    results += train(TuneTrainable(config))
    assert same(results, [*expected[:2], expected[1], *expected[2:]])


@pytest.mark.parametrize("broken", ["newest", "both"])
def test_s5_a_damaged_checkpoint_costs_a_unit_and_is_reported(
    config: dict[str, Any], expected: list[dict[str, Any]], broken: str
) -> None:
    first = TuneTrainable(config)
    for _ in range(3):
        first.train()
    kept = list_checkpoints(Path(config["_checkpoints"]))
    for path in kept[-1:] if broken == "newest" else kept:
        (path / "tensors.safetensors").write_bytes(b"torn")
    results = train(TuneTrainable(config))
    assert same(results, expected[1 if broken == "newest" else 0 :])
    reports = [r["checkpoint_problems"] for r in results if "checkpoint_problems" in r]
    assert [len(problems) for problems in reports] == [1 if broken == "newest" else 2]
    assert "checkpoint_problems" in results[0]


def test_s10_a_checkpoint_of_other_settings_is_put_aside_and_the_trial_starts_over(
    config: dict[str, Any], task: SharedTrialSettings, spec: TrialSpec
) -> None:
    trial = TuneTrainable(config)
    trial.train()
    changed = dataclasses.replace(spec, shared=dataclasses.replace(task, batch_size=32))
    result = TuneTrainable(config | changed.to_dict()).train()
    assert result["unit"] == 1
    assert [p.partition(": A")[2] for p in result["checkpoint_problems"]] == [
        " checkpoint continues its own trial only, but this one is of another: shared.batch_size: 16 in the "
        "checkpoint, 32 here."
    ]


def test_p23_a_failure_that_would_happen_again_is_a_result_and_not_an_error(config: dict[str, Any]) -> None:
    """Tune would retry an error as often as its limit allows."""
    config["strategy"] = "full"
    config["hparams"] = {"lr_backbone": 1e30}
    results = train(TuneTrainable(config))
    assert results[-1]["done"] is True
    assert "NonFiniteError: The " in results[-1]["failure"].splitlines()[-1]
    assert "val/acc" not in results[-1]


def test_a_failure_of_the_machine_is_an_error_that_tune_may_retry(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Trial) -> dict[str, Any]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Trial, "step", broken)
    with pytest.raises(OSError, match="Input/output error"):
        TuneTrainable(config).train()


CHILD = """
import json, sys, torch
torch.set_num_threads(1)
from trainables.storage import checkpoint_store
from trainables.engine.tune_trainable import TuneTrainable
checkpoint_store.MIN_INTERVAL_FACTOR = 0
trial = TuneTrainable(json.load(open(sys.argv[1])))
while True:
    result = trial.train()
    plain = {k: v for k, v in result.items() if isinstance(v, (int, float, dict, list))}
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps(plain) + "\\n")
    if result["done"]:
        break
"""

FAULTS = (
    "unit=1,step=3,phase=step,action=kill",  # nothing is kept yet but the middle of the unit
    "unit=2,phase=in_checkpoint,action=kill",
    "unit=3,phase=after_checkpoint,action=kill",  # done and checkpointed, not reported
    "unit=4,step=2,phase=step,action=kill",
    "unit=4,phase=before_checkpoint,action=kill",  # the last unit, with all of its evaluation
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("middle", [False, True])
def test_p1_p2_a_trial_killed_again_and_again_gives_every_result_and_the_same(
    config: dict[str, Any], expected: list[dict[str, Any]], tmp_path: Path, middle: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config | {"_checkpoint_seconds": 0 if middle else 1e9}))
    faults = ";".join(f"trial=7,{fault}" for fault in FAULTS)
    environment = {**os.environ, ENV_FAULTS: faults, ENV_FAULT_LOG: str(tmp_path / "faults")}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "config.json"), str(tmp_path / "results")]
    codes = []
    while not codes or (codes[-1] and len(codes) < 10):
        codes.append(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True).returncode)
    assert codes == [-signal.SIGKILL] * len(FAULTS) + [0]
    results = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert sorted({r["unit"] for r in results}) == [1, 2, 3, 4]
    by_unit = {unit["unit"]: unit for unit in expected}
    assert all(same([r], [by_unit[r["unit"]]]) for r in results)
    steps = [line for line in (tmp_path / "faults").read_text().splitlines() if "phase=step" in line]
    assert len(steps) == 2
    assert all("checkpoint_problems" not in r for r in results)


class Restless(Strategy):
    """Draws from every global generator in every step, and has dropout."""

    def prepare(self, model: Any, data: Any) -> Prepared:
        model.head.register_forward_hook(
            lambda module, inputs, output: nn.functional.dropout(output, 0.2, module.training)
        )
        return Prepared()

    def extra_loss(self, model: Any, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor | None:
        noise = torch.rand(()) + random.random() + random.gauss(0, 1) + float(np.random.rand() + np.random.randn())
        return noise * logits.square().mean() * 1e-3


def test_p28_how_many_images_fit_at_once_is_remembered(
    spec: TrialSpec, expected: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the second step, once; a resumed trial must halve the batches too."""
    monkeypatch.setenv(ENV_FAULTS, "phase=step,step=2,action=oom")

    def out_of_memory_again() -> None:
        fault_injection.reset_faults()

    def run_of(units: int, run: Trial) -> list[dict[str, Any]]:
        return [run.step() for _ in range(units)]

    out_of_memory_again()
    whole = run_of(4, Trial(spec, device="cpu"))
    out_of_memory_again()
    first = Trial(spec, device="cpu")
    start = run_of(2, first)
    save_state(tmp_path / "state", first.state())
    second = Trial(spec, device="cpu")
    second.load_state(load_state(tmp_path / "state"))
    rest = run_of(2, second)
    monkeypatch.undo()
    out_of_memory_again()
    assert [unit["cost/micro_batch"] for unit in whole] == [8.0] * 4
    assert same_numbers(whole, start + rest)
    assert not same_numbers(whole, expected), "halves are another rounding"


@pytest.mark.parametrize("step", [1, 3, 4])
def test_p28_every_random_generator_continues_in_the_middle_of_a_unit(
    task: SharedTrialSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(run_module, "strategy_class", lambda name, task: Restless)
    hparams = {"optimizer": "adamw", "lr_backbone": 1e-3, "clip_norm": 1.0, "warmup": 0.2}
    many = dataclasses.replace(task, augment=("flip",), diagnostics=("gradients",), epochs=2)
    spec = TrialSpec(shared=many, strategy="restless", hparams=hparams, seed=1)

    def left_and_resumed(left: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        run = Trial(spec, store=shapes(), device="cpu")
        steps = 0

        def keep() -> None:
            nonlocal steps
            steps += 1
            if left and steps == 4 + step:
                save_state(tmp_path / "state", run.state())

        run.after_step = keep
        history = [run.step(), run.step()]
        if left:
            run = Trial(spec, store=shapes(), device="cpu")
            run.load_state(load_state(tmp_path / "state"))
            history[1] = run.step()
        return history, run.model.state_dict()

    whole, resumed = left_and_resumed(False), left_and_resumed(True)
    assert same_numbers(whole[0], resumed[0])
    assert same_tensors(whole[1], resumed[1])


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_sentence(spec: TrialSpec) -> None:
    """Its plain values had no format, and the best unit's scores by the names of classification."""
    trial = Trial(spec, device="cpu")
    trial.step()
    state = trial.state()
    meta = {name: value for name, value in state.meta.items() if name != "format"}
    with pytest.raises(CheckpointError) as error:
        Trial(spec, device="cpu").load_state(RunState(state.tensors, meta))
    assert str(error.value) == (
        "A trial continues from a state of format 2, but the checkpoint has format 1: it was written by another "
        "version of Luthier. The trial starts over."
    )
