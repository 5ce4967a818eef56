"""CONTRIBUTING.md: the page's three files are a strategy that passes the conformance suite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trainables
from tests.support.pages import files_of
from tests.support.source_tree import ROOT

PACKAGES = ("trainables", "search_spaces", "benchmarks/support", "tests/support")
FILES = (
    "tests/__init__.py",
    "tests/trainables/__init__.py",
    "tests/conftest.py",
    "tests/conformance.py",
    "pyproject.toml",
)


def test_the_page_adds_a_strategy_that_does_not_exist_in_three_files() -> None:
    assert list(files_of("CONTRIBUTING.md")) == [
        "trainables/l2_sp.py", "search_spaces/l2_sp.py", "tests/trainables/test_l2_sp.py",
    ]  # fmt: skip
    assert "l2_sp" not in trainables.strategies()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_three_files_pass_their_tests_in_a_copy_of_the_checkout(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for file, contents in files_of("CONTRIBUTING.md").items():
        (tmp_path / file).write_text(contents, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/trainables/test_l2_sp.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "skipped" not in ran.stdout
