"""Studies of earlier versions are read with the numbers that those versions showed, or refused; never half-read.

`data/before_the_rebuild` is the folder of a small study that ran at the last commit before the packages were
rearranged, with what `luthier results --json` and `luthier status --json` of that commit printed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.commands.exit_status import OK
from orchestrator.record.changes import ChangedStudyError, check_changes, code_digest, versions
from orchestrator.record.journal import Journal
from orchestrator.record.records import fold, study_header

OLD = Path(__file__).parent / "data" / "before_the_rebuild"
EXPECTED: dict[str, dict[str, Any]] = json.loads((OLD / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "studies" / "before-the-rebuild"
    shutil.copytree(OLD, folder)
    return folder


def output_of(command: str, folder: Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, [command, str(folder), "--json"])
    assert result.exit_code == OK, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def within(printed: Any, expected: Any) -> Any:
    """`printed` without the keys that the earlier version did not have."""
    if isinstance(expected, dict):
        return {key: within(printed[key], value) for key, value in expected.items()}
    if isinstance(expected, list) and len(printed) == len(expected):
        return [within(*pair) for pair in zip(printed, expected, strict=True)]
    return printed


@pytest.mark.parametrize("command", ["results", "status"])
def test_numbers_are_those_that_the_version_of_the_study_showed(folder: Path, command: str) -> None:
    assert within(output_of(command, folder), EXPECTED[command]) == EXPECTED[command]


def test_every_trial_and_metric_is_read(folder: Path) -> None:
    events = Journal.read(folder / "journal.jsonl")
    records = output_of("results", folder)["records"]
    assert len(records) == sum(event["kind"] == "trial_suggested" for event in events) == 6
    for record, trial in zip(records, fold(events), strict=True):
        written = [e["metrics"] for e in events if e["kind"] == "result" and e["trial_id"] == trial.trial_id]
        assert record["metrics"] == {name: value for metrics in written for name, value in metrics.items()}


def test_the_report_shows_every_trial(folder: Path) -> None:
    page = Path(output_of("report", folder)["report"]).read_text()
    table = page.partition("<h2>Trials</h2>")[2].partition("<tbody>")[2].partition("</tbody>")[0]
    assert table.count("<tr>") == 6
    assert "91.8" in page  # accuracy of the best trial on ID validation, in percent


def test_continuing_it_is_refused_until_the_change_of_code_is_allowed(folder: Path) -> None:
    """Its journal and checkpoints can be continued, but the trials to come would be computed by other code."""
    events = Journal.read(folder / "journal.jsonl")
    before = study_header(events)
    now = {**before, "versions": {**before["versions"], "code": versions()["code"]}}
    with pytest.raises(ChangedStudyError) as caught:
        check_changes(events, now)
    assert str(caught.value) == (
        "The study 'before-the-rebuild' was changed since its last run: versions.code: "
        f"{before['versions']['code']} -> {code_digest()} (Luthier's own code differs, as after an update)\n"
        "Put the old values back, or give the study another name. If its trials may differ in this, run it with "
        "--allow-change versions.code"
    )
    assert [change.key for change in check_changes(events, now, ["versions.code"])] == ["versions.code"]


def test_a_study_of_a_later_format_is_refused_in_one_sentence(folder: Path) -> None:
    journal = folder / "journal.jsonl"
    first, rest = journal.read_text().split("\n", 1)
    header = {**json.loads(first), "format": 99}
    del header["crc"]
    journal.write_text(json.dumps(header) + "\n" + rest)
    result = CliRunner().invoke(app, ["results", str(folder)])
    assert result.exit_code != OK
    assert result.stderr == (
        f"Error: This Luthier reads journals of format 1, but {journal} has format 99. Use the Luthier that wrote "
        "it, or a newer one.\n"
    )
