"""C9: secrets of the environment and of URLs are in nothing that a study leaves or prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.support.killed_study import ROOT, write_material, write_study
from orchestrator.cluster.driver_process import free_port
from orchestrator.record.journal import Journal
from trainables.specs.errors import failure_text
from trainables.specs.redaction import is_secret, redact

SECRETS = {
    "HF_TOKEN": "hf-5a1d0c7e",
    "AWS_SECRET_ACCESS_KEY": "aws/9b2f+44c0",
    "TRACKING_API_KEY": "key-c3d8e1f2",
    "CLIENT_SECRET": "secret-77aa01",
    "DB_PASSWORD": "password-e0b4",
}
IN_URL = "pw-2f6b9d"
"""The password of the tracking server's URL."""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "name", [*SECRETS, "RAY_AUTH_TOKEN", "api_keys", "MY_PASSWD", "GH_TOKEN_2", "GOOGLE_CREDENTIALS"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["RAY_AUTH_TOKEN_PATH", "HOME", "MONKEY", "KEYBOARD", "PWD", "AWS_ACCESS_KEY_ID", "RAY_AUTH_MODE"]
)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret(name)


def test_c9_values_of_secret_variables_are_hidden_and_short_or_other_ones_are_not() -> None:
    environ = {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefghij", "C_TOKEN": "true", "PLAIN": "plainly-said"}
    text = redact("got abcdefghij, abcdefgh and true as plainly-said", environ)
    assert text == "got ***, *** and true as plainly-said"


@pytest.mark.usefixtures("planted")
def test_c9_a_failure_that_quotes_secrets_is_kept_without_them(tmp_path: Path) -> None:
    quoted = f"401 for {SECRETS['HF_TOKEN']} at http://me:{IN_URL}@host/?api_key={SECRETS['TRACKING_API_KEY']}"
    with Journal(tmp_path / "journal.jsonl") as journal:
        event = journal.append("trial_failed", trial_id="a", reason="user", error=quoted)
    assert event["error"] == "401 for *** at http://***@host/?api_key=***"
    assert "RuntimeError: 401 for *** at http://***@host/?api_key=***" in failure_text(RuntimeError(quoted))


@pytest.mark.usefixtures("planted")
def test_c9_an_error_that_tune_keeps_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune hands on what a trial raises."""
    from trainables.engine.tune_trainable import TuneTrainable

    def fail(self: TuneTrainable) -> Any:
        raise OSError(f"cannot read https://me:{IN_URL}@host with {SECRETS['HF_TOKEN']}")

    monkeypatch.setattr(TuneTrainable, "_next", fail)
    with pytest.raises(OSError) as error:
        TuneTrainable({"strategy": "full"}).step()
    assert str(error.value) == "OSError: cannot read https://***@host with ***"
    assert error.value.__suppress_context__


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """Port of an MLflow server, which takes any user and password."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}",
         "--artifacts-destination", str(tmp_path / "kept")],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield port
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        for one in (*children, process):
            one.kill()
        process.wait()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_c9_a_real_study_leaves_and_prints_none(server: int, one_thread: None, tmp_path: Path) -> None:
    material = write_material(tmp_path / "material")
    exploding = {"name": "full", "label": "exploding", "fixed": {"lr_backbone": 1e30, "lr_head": 1e30}}
    file = write_study(
        tmp_path / "study", material, strategies=["linear_probe", exploding], search={"trials": 2, "epochs": 1},
        confirm={"top_k": 0}, tracking={"uri": f"http://me:{IN_URL}@127.0.0.1:{server}"},
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from orchestrator.cli import app; app()", "-v", "run", str(file)], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, **SECRETS, "RAY_AUTH_TOKEN": "ray-token-81c2d4e6"},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "http://***@127.0.0.1" in done.stdout
    secrets = [*SECRETS.values(), IN_URL, "ray-token-81c2d4e6"]
    assert [secret for secret in secrets if secret in done.stdout + done.stderr] == []
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path != file]
    assert {"journal.jsonl", "server.db", "study.yaml"} <= {path.name for path in left}
    pattern = re.compile("|".join(map(re.escape, secrets)).encode())
    assert [(path, match[0]) for path in left if (match := pattern.search(path.read_bytes()))] == []
    assert b"nan" in (tmp_path / "server.db").read_bytes()  # the server has the study
