"""S8: the clock is set back an hour, then forward a day, while a study runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.journal import Journal
from orchestrator.record.records import fold
from orchestrator.running.tracking_process import summarizer
from orchestrator.tracking.projection import Projection
from tests.support.source_tree import calls, parsed

HOUR, DAY = 3600.0, 86400.0
NOON = 1_800_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return values of `time.time`: the last of the list, which a test may add to."""
    clock_times = [NOON]
    monkeypatch.setattr(time, "time", lambda: clock_times[-1])
    return clock_times


def events(path: Path, clock: list[float]) -> list[dict[str, Any]]:
    """Two units of a trial; before each event the clock jumps, and the driver restarts in between."""
    with Journal(path) as journal:
        journal.append("study_started", study="s")
        clock.append(NOON - HOUR)
        journal.append("trial_suggested", trial_id="a", number=0, strategy="full", label="full", hparams={}, seed=0)
        journal.append("trial_started", trial_id="a")
        clock.append(NOON + DAY)
        journal.append("result", trial_id="a", unit=1, metrics={"val/acc": 0.5})
    clock.append(NOON + 1)
    with Journal(path) as journal:
        journal.append("result", trial_id="a", unit=2, metrics={"val/acc": 0.6})
        journal.append("trial_finished", trial_id="a", state="complete")
        journal.append("study_finished", state="complete")
    return Journal.read(path)


def test_s8_events_keep_their_order_and_no_time_is_negative(tmp_path: Path, clock: list[float]) -> None:
    recorded = events(tmp_path / "journal.jsonl", clock)
    times = [event["time"] for event in recorded]
    assert times == [NOON, NOON, NOON, NOON + DAY, NOON + DAY, NOON + DAY, NOON + DAY]
    assert [event["seq"] for event in recorded] == list(range(7))
    (record,) = fold(recorded)
    assert record.started is not None
    assert record.ended is not None
    assert record.ended >= record.started
    assert [unit["unit"] for unit in record.history] == [1, 2]


def test_s8_what_mlflow_receives_goes_by_units_and_ends_after_it_began(tmp_path: Path, clock: list[float]) -> None:
    projection = Projection("pets", summarizer())
    updates = [u for event in events(tmp_path / "journal.jsonl", clock) for u in projection.apply(event)]
    assert all(update.end >= update.start for update in updates if update.end is not None)
    assert len({update.uid for update in updates}) == 2
    steps = [(step, moment) for u in updates for key, _, moment, step in u.points if key == "val/acc" and step]
    assert [step for step, _ in steps] == [1, 2]
    assert steps == sorted(steps)


def test_s8_two_studies_of_one_moment_are_two(tmp_path: Path, clock: list[float]) -> None:
    """Their runs are distinguished by name; trials by number, configuration and seed."""
    uids = set()
    for name in ("a", "b"):
        with Journal(tmp_path / name) as journal:
            journal.append("study_started", study=name)
        projection = Projection("pets", summarizer())
        projection.apply(Journal.read(tmp_path / name)[0])
        uids.add(projection.study_uid)
    assert len(uids) == 2


def test_s8_durations_are_never_taken_from_the_clock_on_the_wall() -> None:
    """The wall clock dates events; durations come from `time.monotonic` and `time.perf_counter`."""
    used = {file for file, tree in parsed("orchestrator", "trainables", "search_spaces") for call, _ in calls(tree)
            if call in ("time.time", "datetime.now", "datetime.datetime.now", "datetime.utcnow")}  # fmt: skip
    stamps = {
        "orchestrator/record/journal.py",
        "orchestrator/tracking/delivery_state.py",
        "trainables/storage/checkpoint_store.py",
    }
    ages = {"orchestrator/commands/status.py", "orchestrator/tracking/local_database.py"}  # how long ago; never below 0
    assert used - stamps == ages
