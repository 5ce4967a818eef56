"""The display while images are read."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from orchestrator.ingest.pipeline import IngestRequest, ingest
from orchestrator.running.progress import ingest_progress
from tests.orchestrator.ingest.pictures import domains


class Clock:
    """Seconds that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_ten_seconds_where_there_is_no_terminal() -> None:
    written = io.StringIO()
    clock = Clock()
    with ingest_progress(Console(file=written), clock) as progress:
        for seconds, done in ((0.5, 100), (9.9, 1_900), (10.1, 2_020), (15.0, 3_000), (21.0, 4_200)):
            clock.now = 100 + seconds
            progress(done, 12_000, 3 if done > 4_000 else 0)
    assert written.getvalue().splitlines() == [
        "Reading images: 2,020 of 12,000 (200/s), 49.9 s left",
        "Reading images: 4,200 of 12,000 (200/s, 3 unreadable), 39.0 s left",
    ]


def test_a_bar_on_a_terminal_that_is_gone_afterwards() -> None:
    written = io.StringIO()
    clock = Clock()
    console = Console(file=written, force_terminal=True, width=100, legacy_windows=False, no_color=True, _environ={})
    with ingest_progress(console, clock) as progress:
        clock.now += 2
        progress(500, 1_000, 1)
    assert "Reading images" in written.getvalue()
    assert " 500/1000 " in written.getvalue()
    assert "250/s, 1 unreadable" in written.getvalue()
    assert written.getvalue().endswith("\x1b[2K"), "the line is erased"


def test_nothing_is_shown_where_no_image_is_read() -> None:
    written = io.StringIO()
    with ingest_progress(Console(file=written, force_terminal=True, width=100, _environ={})):
        pass
    assert "Reading" not in written.getvalue()


def test_reading_reports_its_progress_and_what_could_not_be_read(tmp_path: Path) -> None:
    root = domains(tmp_path / "data", ("photo",), 10)
    (root / "photo" / "bee" / "bad.png").touch()
    request = IngestRequest(source="folder", root=str(root), image_size=16, interpolation="bilinear")
    seen: list[tuple[int, int, int]] = []
    ingest(request, tmp_path / "stores", workers=1, progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (31, 31, 1)
    seen.clear()
    ingest(request, tmp_path / "stores", workers=1, progress=lambda *counts: seen.append(counts))
    assert seen == [], "the store is there"
