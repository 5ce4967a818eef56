"""Fixtures of the tests that write to MLflow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty tracking database; making one takes seconds."""
    from orchestrator.tracking.writer import MlflowWriter

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowWriter(f"sqlite:///{path}", "template", "none")
    return path


@pytest.fixture
def database(template: Path, tmp_path: Path) -> Path:
    """A copy of the empty tracking database for one test."""
    return Path(shutil.copy(template, tmp_path / "mlflow.db"))
