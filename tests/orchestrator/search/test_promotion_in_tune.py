"""Pause and promote inside a real `tune.Tuner`, with a trainable that computes nothing and remembers its unit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray import tune

from orchestrator.ray_internals import in_memory_tune_storage, without_tune_files
from orchestrator.record.journal import Journal, fold
from orchestrator.results.selection import top_candidates
from orchestrator.running.journal_callback import RecordCallback, close_open_trials
from orchestrator.search.promotion import Promotions
from orchestrator.search.promotion_scheduler import PromotionScheduler
from orchestrator.search.rungs import rungs
from orchestrator.search.stages import ConfirmStage
from tests.support.clusters import plain_cluster
from tests.support.driving import EPOCHS, accuracy, optuna_trials, searcher, task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NAMES = ("linear_probe", "full", "daft")
TRIALS = 14


class Sketch(tune.Trainable):  # type: ignore[misc]
    """Reports the made-up objective, rising with the units; keeps its unit in its folder at every rung."""

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.spec = new_config
        self.file = Path(new_config["_checkpoints"])
        self.unit = 0
        return True

    def step(self) -> dict[str, Any]:
        if self.unit == 0 and self.file.exists():
            self.unit = int(self.file.read_text())  # reported once more
        else:
            self.unit += 1
        if self.unit in self.spec.get("_checkpoint_at", ()):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(str(self.unit))
        value = accuracy(self.spec) * (0.5 + 0.5 * self.unit / EPOCHS)
        end = self.spec["label"] == "linear_probe" or self.unit >= EPOCHS
        best = {"best/val/acc": value} if end else {}
        return {"unit": self.unit, "val/acc": value, **best, "finished": end, "done": end, "cost/pid": os.getpid()}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        raise AssertionError("Tune needs no checkpoint of its own of a paused trial")


class StopAfter(tune.Stopper):  # type: ignore[misc]
    """Ends the run after so many results, as an interruption would."""

    def __init__(self, results: int | None) -> None:
        self.left = results

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.left = None if self.left is None else self.left - 1
        return False

    def stop_all(self) -> bool:
        return self.left is not None and self.left <= 0


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        with plain_cluster(cpus=2):
            yield


def run(folder: Path, concurrent: int, results: int | None = None) -> Journal:
    """One driver of the study; returns its closed journal."""
    journal = Journal(folder / "journal.jsonl")
    close_open_trials(journal)
    journal.append("study_started", study="s", spec={})
    units = rungs(EPOCHS, 1, 2)
    promotions = Promotions.replay(units, 2, fold(journal.events()), "val/acc", True, list(NAMES))
    stage = ConfirmStage(task(), lambda records: top_candidates(records, 2, "id_val"), seeds=2, seed=3)
    search = searcher(
        folder, NAMES, trials=TRIALS, stages=[stage], journal=journal, promotions=promotions,
        checkpoints=lambda number: folder / "checkpoints" / f"{number}",
    )  # fmt: skip
    callback = RecordCallback(journal, promotions=promotions)
    errors: dict[str, str] = {}
    tuner = tune.Tuner(
        tune.with_resources(Sketch, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=search, scheduler=PromotionScheduler(promotions, "val/acc", True, EPOCHS, 1, 2),
            num_samples=-1, max_concurrent_trials=concurrent, reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="ray", **in_memory_tune_storage(), verbose=0, callbacks=[callback], stop=StopAfter(results),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
        ),
    )  # fmt: skip
    with without_tune_files(errors):
        tuner.fit()
    search.close()
    journal.close()
    assert errors == {}
    assert callback.problems == []
    return journal


def contents(journal: Journal) -> list[tuple[Any, ...]]:
    return [
        (r.number, r.label, r.role, r.state, r.hparams, [(u["unit"], u["val/acc"]) for u in r.history])
        for r in fold(journal.events())
    ]


@pytest.mark.usefixtures("local_ray")
def test_paused_trials_free_their_slots_and_the_best_go_on(tmp_path: Path) -> None:
    journal = run(tmp_path, concurrent=2)
    records = fold(journal.events())
    search = [r for r in records if r.role == "search"]
    assert len(search) == TRIALS
    assert Counter(r.state for r in records if r.role == "confirm") == {"complete": 4}
    kinds = Counter(event["kind"] for event in journal.events())
    assert kinds["trial_paused"] > 2, "more than there are slots"
    assert kinds["trial_promoted"] > 0
    assert {r.attempts for r in records} == {1}
    for label in NAMES:
        assert any(r.state == "complete" for r in search if r.label == label)
    for label in ("full", "daft"):
        at_first_rung = sorted((r.history[0]["val/acc"] for r in search if r.label == label), reverse=True)
        further = [r.history[0]["val/acc"] for r in search if r.label == label and r.unit > 1]
        assert set(further) >= set(at_first_rung[: len(at_first_rung) // 2]), "the best half of the rung"
    states = Counter(t.state for t in optuna_trials(tmp_path))
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    steps = [event["unit"] for event in journal.events() if event["kind"] == "result"]
    assert len(steps) == sum(len(r.history) for r in records)
    assert len({u["cost/pid"] for r in records for u in r.history if "cost/pid" in u}) <= 2, "processes are reused"


@pytest.mark.long
@pytest.mark.usefixtures("local_ray")
def test_a_study_that_is_interrupted_again_and_again_is_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", concurrent=1)
    results = sum(event["kind"] == "result" for event in whole.events())
    paused = 0
    for _ in range(3):
        journal = run(tmp_path / "s", concurrent=1, results=results // 4)
        waiting = [r.number for r in fold(journal.events()) if r.state == "paused"]
        paused = max(paused, len(waiting))
        running = [t.user_attrs["trial"]["number"] for t in optuna_trials(tmp_path / "s")
                   if t.state == TrialState.RUNNING]  # fmt: skip
        assert set(waiting) <= set(running)
    journal = run(tmp_path / "s", concurrent=1)
    assert paused > 2
    assert contents(journal) == contents(whole)
    started = [e["trial_id"] for e in journal.events() if e["kind"] in ("trial_started", "trial_promoted")]
    suggested = [e["trial_id"] for e in journal.events() if e["kind"] == "trial_suggested"]
    assert len(set(started)) < len(suggested), "a paused trial is added to Tune without a process"
