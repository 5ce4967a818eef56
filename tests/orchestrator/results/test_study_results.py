"""Leaderboard numbers against references, and everything that a reader is warned about."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from orchestrator.record.records import TrialRecord
from orchestrator.results.leaderboard import leaderboard
from orchestrator.results.selection import reported_trials
from orchestrator.results.study_results import Results


def trial(number: int, label: str, val: float, test: float, **changes: Any) -> TrialRecord:
    metrics = {"best/val/acc": val, "test/acc": test, "ood/mean/acc": test - 0.1, "ood/worst/acc": test - 0.2}
    fields: dict[str, Any] = {"trial_id": f"t{number}", "number": number, "strategy": label, "label": label}
    fields |= {"config_hash": f"h{number}", "state": "complete", "hparams": {"lr_head": 0.01}}
    return TrialRecord(**(fields | {"metrics": metrics | {"calib/ece": 0.05}} | changes))


STUDY = [
    trial(0, "full", 0.80, 0.70),
    trial(1, "full", 0.90, 0.60),
    trial(2, "daft", 0.85, 0.90),
    trial(3, "lp_ft", 0.99, 0.99, state="pruned"),
    trial(4, "full", 0.95, 0.95, state="failed", reason="nan"),
    *(
        trial(10 + n, "full", 0.5, acc, role="confirm", seed=100 + n, config_hash="h1")
        for n, acc in enumerate((0.6, 0.7, 0.8))
    ),
]


def test_rows_are_means_over_fresh_seeds_of_the_configuration_that_validation_chose() -> None:
    table = leaderboard(STUDY)
    assert list(table["label"]) == ["full", "daft", "lp_ft"]
    full, daft, lp_ft = table.to_dict("records")
    assert (full["number"], full["seeds"], full["confirmed"]) == (1, 3, True)
    assert full["val/acc"] == 0.5  # of the fresh seeds, not of the search trial
    assert full["test/acc"] == pytest.approx(0.7)  # neither the search trial's 0.6 nor the best seed's 0.8
    assert full["test/acc/ci95"] == pytest.approx(4.302652729911275 * 0.1 / math.sqrt(3))
    assert full["ood/worst/acc"] == pytest.approx(0.5)
    assert (full["trials"], full["complete"], full["failed"]) == (3, 2, 1)
    assert (daft["seeds"], daft["confirmed"], daft["test/acc"]) == (1, False, 0.9)
    assert math.isnan(daft["test/acc/ci95"])
    assert (lp_ft["seeds"], lp_ft["number"], lp_ft["pruned"]) == (0, -1, 1)
    assert math.isnan(lp_ft["test/acc"])


def test_a_seed_that_was_confirmed_twice_counts_once_and_failed_confirmations_not() -> None:
    again = [
        trial(0, "full", 0.9, 0.5),
        trial(1, "full", 0.9, 0.6, role="confirm", seed=1, config_hash="h0"),
        trial(2, "full", 0.9, 0.7, role="confirm", seed=1, config_hash="h0"),
        trial(3, "full", 0.9, 0.8, role="confirm", seed=2, config_hash="h0", state="failed"),
    ]
    assert [record.number for record in reported_trials(again, "h0")] == [1]


def test_the_regret_line() -> None:
    results = Results(STUDY, {"name": "pets"})
    assert results.regret_line() == (
        "Regret 0.0 points of ood/mean/acc (confirmed configurations): the oracle, which looks at test data, finds "
        "none better."
    )
    alone = Results([trial(0, "full", 0.9, 0.7)], {"name": "pets"})
    assert alone.regret_line() == (
        "Regret 0.0 points of ood/mean/acc (search trials: nothing was confirmed): the oracle, which looks at test "
        "data, finds none better."
    )
    daft = [trial(20 + n, "daft", 0.4, 0.9, role="confirm", seed=100 + n, config_hash="h2") for n in range(3)]
    assert Results([*STUDY, *daft], {"name": "pets"}).regret_line() == (
        "Regret 20.0 points of ood/mean/acc (confirmed configurations): the oracle, which looks at test data, would "
        "choose daft (trial 2), 80.0 %."
    )


def test_warnings_name_failures_labels_without_result_edges_and_few_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def near_edge(strategy: str, hparams: Any, **of: Any) -> list[str]:
        asked.append((strategy, of))
        return ["lr_head = 0.01 lies at the lower edge."] if strategy == "daft" else []

    spec = {"name": "pets", "strategies": [{"label": "daft", "fixed": {"bn": True}, "preset": "paper"}]}
    running = trial(20, "daft", 0.1, 0.1, role="confirm", config_hash="h2", state="running")
    interrupted = trial(21, "daft", 0.1, 0.1, role="confirm", state="failed", reason="interrupted")
    monkeypatch.setattr("search_spaces.near_edge", near_edge)
    assert Results([*STUDY, running, interrupted], spec).warnings() == [
        "1 of 10 trials failed (1 nan); `luthier status` shows their errors.",
        "2 of 10 trials are unfinished. Run the study again to continue it.",
        "lp_ft: no trial used its whole budget (1 pruned), so it cannot be ranked.",
        "daft: lr_head = 0.01 lies at the lower edge.",
        "Fewer than 3 seeds stand behind daft (1): differences between these rows may be chance. Raise confirm.seeds, "
        "and confirm.top_k to at least the number of strategies.",
        "No per-sample results are kept of the trials in the leaderboard: intervals are over seeds alone, without the "
        "part of the test samples, and no entry can be called ahead.",
    ]
    task = {"task": "classification"}
    assert asked == [
        ("full", {"fixed": (), "preset": None, **task}),
        ("daft", {"fixed": ("bn",), "preset": "paper", **task}),
    ]


def test_the_search_spaces_say_what_lies_at_an_edge() -> None:
    results = Results([trial(0, "full", 0.9, 0.7, hparams={"lr_backbone": 1e9})], {"name": "pets"})
    assert any(warning.startswith("full: lr_backbone = 1e+09 lies at the ") for warning in results.warnings())


def test_everything_is_json() -> None:
    exported = Results(STUDY, {"name": "pets"}).to_dict()
    assert json.loads(json.dumps(exported, allow_nan=False)) == exported
    assert exported["leaderboard"][1]["test/acc/ci95"] is None
    assert exported["best"]["number"] == 1
    assert exported["regret"]["oracle"]["oracle"] is True
    assert exported["trials"] == {"complete": 6, "pruned": 1, "failed": 1}
    assert [(r["number"], r["state"], r["metrics"]) for r in exported["records"]] == [
        (r.number, r.state, dict(r.metrics)) for r in STUDY
    ]


def test_a_study_without_a_complete_trial_states_it() -> None:
    results = Results([trial(0, "full", 0.5, 0.5, state="failed", reason="oom")], {"name": "pets"})
    exported = results.to_dict()
    assert exported["leaderboard"] == []
    assert exported["problem"].startswith("Selection needs at least one complete search trial, but got 1 failed.")
    assert exported["problem"] in results.markdown()
    assert exported["problem"] in rendered(results)


def test_rendering_shows_numbers_regret_and_warnings() -> None:
    text = rendered(Results(STUDY, {"name": "pets"}))
    assert "pets: leaderboard by id_val" in text
    assert "70.0 ± 24.8" in text
    assert "full: trial 1, lr_head=0.01\ndaft: trial 2, lr_head=0.01\nChosen by id_val: full (trial 1)" in text
    assert "Regret 0.0 points" in text
    assert "Warning: 1 of 8 trials failed (1 nan)" in text


def test_the_oracle_is_marked_wherever_it_shows() -> None:
    results = Results(STUDY, {"name": "pets", "search": {"objective": "oracle"}})
    mark = "(ORACLE: looks at test data, an upper bound)"
    assert mark in rendered(results)
    assert mark in results.markdown()
    assert results.to_dict()["best"]["oracle"] is True
    assert results.leaderboard("oracle")["rule"].eq("oracle").all()


def rendered(results: Results) -> str:
    console = Console(file=io.StringIO(), width=160)
    results.render(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
