"""Fault injection: matching, counting, and the message for a mistyped fault."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainables.specs import fault_injection

ROOT = str(Path(__file__).parents[3])


@pytest.fixture(autouse=True)
def _no_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(fault_injection.ENV_FAULTS, raising=False)
    monkeypatch.delenv(fault_injection.ENV_FAULT_LOG, raising=False)
    fault_injection.reset_faults()
    yield
    fault_injection.reset_faults()


def test_without_the_variable_nothing_happens() -> None:
    assert fault_injection.fault_point("step", step=1) is None


def test_a_fault_fires_once_where_all_of_its_fields_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault_injection.ENV_FAULTS, "trial=2,unit=3,phase=step,action=nan")
    with fault_injection.fault_context(trial=2, unit=3):
        assert fault_injection.fault_point("before_unit") is None
        assert fault_injection.fault_point("step", step=1) == "nan"
        assert fault_injection.fault_point("step", step=2) is None
    with fault_injection.fault_context(trial=2, unit=4):
        assert fault_injection.fault_point("step") is None
    assert fault_injection.fault_point("step", trial=2) is None


def test_faults_raise_the_real_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault_injection.ENV_FAULTS, "phase=step,action=full;phase=before_unit,action=raise,times=0")
    with pytest.raises(OSError) as error:
        fault_injection.fault_point("step")
    assert error.value.errno == errno.ENOSPC
    for _ in range(2):
        with pytest.raises(RuntimeError, match="A fault was injected here"):
            fault_injection.fault_point("before_unit")


def test_a_log_counts_over_processes_and_is_written_before_the_fault_fires(tmp_path: Path) -> None:
    log = tmp_path / "faults"
    environment = {
        **os.environ,
        fault_injection.ENV_FAULTS: "trial=1,phase=step,action=kill",
        fault_injection.ENV_FAULT_LOG: str(log),
    }
    code = (
        "from trainables.specs.fault_injection import fault_point; fault_point('step', trial=1, step=4); print('alive')"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
        for _ in range(2)
    )
    assert first.returncode == -signal.SIGKILL
    assert (second.returncode, second.stdout) == (0, "alive\n")
    assert log.read_text().startswith("trial=1,phase=step,action=kill @ trial=1,step=4,pid=")


def test_a_mistyped_fault_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault_injection.ENV_FAULTS, "phase=stepp,action=kill")
    with pytest.raises(ValueError) as error:
        fault_injection.fault_point("step")
    phases = ", ".join(fault_injection.PHASES)
    actions = ", ".join(fault_injection.ACTIONS)
    assert str(error.value) == (
        f"A fault has phase= one of {phases}, action= one of {actions}, and may "
        "have times= and trial=, unit=, step=, event=, seq=, but LUTHIER_FAULT has 'phase=stepp,action=kill'."
    )


def test_a_note_only_writes_its_line_to_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault_injection.ENV_FAULTS, "phase=before_unit,action=note,times=0")
    monkeypatch.setenv(fault_injection.ENV_FAULT_LOG, str(tmp_path / "log"))
    with fault_injection.fault_context(trial=4, unit=2):
        assert [fault_injection.fault_point("before_unit") for _ in range(2)] == [None, None]
    line = f"phase=before_unit,action=note,times=0 @ trial=4,unit=2,pid={os.getpid()}"
    assert (tmp_path / "log").read_text().splitlines() == [line, line]
