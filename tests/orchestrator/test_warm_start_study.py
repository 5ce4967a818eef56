"""A whole study that starts from another one, and continues after that one is gone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study
from orchestrator.record.changes import ChangedStudyError
from orchestrator.record.journal import Journal
from orchestrator.record.records import WARM_START, TrialRecord, fold

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from orchestrator.cluster.connection import connect

    with connect(cpus=2, dashboard=False):
        yield


def study(storage: Path, name: str, trials: int = 5, seed: int = 0, **changes: Any) -> Study:
    search = {
        "trials": trials,
        "epochs": 1,
        "scheduler": "none",
        "allocation": "equal",
        "batch_size": 128,
        "seed": seed,
    }
    return Study(**{
        "name": name, "data": {"source": "digits", "train_fraction": 0.1}, "model": {"name": "digits_cnn"},
        "strategies": ["linear_probe", "full", "daft"],
        "search": search,
        "confirm": {"top_k": 0}, "diagnostics": {"measure": []},
        "resources": {"concurrent": 1, "channels_last": False}, "storage": str(storage), **changes,
    })  # fmt: skip


def records(study: Study) -> list[TrialRecord]:
    return fold(Journal.read(study.folder / "journal.jsonl"))


def test_a_study_starts_from_another_and_continues_without_it(tmp_path: Path) -> None:
    # Another seed, so that the points of one study are not those of the other anyway.
    before = study(tmp_path, "before", seed=1)
    before.run(progress=False)
    best = {
        label: max(
            (r for r in records(before)[3:] if r.label == label), key=lambda r: r.metrics["best/val/acc"]
        ).hparams
        for label in ("full", "daft")
    }
    later = study(tmp_path, "later", warm_start=["before"])
    later.run(progress=False)
    first = records(later)
    assert [r.label for r in first] == ["linear_probe", "full", "daft", "full", "daft"]
    assert [r.hparams for r in first[3:]] == [best["full"], best["daft"]]

    shutil.rmtree(before.folder)
    more = study(tmp_path, "later", trials=6, warm_start=["before"])
    more.run(progress=False)
    assert [r.hparams for r in records(more)[:5]] == [r.hparams for r in first]
    assert len(records(more)) == 6
    events = Journal.read(more.folder / "journal.jsonl")
    assert [event["studies"] for event in events if event["kind"] == WARM_START] == [["before"]]
    with pytest.raises(ChangedStudyError, match="warm_start: before -> none"):
        study(tmp_path, "later", trials=6).run(progress=False)
