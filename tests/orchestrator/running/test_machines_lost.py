"""P4: a machine of the cluster dies under a study; its trials go on elsewhere."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from benchmarks._killing import ROOT, _size, start, write_material, write_study
from benchmarks._soak_machines import machines
from orchestrator import Study
from orchestrator.record.journal import Journal, fold

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

SEARCH = {"trials": 3, "epochs": 6, "scheduler": "none", "sampler": "random"}


def lose_a_machine(file: Path) -> int:
    """The driver's exit code. For a process of its own: whoever has talked to a cluster's head is ended by Ray a minute
    after it is gone."""
    with machines({}) as cluster:
        driver, pause = start(file, **cluster.settings), threading.Event()
        while driver.poll() is None and _size(file) < 7:  # both machines have a trial
            pause.wait(0.02)
        cluster.kill_node(0)
        return driver.wait()


def test_p4_trials_of_a_machine_that_dies_go_on_elsewhere(tmp_path: Path, one_thread: None) -> None:
    material = write_material(tmp_path / "material")
    file = write_study(
        tmp_path, material, strategies=["full", "daft"], search=SEARCH, confirm={"top_k": 0},
        resources={"concurrent": 2, "gpus": 0},
    )  # fmt: skip
    code = (
        "import sys; from pathlib import Path; from tests.orchestrator.running import test_machines_lost as test; "
        "sys.exit(test.lose_a_machine(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + (file.parent / "driver.log").read_text()[-4000:]
    events = Journal.read(Study.from_yaml(file).folder / "journal.jsonl")
    records = fold(events)
    assert [(record.state, record.unit) for record in records] == [("complete", 6)] * 3
    retried = [event for event in events if event["kind"] == "trial_retried"]
    assert {event["reason"] for event in retried} == {"infra"}
    units = Counter((event["trial_id"], event["unit"]) for event in events if event["kind"] == "result")
    assert set(units.values()) == {1}
    assert len(units) == 3 * 6
