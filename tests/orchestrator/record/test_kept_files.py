"""Retention: which trials keep their files, as a function of the records; and what a driver removes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.record.kept_files import (
    Keep,
    Retention,
    kept_bytes,
    kept_problems,
    numbers_on_disk,
    tidy_kept,
)
from orchestrator.record.kept_paths import predictions_file, weights_folder
from orchestrator.record.records import LiveRecords, TrialRecord, fold
from tests.support.toy_task import TOY, toy_trial
from trainables.specs.metrics import CLASSIFICATION
from trainables.storage.kept_weights import KeptWeights, save_weights


def record(number: int, label: str, accuracy: float, **changes: Any) -> TrialRecord:
    fields: dict[str, Any] = {
        "state": "complete",
        "metrics": {"val/acc": 0.5, "best/val/acc": accuracy, "val/nll": 1.0},
    }
    return TrialRecord(trial_id=f"t{number}", number=number, strategy=label, label=label, **{**fields, **changes})


RECORDS = [
    record(0, "full", 0.80),
    record(1, "daft", 0.90),
    record(2, "full", 0.85),
    record(3, "daft", 0.90),  # no better than trial 1: the earlier one stays
    record(4, "daft", 0.99, state="pruned"),
    record(5, "full", 0.99, state="failed", reason="nan"),
    record(6, "full", 0.99, state="running"),
    record(7, "full", 0.99, state="failed", reason="infra"),  # a run resumes it
    record(8, "full", 0.70, role="fold", held_out="dim"),
    record(9, "full", 0.60, role="confirm"),
    record(10, "daft", 0.60, role="confirm"),
    record(11, "layernorm", 0.60, role="reference", sample="0.25"),
]


def retention(keep: Keep = "best", **changes: Any) -> Retention:
    return Retention(keep, "val/acc", CLASSIFICATION, **changes)


@pytest.mark.parametrize(
    ("keep", "superseded"),
    [
        ("best", [0, 3, 4, 5, 8, 11]),
        ("confirmed", [0, 1, 2, 3, 4, 5, 8, 11]),
        ("all", [4, 5]),
    ],
)
def test_what_is_superseded(keep: Keep, superseded: list[int]) -> None:
    assert [r.number for r in retention(keep).superseded(RECORDS)] == superseded


def test_candidates_of_leave_one_domain_out_stay_until_folds_have_decided() -> None:
    assert [r.number for r in retention(runners_up=3).superseded(RECORDS)] == [0, 4, 5, 8, 11]


def test_ties_of_the_metric_go_to_the_tie_breaker() -> None:
    better = record(3, "daft", 0.90, metrics={"best/val/acc": 0.90, "val/nll": 0.5})
    assert [r.number for r in retention().superseded([RECORDS[1], better])] == [1]


def test_the_direction_is_that_of_the_tasks_metric() -> None:
    rule = Retention("best", TOY.validation, TOY)
    trials = [toy_trial(0, "full", 3.0, 3.0), toy_trial(1, "full", 2.0, 3.0), toy_trial(2, "full", 4.0, 3.0)]
    assert [r.number for r in rule.superseded(trials)] == [0, 2]


def test_a_validation_domain_is_what_trials_are_compared_by() -> None:
    rule = Retention("best", "ood/noisy/acc", CLASSIFICATION)
    trials = [
        record(n, "full", 0.9, metrics={"best/val/acc": 0.9, "ood/noisy/acc": a}) for n, a in enumerate((0.2, 0.4))
    ]
    assert [r.number for r in rule.superseded(trials)] == [0]


@pytest.mark.parametrize(
    ("keep", "roles"),
    [("best", {"search", "confirm"}), ("confirmed", {"confirm"}), ("all", {"search", "fold", "confirm", "reference"})],
)
def test_who_writes(keep: Keep, roles: set[str], tmp_path: Path) -> None:
    for role in ("search", "fold", "confirm", "reference"):
        paths = retention(keep).paths(tmp_path, record(7, "full", 0.5, role=role))
        expected = {
            "_weights": str(tmp_path / "weights" / "trial-0007"),
            "_predictions": str(tmp_path / "predictions" / "trial-0007.arrow"),
        }
        assert paths == (expected if role in roles else {})


def write_kept(study: Path, number: int) -> dict[str, Any]:
    """Weights and predictions of a trial; returns their fields in the record."""
    file = save_weights(
        weights_folder(study, number), KeptWeights({"head.bias": torch.ones(3)}, {}, {"number": number})
    )
    predictions = predictions_file(study, number)
    predictions.parent.mkdir(exist_ok=True)
    predictions.write_bytes(b"12345")
    digest = "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"
    return {
        "weights": {"sha256": file.sha256, "bytes": file.bytes},
        "predictions": {"sha256": digest, "bytes": 5},
    }


def test_a_driver_that_starts_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for kept in (0, 1, 2, 3, 6, 9):
        write_kept(tmp_path, kept)
    (tmp_path / "weights" / ".trial-0006-0123456789ab").mkdir()
    (tmp_path / "predictions" / ".trial-0006.arrow-0123456789ab").write_bytes(b"torn")
    named = {"weights": {"sha256": "a", "bytes": 1}}
    removed = tidy_kept(tmp_path, [record(0, "full", 0.80, **named), *RECORDS[1:]], retention())
    assert numbers_on_disk(tmp_path) == [1, 2, 6, 9]
    assert [r.number for r in removed] == [0], "the journal names this one's files"
    assert not list(tmp_path.glob("*/.trial-*"))
    assert tidy_kept(tmp_path, RECORDS, retention()) == []


def test_sizes_and_problems_of_kept_files(tmp_path: Path) -> None:
    fields = write_kept(tmp_path, 3)
    trial = record(3, "full", 0.9, **fields)
    manifest = weights_folder(tmp_path, 3) / "manifest.json"
    assert kept_bytes(tmp_path, 3) == fields["weights"]["bytes"] + manifest.stat().st_size + 5
    assert kept_problems(tmp_path, trial) == []
    predictions_file(tmp_path, 3).write_bytes(b"12346")
    (problem,) = kept_problems(tmp_path, trial)
    assert problem == (
        "Trial 3 full has kept a file of SHA-256 5994471abb01…, but "
        f"{predictions_file(tmp_path, 3)} has the SHA-256 34d128f5b3de…. Restore it from a copy, or let go of it: "
        "luthier prune."
    )
    predictions_file(tmp_path, 3).unlink()
    manifest.unlink()
    assert ["is missing" in text for text in kept_problems(tmp_path, trial)] == [False, True]
    assert kept_problems(tmp_path, record(4, "full", 0.9)) == []


def event(seq: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"seq": seq, "time": float(seq), "kind": kind, "trial_id": "a", **fields}


def test_records_say_what_is_kept_until_it_is_discarded() -> None:
    weights = {"sha256": "ab", "bytes": 10}
    events = [
        event(0, "trial_suggested", number=0, strategy="full"),
        event(1, "trial_started"),
        event(2, "result", unit=1, metrics={"val/acc": 0.5}),
        event(3, "result", unit=2, metrics={"val/acc": 0.6}, weights=weights, predictions=weights),
        event(4, "trial_finished", state="complete"),
    ]
    (kept,) = fold(events)
    assert (kept.weights, kept.predictions) == (weights, weights)
    live = LiveRecords(events)
    live.add(event(5, "weights_discarded", why="superseded"))
    (discarded,) = live.all()
    assert (discarded.weights, discarded.predictions, discarded.state) == (None, None, "complete")
    rewound = fold([*events[:4], event(4, "result", unit=1, metrics={"val/acc": 0.5})])
    assert rewound[0].weights is None
