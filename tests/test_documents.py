"""The documents match the code: tables made from it, commands and links that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import trainables
from orchestrator import cli
from orchestrator.commands import exit_status
from orchestrator.commands.reference import DOCUMENTS, filled, rows, sections, yaml_value
from orchestrator.study_file.schema import StudySpec
from orchestrator.study_file.yaml_text import parse_yaml

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = (
    "README.md", "CONTRIBUTING.md", "docs/study.md", "docs/cluster.md", "docs/decisions.md", "docs/reliability.md",
    "docs/segmentation.md", "docs/weights.md", "docs/python.md", "docs/export.md", "docs/tracking.md",
)  # fmt: skip
FAULTS = {"P": 31, "S": 13, "D": 30, "C": 9, "N": 2}
"""Rows of docs/reliability.md: letter → how many."""


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands() -> set[str]:
    group = get_command(cli.app)
    assert isinstance(group, TyperGroup)
    return set(group.commands)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_are_those_of_the_code(document: str) -> None:
    assert text(document) == filled(text(document)), "run: python -m orchestrator.commands.reference"


def test_every_part_of_a_study_has_its_table() -> None:
    assert set(re.findall(r"<!-- fields: (\w+) -->", text("docs/study.md"))) == set(sections())
    assert all(row.meaning for section in sections() for row in rows(section))


def test_every_strategy_is_in_the_readme() -> None:
    table = text("README.md").partition("<!-- strategies -->")[2].partition("<!-- end -->")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == trainables.strategies()


@pytest.mark.parametrize("document", WRITTEN)
def test_links_lead_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text(document)) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []


def test_every_fault_has_a_test_of_its_name_or_a_reason() -> None:
    rows = re.findall(r"^\| ([A-Z]\d+) \|(.*)$", text("docs/reliability.md"), re.MULTILINE)
    assert [row for row, _ in rows] == [f"{letter}{n + 1}" for letter, count in FAULTS.items() for n in range(count)]
    for row, cells in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", cells)
        for file, name in named:
            assert f"def {name}(" in text(f"tests/{file}"), f"{row}: {file} has no {name}"
        mentions = [name for _, name in named if f"_{row.lower()}_" in name]
        assert mentions or re.search(r"\| not built: \w", cells), (
            f"{row} has neither a test named after it nor a reason"
        )


@pytest.mark.parametrize("document", ["README.md", "docs/study.md"])
def test_study_files_in_the_documents_are_valid(document: str) -> None:
    blocks = re.findall(r"```yaml\n(name: .*?)```", text(document), re.DOTALL)
    assert blocks
    for block in blocks:
        StudySpec.from_fields(parse_yaml(block).data)


@pytest.mark.parametrize("document", ["README.md", "docs/study.md", "docs/cluster.md"])
def test_commands_in_the_documents_exist(document: str) -> None:
    available = commands()
    named = set(re.findall(r"(?:`|^\.venv/bin/)luthier ([a-z]+)", text(document), re.MULTILINE))
    assert named <= available


def test_every_command_and_exit_code_is_documented() -> None:
    page = text("docs/study.md")
    for command in commands():
        assert f"`luthier {command}" in page
    codes = (
        exit_status.OK, exit_status.FAILED, exit_status.USAGE, exit_status.PARTIAL, exit_status.PREFLIGHT,
        exit_status.INTERRUPTED, exit_status.TERMINATED,
    )  # fmt: skip
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == [str(code) for code in codes]


def test_make_targets_in_the_documents_exist() -> None:
    makefile = text("Makefile")
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"(?:^|`)make (\w+)", text(document), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_ci_runs_the_tests_of_the_readme() -> None:
    script = text(".ci/run")
    assert "set -euo pipefail" in script
    assert "\nmake test\n" in script
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_make_needs_no_second_set_up() -> None:
    """What `make setup` makes is a file that is newer than its input, so that the second call does nothing."""
    rule = re.search(r"^\$\(STAMP\): (.*)$", text("Makefile"), re.MULTILINE)
    assert rule is not None
    assert rule[1] == "pyproject.toml"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("photo", "photo"), ("no", "'no'"), ("12", "'12'"), ("a b", "'a b'"), ("it's", "'it''s'"), ([1, 0.5], "[1, 0.5]")],
)
def test_values_are_written_as_they_are_read(value: object, expected: str) -> None:
    assert yaml_value(value) == expected
    assert parse_yaml(f"a: {expected}").data == {"a": value}


def _copy(source: Path, target: Path) -> None:
    for file in source.rglob("*.py"):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
