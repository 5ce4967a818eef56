"""Journals of earlier versions: without tasks and checksums, with events that are no longer written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.status import Status
from orchestrator.record.journal import Journal
from orchestrator.record.records import fold, metrics_of, study_header
from orchestrator.report.page import report_html
from orchestrator.results.study_results import Results


def suggestion(number: int, label: str) -> dict[str, Any]:
    return {
        "kind": "trial_suggested",
        "trial_id": f"t{number}",
        "number": number,
        "strategy": label,
        "label": label,
        "hparams": {"lr_head": 0.1},
        "config_hash": f"h{number}",
        "seed": 0,
        "role": "search",
    }


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    spec = {"name": "pets", "model": {"name": "digits_vit"}, "search": {"objective": "id_val"}}
    events: list[dict[str, Any]] = [{"kind": "study_started", "study": "pets", "spec": spec, "dataset": "digits"}]
    for number, (label, val, test) in enumerate([("full", 0.9, 0.8), ("lora", 0.8, 0.9)]):
        metrics = {"val/acc": val, "best/val/acc": val, "test/acc": test, "ood/mean/acc": test, "best/epoch": 1}
        events += [
            suggestion(number, label),
            {"kind": "trial_started", "trial_id": f"t{number}"},
            {"kind": "checkpoint", "trial_id": f"t{number}", "unit": 1, "path": "/ray/checkpoint_000001"},
            {"kind": "result", "trial_id": f"t{number}", "unit": 1, "metrics": metrics},
            {"kind": "trial_finished", "trial_id": f"t{number}", "state": "complete"},
        ]
    path = tmp_path / "journal.jsonl"
    lines = [json.dumps({"seq": seq, "time": 1.0 + seq, **event}) for seq, event in enumerate(events)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_results_report_and_status_are_those_of_classification(journal: Path) -> None:
    events = Journal.read(journal)
    records = fold(events)
    header = study_header(events)
    results = Results(records, header["spec"])
    assert results.best().record.label == "full"
    assert results.leaderboard()["test/acc"].to_list() == [0.8, 0.9]
    assert "80.0" in report_html(events)
    status = Status("pets", journal, header["state"], records, 0.0, 2, metrics_of(header["spec"]))
    assert status.to_dict()["best"]["val/acc"] == 0.9


def test_it_can_be_appended_to(journal: Path) -> None:
    with Journal(journal) as opened:
        assert opened.append("study_finished", state="complete")["seq"] == 11
    assert study_header(Journal.read(journal))["state"] == "complete"
