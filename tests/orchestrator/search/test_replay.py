"""A driver that dies at any event, and files that are lost: the journal alone makes the same study of it."""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from orchestrator.record.checkpoints import checkpoint_folder
from orchestrator.record.journal import Journal, fold
from orchestrator.record.records import TrialRecord
from orchestrator.results.selection import top_candidates
from orchestrator.results.study_results import Results
from orchestrator.running.journal_callback import RecordCallback, close_open_trials, withdraw_trials
from orchestrator.search import optuna_store
from orchestrator.search.asha import StudyScheduler
from orchestrator.search.optuna_store import set_aside
from orchestrator.search.space import SearchError
from orchestrator.search.stages import ConfirmStage, Entry
from tests.support import interrupted_study
from tests.support.driving import EPOCHS, optuna_trials, searcher, task
from tests.support.interrupted_study import (
    Checkpoints,
    check_same_study,
    continued,
    events_of,
    interrupted_copy,
    known_to_optuna,
    result,
    shown,
)

fault = interrupted_study.fault

TRIALS = 14
COSTS = ("val/acc", "trainable_parameters", "device_seconds")


class Driver:
    """One process of a study: Tune's order of calls around the real searcher, scheduler, callback and journal, and
    trials that keep checkpoints."""

    every = 1
    """Units between two checkpoints of a trial."""

    def __init__(self, folder: Path, checkpoints: Checkpoints, top_k: int = 2, **fields: Any) -> None:
        self.journal = Journal(folder / "journal.jsonl")
        close_open_trials(self.journal)
        self.journal.append("study_started", study="s", spec={})
        self.checkpoints = checkpoints
        stage = ConfirmStage(task(), lambda records: top_candidates(records, top_k, "id_val"), seeds=2, seed=3)
        self.searcher = searcher(folder, journal=self.journal, trials=TRIALS, stages=[stage], **fields)
        history = fold(self.journal.events())
        self.scheduler = StudyScheduler("val/acc", True, EPOCHS, grace=1, reduction=2, history=history)
        self.callback = RecordCallback(self.journal)

    def run(self) -> None:
        """Run to the end, one trial at a time."""
        while True:
            trial_id = uuid.uuid4().hex[:8]  # Tune's ids never come again
            config = self.searcher.suggest(trial_id)
            if config == Searcher.FINISHED:
                break
            assert isinstance(config, dict)
            self.one(SimpleNamespace(trial_id=trial_id, config=config, last_result={}, error_file=None))
        self.callback.on_experiment_end([])
        self.journal.append("study_finished", state="complete")
        assert self.callback.problems == []

    def one(self, trial: Any) -> None:
        """One trial, as Tune's controller has it run."""
        number = trial.config["_number"]
        self.scheduler.on_trial_add(None, trial)
        self.callback.on_trial_start(0, [], trial)
        unit = self.checkpoints.get(number, 1)
        while True:
            last = trial.last_result = result(trial.config, unit)
            if unit % self.every == 0:
                self.checkpoints[number] = unit
            decision = TrialScheduler.STOP if last["done"] else self.scheduler.on_trial_result(None, trial, last)
            if decision != TrialScheduler.STOP:
                self.searcher.on_trial_result(trial.trial_id, last)
            self.callback.on_trial_result(0, [], trial, last)
            if decision == TrialScheduler.STOP:
                break
            unit += 1
        self.scheduler.on_trial_complete(None, trial, last)
        self.searcher.on_trial_complete(trial.trial_id, last)
        self.callback.on_trial_complete(0, [], trial)

    def interrupt(self, number: int) -> None:
        """Run until the trial of this number has started, then end as by Ctrl-C."""
        while True:
            trial_id = uuid.uuid4().hex[:8]
            config = self.searcher.suggest(trial_id)
            assert isinstance(config, dict)
            trial = SimpleNamespace(trial_id=trial_id, config=config, last_result={}, error_file=None)
            if config["_number"] == number:
                self.callback.on_trial_start(0, [], trial)
                self.callback.on_trial_result(0, [], trial, result(config, 1))
                break
            self.one(trial)
        self.callback.on_experiment_end([])
        self.searcher.close()
        self.die()

    def die(self) -> None:
        """As the kernel does it: files are closed, nothing is said to anybody."""
        self.journal.close()
        if hasattr(self, "searcher"):
            self.searcher.ledger._storage.close()


def study(folder: Path, **fields: Any) -> list[TrialRecord]:
    """Run a study, as often as a planned fault interrupts it."""
    folder.mkdir(exist_ok=True)
    checkpoints: Checkpoints = {}
    for _ in range(20):
        driver: Driver | None = None
        try:
            driver = Driver.__new__(Driver)
            driver.__init__(folder, checkpoints, **fields)  # type: ignore[misc]  # it may die in here
            driver.run()
            driver.searcher.close()
            return continued(folder)
        except KeyboardInterrupt:
            continue
        finally:
            assert driver is not None
            driver.die()
    raise AssertionError("the study does not end")


def test_a_trial_that_a_complete_run_did_not_ask_for_is_withdrawn_and_can_be_asked_for_again(
    tmp_path: Path, whole: tuple[Path, list[TrialRecord]]
) -> None:
    """An interrupted confirmation, `confirm.top_k` lowered, then raised again."""
    number = 15  # the first seed of the second configuration
    checkpoints: Checkpoints = {}
    Driver(tmp_path, checkpoints).interrupt(number)
    checkpoint_folder(tmp_path, number).mkdir(parents=True)
    fewer = Driver(tmp_path, checkpoints, top_k=1)
    fewer.run()
    assert [r.number for r in continued(tmp_path) if r.unfinished] == [number]
    withdraw_trials(fewer.journal, tmp_path)
    fewer.die()
    records = continued(tmp_path)
    assert [(r.number, r.unit) for r in records if r.state == "withdrawn"] == [(number, 1)]
    assert [r.number for r in records if r.unfinished or r.resumable] == []
    assert not checkpoint_folder(tmp_path, number).exists()
    assert not [text for text in Results(records, {"name": "s"}).warnings() if "unfinished" in text]
    checkpoints.pop(number, None)
    again = Driver(tmp_path, checkpoints)
    again.run()
    withdraw_trials(again.journal, tmp_path)
    again.die()
    assert shown(continued(tmp_path)) == shown(whole[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrialRecord]]:
    """The study without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    records = study(folder)
    assert {r.state for r in records} == {"complete", "pruned"}
    assert [r.role for r in records] == ["search"] * TRIALS + ["confirm"] * 4
    return folder, records


DEATHS = [f"phase={phase},seq={seq}" for seq in range(1, 105, 13) for phase in ("before_event", "after_event")]
"""Once in the life of a study."""
OFTEN = ";".join(f"phase=before_event,seq={seq},action=interrupt" for seq in range(6, 120, 9))


@pytest.mark.parametrize("deaths", [*(f"{death},action=interrupt" for death in DEATHS), OFTEN])
def test_p5_p6_a_driver_killed_at_any_event_changes_nothing(
    whole: tuple[Path, list[TrialRecord]], fault: Callable[[str], None], tmp_path: Path, deaths: str
) -> None:
    fault(deaths)
    study(tmp_path / "s")
    assert len((tmp_path / "faults").read_text().splitlines()) == deaths.count(";") + 1, "every planned death happened"
    check_same_study(tmp_path / "s", whole[0])


@pytest.mark.parametrize("every", [2, 3, 99])
def test_p5_trials_whose_checkpoints_are_old_or_lost_change_nothing_either(
    whole: tuple[Path, list[TrialRecord]], fault: Callable[[str], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, every: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(Driver, "every", every)
    test_p5_p6_a_driver_killed_at_any_event_changes_nothing(whole, fault, tmp_path, OFTEN)


@pytest.mark.parametrize("deaths", [f"{DEATHS[9]},action=interrupt", OFTEN])
def test_p5_p6_with_several_objectives(fault: Callable[[str], None], tmp_path: Path, deaths: str) -> None:
    """The same proposals after any death: the journal has the values of every objective, measured seconds included."""
    records = study(tmp_path / "whole", objectives=COSTS)
    fault(deaths)
    assert shown(study(tmp_path / "s", objectives=COSTS)) == shown(records)
    assert known_to_optuna(tmp_path / "s") == known_to_optuna(tmp_path / "whole")
    assert len({r.number for r in records}) == len(records)
    assert any(t.values and len(t.values) == 3 for t in optuna_trials(tmp_path / "s"))


@pytest.mark.parametrize("index", [4, 9, 13])
def test_p30_the_journal_alone_gives_the_same_table_and_the_same_next_suggestions(
    whole: tuple[Path, list[TrialRecord]], tmp_path: Path, index: int
) -> None:
    copy = interrupted_copy(tmp_path / "s", whole[0], events_of(whole[0], "trial_finished")[index])
    assert shown(continued(copy)) == shown(whole[1])[: index + 1]
    assert shown(study(copy)) == shown(whole[1])
    assert known_to_optuna(copy) == known_to_optuna(whole[0])


@pytest.mark.parametrize("fields", [
    {"sampler": "gp"}, {"sampler": "random"}, {"sampler": "paper"}, {"objectives": COSTS},
    {"objectives": COSTS, "sampler": "gp"},
], ids=str)  # fmt: skip
def test_p30_under_every_sampler(tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = {"entries": [Entry("", "linear_probe"), Entry("", "full")], **fields}
    records = study(tmp_path / "whole", **fields)
    copy = interrupted_copy(tmp_path / "s", tmp_path / "whole", events_of(tmp_path / "whole", "trial_finished")[8])
    assert shown(study(copy, **fields)) == shown(records)


def test_p30_repeated_proposals_are_known_again(tmp_path: Path) -> None:
    """They count for the sampler: a study that forgot them would propose other things."""
    fields: dict[str, Any] = {"sampler": "random", "entries": [Entry("", "daft", {"lr_backbone": 1e-3})]}
    records = study(tmp_path / "whole", **fields)
    journal = tmp_path / "whole" / "journal.jsonl"
    first = [e for e in Journal.read(journal) if e["kind"] == "trial_suggested"][3]
    lines = journal.read_bytes().splitlines(keepends=True)
    copy = tmp_path / "s"
    copy.mkdir()
    (copy / "journal.jsonl").write_bytes(b"".join(lines[: first["seq"]]))
    with Journal(copy / "journal.jsonl") as opened:  # as if the third trial had been proposed twice
        twin = records[2]
        value = [twin.metrics["best/val/acc"]] if twin.state == "complete" else None
        opened.append(
            "proposal_repeated", number=2, search_values=dict(twin.search_values), values=value,
            state="COMPLETE" if value else "FAIL",
        )  # fmt: skip
    study(copy, **fields)
    repeated = [t for t in optuna_trials(copy) if "duplicate_of" in t.user_attrs]
    assert [(t.user_attrs["duplicate_of"], t.values, t.params) for t in repeated] == [(2, value, twin.search_values)]


def lose(folder: Path) -> None:
    set_aside(folder / "optuna.db")


def tear(folder: Path) -> None:
    os.truncate(folder / "optuna.db", 5000)


def scribble(folder: Path) -> None:
    (folder / "optuna.db").write_bytes(b"<html>404</html>" * 1000)


def age(folder: Path) -> None:
    with sqlite3.connect(folder / "optuna.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
        database.execute("UPDATE version_info SET schema_version = 3, library_version = '1.0.0'")


def forget(folder: Path) -> None:
    """An old copy: it lacks the last trials."""
    with sqlite3.connect(folder / "optuna.db") as database:
        for table in ("trial_values", "trial_intermediate_values", "trial_user_attributes", "trial_params"):
            database.execute(f"DELETE FROM {table} WHERE trial_id > 5")
        database.execute("DELETE FROM trials WHERE trial_id > 5")


@pytest.mark.parametrize("harm", [lose, tear, scribble, age, forget])
def test_p19_a_database_that_is_lost_damaged_or_old_is_made_again(
    whole: tuple[Path, list[TrialRecord]], fault: Callable[[str], None], tmp_path: Path, harm: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = tmp_path / "s"
    fault(f"phase=after_event,seq={events_of(whole[0], 'result')[20]},action=interrupt")
    folder.mkdir()
    checkpoints: Checkpoints = {}
    driver = Driver(folder, checkpoints)
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    driver.die()
    harm(folder)
    with caplog.at_level(logging.INFO, "luthier"):
        second = Driver(folder, checkpoints)
    second.run()
    second.searcher.close()
    second.die()
    assert shown(continued(folder)) == shown(whole[1])
    assert "rebuilt" in caplog.text
    assert (folder / "optuna.db.replaced").exists()


def test_p19_a_locked_database_is_an_error_that_states_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna_store, "LOCK_SECONDS", 0.05)
    driver = Driver(tmp_path, {})
    driver.searcher.close()
    driver.die()
    holder = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with Journal(tmp_path / "journal.jsonl") as journal, pytest.raises(SearchError) as error:
            searcher(tmp_path, journal=journal)
    finally:
        holder.close()
    assert str(error.value) == (
        f"Optuna's storage is written by one process at a time, but another one holds sqlite:///{tmp_path}/optuna.db. "
        "Close the program that writes to it, such as another study or a database browser, and run again."
    )


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_p17_a_torn_end_of_the_journal_is_dropped_and_the_study_continues(
    whole: tuple[Path, list[TrialRecord]], tmp_path: Path, cut: int
) -> None:
    copy = interrupted_copy(tmp_path / "s", whole[0], events_of(whole[0], "result")[17])
    os.truncate(copy / "journal.jsonl", (copy / "journal.jsonl").stat().st_size - cut)
    assert shown(study(copy)) == shown(whole[1])


def test_p18_trials_that_a_killed_driver_left_running_are_settled_at_the_next_start(
    fault: Callable[[str], None], tmp_path: Path
) -> None:
    fault("phase=after_event,seq=20,action=interrupt")
    study(tmp_path / "s")
    states = {t.state for name in ("s", "s/given") for t in optuna_trials(tmp_path / "s", name)}
    assert not states & {optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING}


def test_a_database_that_agrees_is_left_alone(tmp_path: Path) -> None:
    study(tmp_path / "s")
    study(tmp_path / "s")
    assert not (tmp_path / "s" / "optuna.db.replaced").exists()
    assert not math.isnan(continued(tmp_path / "s")[0].metrics["val/acc"])
