"""Checkpoint store: retention, rate limit, quarantine of damaged checkpoints, fencing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from tests.support.checkpoints import state
from trainables.specs.errors import FencedError
from trainables.storage.checkpoint_format import MANIFEST, TENSORS, RunState, save_state
from trainables.storage.checkpoint_store import QUARANTINE_LIMIT, RETAINED, CheckpointStore, list_checkpoints

ROOT = str(Path(__file__).parents[3])


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def acquired(folder: Path, **arguments: Any) -> CheckpointStore:
    store = CheckpointStore(folder, **{"clock": Clock(), **arguments})
    store.acquire()
    return store


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def restored(folder: Path) -> tuple[list[int], CheckpointStore]:
    """Units of the checkpoints that a new process can resume from, newest first."""
    store = acquired(folder)
    return [restored_state.meta["unit"] for _, restored_state in store.valid_states()], store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "trial-0007"


@pytest.fixture
def three(folder: Path) -> Path:
    """A store with the checkpoints of units two and three."""
    store = acquired(folder)
    for unit in (1, 2, 3):
        store.save_after_unit(lambda unit=unit: state(unit))
    return folder


def test_steps_of_five_digits_are_newer_than_those_of_four(folder: Path) -> None:
    store = acquired(folder, mid_unit_interval_s=0.0)
    for step in (9_000, 9_900, 10_000, 100_000):
        store.save_after_step(lambda step=step: state(0, step))  # type: ignore[misc]
    assert names(folder) == ["unit-000000-step-10000", "unit-000000-step-100000"]


def test_the_two_newest_are_retained(three: Path) -> None:
    assert RETAINED == 2
    assert names(three) == ["unit-000002", "unit-000003"]
    assert sorted(p.name for p in three.iterdir()) == ["owner.json", "unit-000002", "unit-000003"]
    assert restored(three)[0] == [3, 2]


def test_the_middle_of_a_unit_lies_between_its_ends(folder: Path) -> None:
    clock = Clock()
    store = acquired(folder, clock=clock)
    store.save_after_unit(lambda: state(1))
    clock.now += 61
    store.save_after_step(lambda: state(1, 120))
    store.save_after_step(lambda: state(1, 121))
    assert names(folder) == ["unit-000001", "unit-000001-step-0120"]
    store.save_after_unit(lambda: state(2))
    assert names(folder) == ["unit-000001-step-0120", "unit-000002"]


def test_checkpoints_cost_a_tenth_of_the_time_at_most(folder: Path) -> None:
    clock = Clock()
    store = acquired(folder, clock=clock)

    def slow(unit: int) -> Callable[[], RunState]:
        def make() -> RunState:
            clock.now += 3.0  # duration of a write
            return state(unit)

        return make

    for unit in range(1, 41):
        clock.now += 2.0
        store.save_after_unit(slow(unit))
    assert clock.now == 100 + 40 * 2 + 3 * 3, "one at the start, then one every 30 seconds"
    assert names(folder) == ["unit-000016", "unit-000031"]


def test_the_result_of_a_finished_trial_is_kept_without_tensors(folder: Path) -> None:
    clock = Clock()
    store = acquired(folder, clock=clock)

    def slow() -> RunState:
        clock.now += 1e9
        return state(3)

    store.save_after_unit(slow)
    store.save_after_unit(lambda: state(4))
    assert names(folder) == ["unit-000003"], "the rate limit holds between units"
    store.save_result({"unit": 4, "step": 0, "finished": True, "result": {"val/acc": 0.1 + 0.2}})
    result = next(acquired(folder).valid_states())[1]
    assert (dict(result.tensors), result.meta["result"]) == ({}, {"val/acc": 0.1 + 0.2})


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_s5_a_truncated_checkpoint_gives_way_to_the_one_before(three: Path, share: float) -> None:
    file = three / "unit-000003" / TENSORS
    os.truncate(file, int(file.stat().st_size * share))
    assert_falls_back_to_unit_2(three)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
@pytest.mark.parametrize("position", [0.0, 0.2, 0.5, 0.9])
def test_s6_a_flipped_byte_is_detected_anywhere(three: Path, name: str, position: float) -> None:
    file = three / "unit-000003" / name
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 0x10
    file.write_bytes(content)
    assert_falls_back_to_unit_2(three)


def test_s9_of_two_latest_checkpoints_the_newest_complete_one_wins(three: Path) -> None:
    (three / "unit-000003" / MANIFEST).unlink()
    assert_falls_back_to_unit_2(three)


def assert_falls_back_to_unit_2(folder: Path) -> None:
    """Unit 3 is quarantined and reported, unit 2 is the newest."""
    units, store = restored(folder)
    assert units == [2]
    assert len(store.problems) == 1
    assert str(folder / "unit-000003") in store.problems[0]
    quarantined = folder.parent / "quarantine" / "trial-0007-unit-000003"
    assert (quarantined / "problem.txt").read_text() == store.problems[0] + "\n"
    assert names(folder) == ["unit-000002"]


def test_the_quarantine_is_bounded(folder: Path) -> None:
    store = acquired(folder)
    for unit in range(QUARANTINE_LIMIT + 5):
        save_state(folder / f"unit-{unit:06d}", state(unit))
        store.quarantine(folder / f"unit-{unit:06d}", "broken")
    assert len(list((folder.parent / "quarantine").iterdir())) == QUARANTINE_LIMIT


def test_p9_a_fenced_process_can_neither_write_nor_remove(folder: Path) -> None:
    zombie = acquired(folder)
    zombie.save_after_unit(lambda: state(1))
    owner = acquired(folder)
    for act in (
        lambda: zombie.save_after_unit(lambda: state(2)),
        lambda: zombie.save_result(state(9).meta),
        lambda: zombie.quarantine(folder / "unit-000001", "no"),
    ):
        with pytest.raises(FencedError) as error:
            act()
    assert str(error.value) == (
        f"The checkpoints in {folder} are written by one process at a time, but this one (pid {os.getpid()}) is not "
        f"the latest that took the trial (pid {os.getpid()} on {os.uname().nodename}). It stops here."
    )
    assert names(folder) == ["unit-000001"]
    owner.save_after_unit(lambda: state(2))
    assert names(folder) == ["unit-000001", "unit-000002"]


def test_a_removed_folder_fences_the_trial(folder: Path) -> None:
    store = acquired(folder)
    os.rename(folder, folder.with_name("gone"))
    with pytest.raises(FencedError):
        store.save_after_unit(lambda: state(1))
    assert not folder.exists()


def test_s1_a_full_disk_loses_the_checkpoint_and_not_the_trial(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = acquired(folder)
    store.save_after_unit(lambda: state(1))
    monkeypatch.setattr("trainables.storage.atomic_files.sync", full_disk)
    store.save_after_unit(lambda: state(2))
    assert store.problems == [
        f"No checkpoint could be written to {folder / 'unit-000002'}: [Errno 28] No space left on device"
    ]
    assert names(folder) == ["unit-000001"]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_s1_an_error_that_safetensors_raises_loses_the_checkpoint_and_not_the_trial(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own type, no OSError, where the system refuses a write."""

    def refused(*arguments: Any, **_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("trainables.storage.checkpoint_format.save_file", refused)
    store = acquired(folder)
    store.save_after_unit(lambda: state(1))
    assert len(store.problems) == 1
    assert "No space left on device" in store.problems[0]
    assert names(folder) == []


def full_disk(path: Path) -> None:
    raise OSError(28, "No space left on device")


CHILD = """
import sys
from pathlib import Path
from tests.support.checkpoints import write_three_units
write_three_units(Path(sys.argv[1]))
"""


def child(folder: Path, limit: int | None = None, **environment: str) -> int:
    """Exit code of a process that checkpoints three units."""

    def limited() -> None:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n" * (limit is not None) + CHILD
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env={**os.environ, **environment}, cwd=ROOT, preexec_fn=limited,
        capture_output=True,
    )  # fmt: skip
    return done.returncode


@pytest.mark.parametrize("share", [0.0003, 0.5, 0.9999])
def test_p3_a_process_killed_during_a_write_leaves_no_partial_checkpoint(three: Path, share: float) -> None:
    size = (three / "unit-000003" / TENSORS).stat().st_size
    for unit in (2, 3):
        (three / f"unit-00000{unit}").rename(three / f"unit-{unit + 7:06d}")
    # The kernel kills it at that byte of the file; owner.json is smaller than the smallest limit that is tested.
    assert child(three, limit=max(200, int(size * share))) == -signal.SIGXFSZ
    leftovers = [p.name for p in three.iterdir() if p.name.startswith(".unit-000001-")]
    assert len(leftovers) == 1
    assert restored(three)[0] == [3, 2]
    assert not [p for p in three.iterdir() if p.name.startswith(".")]


def test_p3_a_process_killed_before_the_manifest_leaves_the_previous_checkpoint(folder: Path) -> None:
    log = folder.parent / "faults"
    log.parent.mkdir(parents=True)
    fault = "phase=in_checkpoint,action=kill,times=1"
    assert child(folder, LUTHIER_FAULT=fault, LUTHIER_FAULT_LOG=str(log)) == -signal.SIGKILL
    assert restored(folder)[0] == []
    assert child(folder, LUTHIER_FAULT=fault, LUTHIER_FAULT_LOG=str(log)) == 0
    assert restored(folder)[0] == [3, 2]


def test_the_owner_file_names_the_process(folder: Path) -> None:
    acquired(folder)
    owner = json.loads((folder / "owner.json").read_text())
    assert owner.keys() == {"token", "pid", "host", "time"}
    assert (owner["pid"], owner["host"]) == (os.getpid(), os.uname().nodename)
