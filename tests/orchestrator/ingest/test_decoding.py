"""Decoder processes: imports, limits, crashes, full disks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.ingest.decoding import DecodeJob, available_cpus, decode_all
from orchestrator.ingest.folder import scan_folder
from tests.orchestrator.ingest.pictures import domains, png_claiming

CRASHER = """
import sys
from orchestrator.ingest import worker
real = worker.decode
def decode(data, *square):
    if b"CRASH" in data:
        import os, signal
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(data, *square)
worker.decode = decode
worker.main()
"""


@pytest.fixture
def crashing_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that die of a segmentation fault if a file contains CRASH."""
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return real([command[0], "-c", CRASHER], **options)

    monkeypatch.setattr(subprocess, "Popen", start)


@pytest.mark.usefixtures("crashing_worker")
def test_an_image_that_kills_the_decoder_is_quarantined_and_its_neighbours_are_not(tmp_path: Path) -> None:
    root = domains(tmp_path, ("photo",), 4)
    victim = root / "photo" / "bee" / "0005.png"
    victim.write_bytes(victim.read_bytes() + b"CRASH")
    source = scan_folder(root)
    outcomes = decode_all(source, range(12), DecodeJob(16, "nearest"), workers=1)
    bad = {source.samples[i].name: o.reason for i, o in outcomes.items() if o.reason is not None}
    assert bad == {"photo/bee/0005.png": "the decoder died of it (exit status -11)"}


def test_a_worker_that_cannot_start_is_an_error_and_not_a_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return real([command[0], "-c", "import nothing_here"], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(RuntimeError, match=r"(?s)The decoder process could not start:.*nothing_here"):
        decode_all(scan_folder(domains(tmp_path)), range(4), DecodeJob(16, "nearest"), workers=1)


def test_pixels_go_to_their_offsets_and_nowhere_else(tmp_path: Path) -> None:
    source = scan_folder(domains(tmp_path / "data", ("photo",), 2))
    target = tmp_path / "pixels"
    row = 16 * 16 * 3
    target.write_bytes(b"\xaa" * row * 7)
    offsets = np.array([5, -1, 3, 1, 0, 2]) * row
    progress = []
    decode_all(source, [0, 2, 3, 4, 5], DecodeJob(16, "bilinear", target, offsets), 1, lambda *n: progress.append(n))
    rows = np.fromfile(target, np.uint8).reshape(7, -1)
    assert (rows[[4, 6]] == 0xAA).all()
    assert not (rows[[0, 1, 2, 3, 5]] == 0xAA).all(1).any()
    assert progress == [(5, 5, 0)]


def test_s1_a_full_disk_is_an_error_and_not_a_quarantine(tmp_path: Path) -> None:
    source = scan_folder(domains(tmp_path, ("photo",), 2))
    with pytest.raises(OSError, match="The pixels could not be written to /dev/full"):
        decode_all(source, [0], DecodeJob(16, "nearest", Path("/dev/full"), np.zeros(6, np.int64)), workers=1)


def test_d14_a_file_that_became_a_pipe_does_not_block(tmp_path: Path) -> None:
    source = scan_folder(domains(tmp_path, ("photo",), 1))
    pipe, gone = tmp_path / "photo/ant/0000.png", tmp_path / "photo/bee/0001.png"
    pipe.unlink()
    os.mkfifo(pipe)
    gone.unlink()
    outcomes = decode_all(source, range(3), DecodeJob(16, "nearest"), workers=1)
    assert [o.reason for o in outcomes.values()] == [
        "not a regular file",
        "cannot be read: No such file or directory",
        None,
    ]


def test_a_large_picture_is_decoded_and_no_process_is_left_behind(tmp_path: Path) -> None:
    root = domains(tmp_path, ("photo",), 2)
    (root / "photo" / "ant" / "large.png").write_bytes(png_claiming(7000, 7000))
    outcomes = decode_all(scan_folder(root), range(7), DecodeJob(16, "nearest"), workers=1)
    assert {o.reason for o in outcomes.values()} == {None}
    assert max(o.width for o in outcomes.values()) == 7000
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [c for c in children if "ingest.worker" in Path(f"/proc/{c}/cmdline").read_text()]


def test_data_are_read_where_the_system_has_no_cpu_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no `os.sched_getaffinity`."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cpus() == os.cpu_count()
    outcomes = decode_all(scan_folder(domains(tmp_path, ("photo",), 1)), range(3), DecodeJob(16, "nearest"))
    assert {outcome.reason for outcome in outcomes.values()} == {None}


def test_a_worker_imports_no_heavy_library() -> None:
    """A decoder starts in a fraction of a second, and its memory is limited; pyarrow is for Parquet alone."""
    code = (
        "import sys\n"
        "import orchestrator.ingest.worker\n"
        "print(*sys.modules)\n"
        "import orchestrator.ingest.parquet\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for_files, for_parquet = (set(line.split()) for line in done.stdout.splitlines())
    heavy = {"torch", "torchvision", "timm", "ray", "mlflow", "optuna", "pandas", "sklearn", "scipy", "pydantic"}
    assert for_files & (heavy | {"pyarrow"}) == set()
    assert for_parquet & heavy == set()
