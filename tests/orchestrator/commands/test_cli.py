"""The command line: data on stdout, everything else on stderr, exit codes, one-paragraph errors."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestrator import cli
from orchestrator.commands import exit_status
from orchestrator.commands.console import Output, message
from orchestrator.commands.exit_status import (
    FAILED,
    INTERRUPTED,
    OK,
    PARTIAL,
    PREFLIGHT,
    USAGE,
    of_error,
    of_trials,
)
from orchestrator.commands.run_summary import next_commands
from orchestrator.errors import PreflightError, Problem, StudyError
from orchestrator.record.journal import Journal
from orchestrator.record.records import State, TrialRecord
from orchestrator.study import Study
from tests.support.cpu_time import cpu_seconds_of_python
from tests.support.images import write_plain_images

ROOT = Path(__file__).resolve().parents[3]
STUDY = "name: tiny\ndata: {source: digits}\nmodel: {name: digits_vit}\nstrategies: [linear_probe, full]\n"


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    return file


def luthier(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def write_journal(folder: Path, *, failed: bool = False) -> None:
    folder.mkdir(parents=True)
    with Journal(folder / "journal.jsonl") as journal:
        journal.append("study_started", study="tiny", spec={})
        for number, state in enumerate(("complete", "failed" if failed else "pruned", "running")):
            trial = {"trial_id": f"t{number}", "number": number, "strategy": "full", "label": "full"}
            journal.append("trial_suggested", **trial, hparams={"lr_backbone": 0.1 * number}, seed=1, role="search",
                           held_out=None, config_hash=f"c{number}", search_values={})  # fmt: skip
            journal.append("trial_started", trial_id=f"t{number}", node="here", pid=1)
            metrics = {"val/acc": 0.5 + 0.1 * number, "best/val/acc": 0.5 + 0.1 * number, "test/acc": 0.5}
            journal.append("result", trial_id=f"t{number}", unit=1, metrics=metrics)
            if state in ("complete", "pruned"):
                journal.append("trial_finished", trial_id=f"t{number}", state=state)
            elif state == "failed":
                journal.append("trial_failed", trial_id=f"t{number}", reason="nan", error="NonFiniteError: loss")


class TestHelp:
    def test_help_costs_little_more_than_the_libraries_that_print_it(self) -> None:
        """`luthier --help` in under a second: no library of the study itself may be loaded for it."""
        command = ["-m", "orchestrator.cli", "--help"]
        completed = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, cwd=ROOT)
        floor = cpu_seconds_of_python("-c", "import typer, rich.console, rich.table, rich.panel, rich.markdown")
        assert cpu_seconds_of_python(*command) < 2 * floor
        for command in ("init", "plan", "run", "check", "status", "results", "demo", "submit", "data"):
            assert f"\n  {command} " in completed.stdout

    def test_version(self) -> None:
        from importlib.metadata import version

        assert luthier("--version").stdout == f"luthier {version('luthier')}\n"

    def test_no_command_is_a_usage_error(self) -> None:
        assert luthier().exit_code == USAGE

    def test_the_old_check_flag_names_the_new_command(self, study_file: Path) -> None:
        result = luthier("run", study_file, "--check")
        assert result.exit_code == USAGE
        assert result.stderr.splitlines()[-1] == (
            "Error: Invalid value for '--check': checking a study's folder is a command of its own: luthier check STUDY"
        )
        assert "--check" not in luthier("run", "--help").stdout

    def test_an_unknown_option_is_a_usage_error(self) -> None:
        result = luthier("plan", "--nothing")
        assert result.exit_code == USAGE
        assert "No such option: --nothing" in result.stderr


class TestErrors:
    def test_a_study_that_cannot_be_understood(self, study_file: Path) -> None:
        study_file.write_text(STUDY + "serch: {}\n")
        result = luthier("plan", study_file)
        assert result.exit_code == USAGE
        assert result.stdout == ""
        problem = f"Error: {study_file} is not valid: line 5, serch: unknown key. Did you mean 'search'? Known here: "
        assert result.stderr.startswith(problem)

    def test_the_same_as_json(self, study_file: Path) -> None:
        study_file.write_text(STUDY + "serch: {}\n")
        result = luthier("plan", study_file, "--json")
        report = json.loads(result.stdout)
        assert report["exit_code"] == result.exit_code == USAGE
        assert report["error"]["problems"][0]["path"] == "serch"
        assert report["error"]["problems"][0]["line"] == 5

    def test_a_study_that_has_not_run(self, study_file: Path) -> None:
        result = luthier("status", study_file)
        journal = study_file.parent / "studies/tiny/journal.jsonl"
        assert result.exit_code == FAILED
        assert result.stderr == f"Error: The study 'tiny' has no journal at {journal}. Start it with `luthier run`.\n"

    def test_ctrl_c(self, study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(self: Study, **options: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(Study, "run", interrupted)
        result = luthier("run", study_file)
        assert result.exit_code == INTERRUPTED
        assert result.stderr == "Error: interrupted. Run the same command again to continue.\n"

    def test_a_defect_shows_its_traceback_only_when_asked(
        self, study_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(self: Study, **options: Any) -> Any:
            raise KeyError("http://me:secret@host")

        monkeypatch.setattr(Study, "run", broken)
        result = luthier("run", study_file)
        assert result.exit_code == FAILED
        assert result.stderr == (
            "Error: unexpected KeyError: 'http://***@host'. Run the command again with -v for the traceback, and "
            "report it if it looks like a defect of Luthier.\n"
        )
        stderr = luthier("run", study_file, "-v").stderr
        assert "Traceback (most recent call last)" in stderr
        assert "secret" not in stderr

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (StudyError([Problem((), "x")]), USAGE),
            (PreflightError([Problem((), "x")]), PREFLIGHT),
            (ValueError("x"), FAILED),
            (OSError("x"), FAILED),
            (KeyboardInterrupt(), INTERRUPTED),
        ],
    )
    def test_codes(self, error: BaseException, code: int) -> None:
        assert of_error(error) == code

    def test_errors_of_data_cluster_and_resources_are_preflight(self) -> None:
        from orchestrator.cluster.auth import ClusterError
        from orchestrator.cluster.resources import ResourceError
        from orchestrator.ingest.errors import DataError

        assert {of_error(kind("x")) for kind in (DataError, ClusterError, ResourceError)} == {PREFLIGHT}
        assert message(ResourceError("Too many.")) == "Too many."

    @pytest.mark.parametrize("name", sorted(exit_status.PREFLIGHT_ERRORS))
    def test_every_preflight_error_exists_under_its_name(self, name: str) -> None:
        module, _, class_name = name.rpartition(".")
        class_ = getattr(importlib.import_module(module), class_name)
        assert f"{class_.__module__}.{class_.__qualname__}" == name
        assert issubclass(class_, Exception)


class TestOutput:
    def test_what_libraries_print_does_not_touch_the_json(self) -> None:
        """Also output of C code and child processes, which write to the descriptor and not to sys.stdout."""
        code = (
            "import os, subprocess\n"
            "from orchestrator.commands.console import Output\n"
            "out = Output(as_json=True)\n"
            "with out.opened():\n"
            "    print('python'); os.write(1, b'c\\n'); subprocess.run(['echo', 'child'])\n"
            "    out.result({'a': 1}, lambda console: None)\n"
            "print('after')\n"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert ended.stdout == '{\n  "a": 1\n}\nafter\n'
        assert ended.stderr.split() == ["python", "c", "child"]

    def test_logs_go_to_stderr_without_secrets(self, capsys: pytest.CaptureFixture[str]) -> None:
        with Output().opened():
            logging.getLogger("luthier").warning("cannot reach %s", "http://me:secret@host")
            logging.getLogger("luthier").info("quiet")
        assert capsys.readouterr() == ("", "WARNING: cannot reach http://***@host\n")

    def test_json_may_stand_anywhere(self, study_file: Path) -> None:
        write_journal(study_file.parent / "studies/tiny")
        first, last = luthier("--json", "status", study_file), luthier("status", study_file, "--json")
        assert json.loads(first.stdout)["study"] == json.loads(last.stdout)["study"] == "tiny"


class TestStatus:
    def test_counts_best_and_running(self, study_file: Path) -> None:
        write_journal(study_file.parent / "studies/tiny")
        status = json.loads(luthier("status", study_file, "--json").stdout)
        assert status["state"] == "running"
        assert status["trials"] == {"complete": 1, "pruned": 1, "running": 1}
        assert (status["best"]["number"], status["best"]["val/acc"]) == (2, pytest.approx(0.7))
        assert [trial["number"] for trial in status["running"]] == [2]

    def test_in_words(self, study_file: Path) -> None:
        write_journal(study_file.parent / "studies/tiny", failed=True)
        lines = luthier("status", study_file).stdout.splitlines()
        assert lines[1:] == [
            "Trials: 1 complete, 1 failed, 1 running; 40 search trials planned",
            "Best on ID validation so far: trial 2 full, unit 1, val 70.0 %",
            "Running:",
            "  trial 2 full, unit 1, val 70.0 %",
            "Failed:",
            "  trial 1 full, unit 1, val 60.0 %: nan: NonFiniteError: loss",
        ]

    def test_paused_trials_are_listed_with_the_unit_that_they_wait_at(self, study_file: Path) -> None:
        folder = study_file.parent / "studies/tiny"
        write_journal(folder)
        with Journal(folder / "journal.jsonl") as journal:
            journal.append("trial_paused", trial_id="t2")
        lines = luthier("status", study_file).stdout.splitlines()
        assert lines[1] == "Trials: 1 complete, 1 paused, 1 pruned; 40 search trials planned"
        assert lines[3:] == ["Paused, each at its rung:", "  trial 2 full, unit 1, val 70.0 %"]
        status = json.loads(luthier("status", study_file, "--json").stdout)
        assert [trial["number"] for trial in status["paused"]] == [2]
        assert status["running"] == []

    def test_the_folder_of_a_study_will_do(self, study_file: Path) -> None:
        folder = study_file.parent / "studies/tiny"
        write_journal(folder)
        (folder / "study.yaml").write_text(STUDY)
        assert json.loads(luthier("status", folder, "--json").stdout)["journal"] == str(folder / "journal.jsonl")
        assert json.loads(luthier("results", folder, "--json").stdout)["study"] == "tiny"


class TestResults:
    def test_leaderboard_as_json(self, study_file: Path) -> None:
        write_journal(study_file.parent / "studies/tiny")
        result = luthier("results", study_file, "--json")
        assert result.exit_code == OK
        assert json.loads(result.stdout)["best"]["number"] == 0

    def test_the_numbers_of_every_trial_as_json(self, study_file: Path) -> None:
        write_journal(study_file.parent / "studies/tiny")
        records = json.loads(luthier("results", study_file, "--json").stdout)["records"]
        assert [(r["number"], r["state"], r["hparams"], r["metrics"]["best/val/acc"]) for r in records] == [
            (0, "complete", {"lr_backbone": 0.0}, 0.5),
            (1, "pruned", {"lr_backbone": 0.1}, pytest.approx(0.6)),
            (2, "running", {"lr_backbone": 0.2}, pytest.approx(0.7)),
        ]

    @pytest.mark.parametrize(
        ("states", "code"),
        [(("complete",), OK), (("complete", "pruned"), OK), (("complete", "failed"), PARTIAL), (("failed",), FAILED)],
    )
    def test_exit_codes_of_a_run(self, states: tuple[State, ...], code: int) -> None:
        records = [
            TrialRecord(trial_id=str(n), number=n, strategy="full", label="full", state=state)
            for n, state in enumerate(states)
        ]
        assert of_trials(records) == code

    @pytest.mark.parametrize(("reason", "code"), [("interrupted", OK), ("infra", PARTIAL), ("nan", PARTIAL)])
    def test_a_trial_that_an_earlier_driver_left_behind_has_not_failed(self, reason: str, code: int) -> None:
        """A run that came to its end wanted it no more, such as a confirmation of what is no longer the best."""
        left = TrialRecord(trial_id="a", number=0, strategy="full", label="full", state="failed", reason=reason)
        done = TrialRecord(trial_id="b", number=1, strategy="full", label="full", state="complete")
        assert of_trials([left, done]) == code
        assert of_trials([left]) == FAILED

    def test_next_commands_can_be_pasted(self, tmp_path: Path) -> None:
        study = Study(name="a", data={"source": "digits"}, model={"name": "digits_vit"}, strategies=["full"],
                      storage=str(tmp_path / "my studies"))  # fmt: skip
        assert next_commands(study) == [
            f"Export the chosen model: luthier export '{study.folder}' --to model",
            "Compare the runs in MLflow (http://127.0.0.1:5000): mlflow server --host 127.0.0.1 --port 5000 "
            f"--backend-store-uri 'sqlite:///{tmp_path}/my studies/mlflow.db'",
            "Inspect the search (pip install 'luthier[dashboard]'): optuna-dashboard "
            f"'sqlite:///{tmp_path}/my studies/a/optuna.db'",
        ]


class TestInit:
    def test_a_study_of_the_built_in_digits(self, tmp_path: Path) -> None:
        file = tmp_path / "study.yaml"
        written = json.loads(luthier("init", "--output", file, "--json").stdout)
        spec = Study.from_yaml(file).spec
        assert written["study_file"] == str(file)
        assert (spec.name, spec.data.source, spec.model.name) == ("digits", "digits", "digits_vit")

    def test_a_study_of_ones_own_images(self, tmp_path: Path) -> None:
        write_plain_images(tmp_path / "my pets", {"sketch/cat": 4, "sketch/dog": 4, "photo/cat": 5, "photo/dog": 5})
        file = tmp_path / "study.yaml"
        assert luthier("init", tmp_path / "my pets", "-o", file, "--model", "resnet50").exit_code == OK
        spec = Study.from_yaml(file).spec
        assert (spec.name, spec.data.root, spec.model.name) == ("my-pets", str(tmp_path / "my pets"), "resnet50")
        assert (spec.data.id, spec.data.ood) == (["photo"], ["sketch"])

    @pytest.mark.parametrize("model", ["resnet18", "digits_vit"])
    def test_what_it_writes_can_be_planned_as_it_is(self, tmp_path: Path, model: str) -> None:
        root = write_plain_images(tmp_path / "pets", {"sketch/cat": 4, "sketch/dog": 4, "photo/cat": 5, "photo/dog": 5})
        file = tmp_path / "study.yaml"
        assert luthier("init", root, "-o", file, "--model", model).exit_code == OK
        result = luthier("plan", file, "--json")
        assert (result.exit_code, result.stderr) == (OK, "")
        text = file.read_text()
        assert ("- lora" in text) is (model == "digits_vit")
        assert ("# lora: needs transformer_block layers, of which resnet18 has none" in text) is (model == "resnet18")

    @pytest.mark.parametrize(("folder", "name"), [("data", "data-study"), ("x" * 120, "x" * 100), ("...", "study")])
    def test_a_folder_whose_name_no_study_can_have(self, tmp_path: Path, folder: str, name: str) -> None:
        root = write_plain_images(tmp_path / folder, {"cat": 4, "dog": 4})
        result = luthier("init", root, "-o", tmp_path / "a study.yaml")
        assert result.stdout.endswith(f"then: luthier plan '{tmp_path}/a study.yaml'\n")
        assert Study.from_yaml(tmp_path / "a study.yaml").spec.name == name

    def test_the_digits_by_their_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert luthier("init", "digits").exit_code == OK
        assert Study.from_yaml("study.yaml").spec.data.source == "digits"

    def test_a_file_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        result = luthier("init", "-o", tmp_path / "file" / "study.yaml")
        assert result.exit_code == FAILED
        assert result.stderr == (
            f"Error: The study file must be writable, but {tmp_path}/file/study.yaml is not (File exists). Give "
            "another one with --output.\n"
        )

    def test_a_network_that_is_not_known(self, tmp_path: Path) -> None:
        result = luthier("init", "--model", "resnet81", "-o", tmp_path / "study.yaml")
        assert result.exit_code == PREFLIGHT
        assert result.stderr.startswith("Error: The study cannot run here: model: ")
        assert "'resnet18'" in result.stderr
        assert not (tmp_path / "study.yaml").exists()

    def test_images_that_are_not_there(self, tmp_path: Path) -> None:
        result = luthier("init", tmp_path / "none", "-o", tmp_path / "study.yaml")
        assert result.exit_code == PREFLIGHT
        assert str(tmp_path / "none") in result.stderr
        assert not (tmp_path / "study.yaml").exists()

    def test_every_key_stands_in_it_with_its_meaning(self, tmp_path: Path) -> None:
        from orchestrator.commands.reference import rows, sections

        luthier("init", "--output", tmp_path / "study.yaml")
        text = (tmp_path / "study.yaml").read_text()
        for section in sections():
            for row in rows(section):
                assert section == "strategies" or f"{row.key}:" in text

    def test_an_existing_file_is_not_replaced(self, study_file: Path) -> None:
        result = luthier("init", "--output", study_file)
        assert result.exit_code == USAGE
        assert result.stderr == (
            f"Error: {study_file} exists already. Give another file with --output, or replace it with --force.\n"
        )
        assert study_file.read_text() == STUDY
        assert luthier("init", "--output", study_file, "--force").exit_code == OK


class TestDataCheck:
    def test_what_a_study_can_use(self, tmp_path: Path) -> None:
        root = write_plain_images(tmp_path / "pets", {"photo/cat": 5, "photo/dog": 5})
        result = luthier("data", "check", root, "--json")
        assert result.exit_code == OK
        assert json.loads(result.stdout)["domains"] == {"photo": {"cat": 5, "dog": 5}}

    def test_what_no_study_can_use(self, tmp_path: Path) -> None:
        root = write_plain_images(tmp_path / "pets", {"photo/cat": 5, "photo/dog": 1})
        result = luthier("data", "check", root)
        assert result.exit_code == PREFLIGHT
        assert "dog" in result.stdout


def test_submit_runs_the_module(study_file: Path) -> None:
    """The job's entry point is `python -m orchestrator.cli run study.yaml`."""
    environment = {**os.environ, "RAY_ADDRESS": ""}
    study_file.write_text("name: a/b\n")
    ended = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "run", str(study_file)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert ended.returncode == USAGE
    assert "line 1, name: a study's name has 1 to 100 letters" in ended.stderr
