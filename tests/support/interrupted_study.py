"""A study that is interrupted at planned events, without Tune: what its trials report, and what must not change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.journal import Journal, fold
from orchestrator.record.records import TrialRecord
from tests.support.driving import EPOCHS, accuracy, optuna_trials
from trainables.specs import fault_injection

Checkpoints = dict[int, int]
"""Number of a trial → units that its newest checkpoint holds."""


def result(config: dict[str, Any], unit: int) -> dict[str, Any]:
    """What a trial reports: a curve that depends on its configuration, seed and unit alone."""
    text = f"{sorted(config['hparams'].items())} {config['seed']} {unit}"
    noise = int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 0xFFFF
    value = accuracy(config) * (0.5 + 0.5 * unit / EPOCHS) + 0.05 * noise
    ends = unit == EPOCHS or config["strategy"] == "linear_probe"
    best = {"best/val/acc": value} if ends else {}
    rates = [rate for rate in config["hparams"].values() if isinstance(rate, float)]
    costs = {"cost/trainable_parameters": float(len(rates)), "cost/total_seconds": unit + sum(rates)}
    return {"val/acc": value, **best, **costs, "unit": unit, "training_iteration": unit, "finished": ends, "done": ends}


def continued(folder: Path) -> list[TrialRecord]:
    return fold(Journal.read(folder / "journal.jsonl"))


def shown(records: list[TrialRecord]) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions: everything but ids and times."""
    return [(r.number, r.label, r.role, r.seed, r.hparams, r.state, r.history, r.search_values) for r in records]


def known_to_optuna(folder: Path) -> list[tuple[Any, ...]]:
    """What the sampler learns from: all trials but interrupted ones, in their order."""
    return [
        (t.state, t.values, t.params, t.distributions, t.intermediate_values, t.user_attrs.get("duplicate_of"))
        for t in optuna_trials(folder)
        if "interrupted" not in t.user_attrs
    ]


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    def plan(text: str) -> None:
        monkeypatch.setenv(fault_injection.ENV_FAULTS, text)
        monkeypatch.setenv(fault_injection.ENV_FAULT_LOG, str(tmp_path / "faults"))
        fault_injection.reset_faults()

    yield plan
    monkeypatch.undo()
    fault_injection.reset_faults()


def events_of(folder: Path, kind: str) -> list[int]:
    return [e["seq"] for e in Journal.read(folder / "journal.jsonl") if e["kind"] == kind]


def interrupted_copy(folder: Path, source: Path, seq: int) -> Path:
    """A study's folder with nothing in it but the journal up to an event."""
    folder.mkdir()
    lines = (source / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(lines[: seq + 1]))
    return folder


def check_same_study(folder: Path, undisturbed: Path) -> None:
    """Assert that an interrupted study ended as the undisturbed one, with every unit once in its journal."""
    records = continued(folder)
    assert shown(records) == shown(continued(undisturbed))
    assert known_to_optuna(folder) == known_to_optuna(undisturbed)
    results = events_of(folder, "result")
    assert len(results) == sum(len(r.history) for r in records), "no unit twice in the journal"
