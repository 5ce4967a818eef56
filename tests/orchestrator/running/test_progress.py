"""The display while a study runs."""

from __future__ import annotations

import io
import pickle
import re
import time
from typing import Any

import pytest
from rich.console import Console

from orchestrator.running.progress import Progress, duration


class Clock:
    """A monotonic clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr("orchestrator.running.progress.time.monotonic", ticking)
    return ticking


def plain() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def tell(progress: Progress, kind: str, **fields: Any) -> None:
    progress.event({"seq": 0, "time": time.time(), "kind": kind} | fields)


def run_trial(progress: Progress, number: int, units: int, state: str | None = "complete", label: str = "daft") -> None:
    trial_id = f"t{number}"
    fields = {"trial_id": trial_id, "number": number, "strategy": label, "label": label}
    tell(progress, "trial_suggested", **fields)
    tell(progress, "trial_started", trial_id=trial_id)
    for unit in range(1, units + 1):
        metrics = {"val/acc": 0.5 + unit / 100, "cost/unit_seconds": 2.0}
        tell(progress, "result", trial_id=trial_id, unit=unit, metrics=metrics)
    if state is not None:
        tell(progress, "trial_finished", trial_id=trial_id, state=state)


def test_without_a_terminal_every_event_is_one_line() -> None:
    console = plain()
    with Progress(trials=2, epochs=3, console=console) as progress:
        tell(progress, "study_started", study="pets")
        tell(progress, "measured", what="plasticity", metrics={"plasticity/ln1": 0.5, "plasticity/mha": 1.93})
        tell(progress, "measured", what="fsr", metrics={"fsr/full": 0.61, "fsr/full/low": 0.5, "fsr/oracle/a": None})
        run_trial(progress, 7, 2, "pruned")
        tell(progress, "trial_suggested", trial_id="x", number=8, strategy="full", label="full")
        tell(progress, "trial_started", trial_id="x")
        tell(progress, "trial_retried", trial_id="x", reason="infra", error="ActorDiedError: gone")
        tell(progress, "trial_started", trial_id="x")
        tell(progress, "trial_failed", trial_id="x", reason="nan", error="NonFiniteError: [loss]")
        tell(progress, "checkpoint", trial_id="x", unit=1, path="p")
        tell(progress, "study_finished", state="complete")
    lines = printed(console).splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        "study pets started",
        "plasticity measured: mha 1.93, ln1 0.50",
        "fsr measured: full 0.61",
        "trial 7 daft: started",
        "trial 7 daft: epoch 1/3, val 0.510, 2.0 s",
        "trial 7 daft: epoch 2/3, val 0.520, 4.0 s",
        "trial 7 daft: pruned after 2 epochs, val 0.520, 4.0 s",
        "trial 8 full: started",
        "trial 8 full: retried (infra) ActorDiedError: gone",
        "trial 8 full: started again (attempt 2)",
        "trial 8 full: failed (nan) NonFiniteError: [loss]",
        "study complete",
    ]


def test_a_line_has_its_units_validation_and_the_table_the_best_so_far() -> None:
    """Not that of the last rung, at which `best/…` was reported."""
    console = plain()
    progress = Progress(trials=2, epochs=9, console=console)
    tell(progress, "trial_suggested", trial_id="a", number=0, strategy="daft", label="daft")
    tell(progress, "trial_started", trial_id="a")
    for unit, value in enumerate((0.3, 0.8, 0.7), start=1):
        rung = {"best/val/acc": 0.3, "test/acc": 0.2} if unit == 1 else {}
        tell(progress, "result", trial_id="a", unit=unit, metrics={"val/acc": value, **rung})
    assert [line[9:] for line in printed(console).splitlines()][1:] == [
        "trial 0 daft: epoch 1/9, val 0.300, 0.0 s",
        "trial 0 daft: epoch 2/9, val 0.800, 0.0 s",
        "trial 0 daft: epoch 3/9, val 0.700, 0.0 s",
    ]
    table = Console(file=io.StringIO(), width=120)
    table.print(progress.render())
    assert "0.800" in printed(table).splitlines()[1]
    assert "best val 0.800 (daft)" in progress.summary()


def test_the_table_shows_running_trials_and_the_last_ended_ones(clock: Clock) -> None:
    progress = Progress(trials=20, epochs=4, console=plain())
    for number in range(8):
        run_trial(progress, number, 4)
    run_trial(progress, 8, 2, None, "full [x]")
    console = Console(file=io.StringIO(), width=120)
    console.print(progress.render())
    rows = printed(console).splitlines()
    assert rows[0].split() == ["trial", "strategy", "epoch", "val", "spend", "state"]
    assert [row.split()[0] for row in rows[1:-1]] == ["3", "4", "5", "6", "7", "8"]
    assert rows[-2].split() == ["8", "full", "[x]", "2/4", "0.520", "4.0", "s", "running"]
    assert rows[-1].startswith("8/20 trials, best val 0.540 (daft), spend 1 min 08 s, ETA 0.0 s")


def test_paused_trials_are_counted_and_stand_before_the_running_ones(clock: Clock) -> None:
    console = plain()
    progress = Progress(trials=4, epochs=4, console=console)
    run_trial(progress, 0, 4)
    for number in (1, 2):
        run_trial(progress, number, 1, None)
        tell(progress, "trial_paused", trial_id=f"t{number}")
    tell(progress, "trial_promoted", trial_id="t2")
    assert [line[9:] for line in printed(console).splitlines()][-2:] == [
        "trial 2 daft: paused after epoch 1/4, val 0.510",
        "trial 2 daft: promoted after epoch 1/4, val 0.510",
    ]
    table = Console(file=io.StringIO(), width=120)
    table.print(progress.render())
    rows = printed(table).splitlines()
    assert [(row.split()[0], row.split()[-1]) for row in rows[1:-1]] == [
        ("0", "complete"), ("1", "paused"), ("2", "running"),
    ]  # fmt: skip
    assert rows[-1].startswith("1/4 trials, 1 paused, best val 0.540 (daft)")


def test_a_trial_that_takes_fewer_units_than_its_budget_is_counted_by_its_own(clock: Clock) -> None:
    console = plain()
    progress = Progress(10, 4, console, units=lambda record: 1 if record.label == "linear_probe" else 4)
    run_trial(progress, 0, 1, None, "linear_probe")
    run_trial(progress, 1, 4)
    clock.now = 10.0
    assert "trial 0 linear_probe: epoch 1/1, val 0.510, 2.0 s" in printed(console)
    assert "trial 1 daft: epoch 1/4" in printed(console)
    assert progress.eta == pytest.approx(10 * (10 - 2) / 2)
    tell(progress, "trial_finished", trial_id="t0", state="complete")
    assert "trial 0 linear_probe: complete after 1 epoch, val 0.510, 2.0 s" in printed(console)


def test_eta_is_the_rate_so_far_and_counts_running_trials_by_their_units(clock: Clock) -> None:
    progress = Progress(trials=10, epochs=4, console=plain())
    assert progress.eta is None
    run_trial(progress, 0, 4)
    run_trial(progress, 1, 2, "pruned")
    run_trial(progress, 2, 2, None)
    clock.now = 50.0
    assert progress.eta == pytest.approx(50 * (10 - 2.5) / 2.5)
    assert progress.spend == 16.0


def test_a_terminal_gets_a_live_table_and_no_lines() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False)
    with Progress(trials=1, epochs=2, console=console) as progress:
        run_trial(progress, 0, 2)
    text = printed(console)
    assert "daft: epoch" not in text
    assert "1/1 trials" in text


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    progress = Progress(trials=1, epochs=2, console=console)
    run_trial(progress, 0, 1, None)
    tell(progress, "trial_failed", trial_id="t0", reason="nan", error="x")
    console.print(progress.render())
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", printed(console))


def test_a_pickled_copy_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(trials=1, epochs=2)
    run_trial(progress, 0, 1, None)
    before = capsys.readouterr().err
    copy = pickle.loads(pickle.dumps(progress))  # noqa: S301  # what Tune does to its callbacks
    copy.start()
    run_trial(copy, 1, 1)
    assert "trial 0 daft: started" in before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
