"""The spellings of one tracking server."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.tracking.server_name import server_name


@pytest.mark.parametrize(
    "uri",
    [
        "http://localhost:5000", "http://127.0.0.1:5000", "http://[::1]:5000/", "HTTP://LocalHost:5000//",
        "http://me:hunter2@localhost.:5000",
    ],
)  # fmt: skip
def test_p12_one_server_has_one_name(uri: str) -> None:
    assert server_name(uri) == "http://localhost:5000"


def test_p12_the_default_port_may_be_left_out() -> None:
    assert server_name("https://Tracking.example/team/") == server_name("https://tracking.example:443/team")
    assert server_name("http://tracking.example") == "http://tracking.example:80"


def test_p12_other_servers_have_other_names() -> None:
    uris = [
        "http://a:5000", "https://a:5000", "http://a:5001", "http://b:5000", "http://a:5000/x", "http://a:port",
        "databricks", "postgresql://me@a/mlflow", "sqlite:////a/mlflow.db",
    ]  # fmt: skip
    assert len({server_name(uri) for uri in uris}) == len(uris)


def test_p12_a_sqlite_file_is_named_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    spelled = ("mlflow.db", f"{tmp_path}/real/mlflow.db", f"{tmp_path}/link/./mlflow.db?timeout=5")
    assert {server_name(f"sqlite:///{path}") for path in spelled} == {f"sqlite:///{tmp_path}/real/mlflow.db"}
    assert server_name("sqlite:///:memory:") == "sqlite:///:memory:"
