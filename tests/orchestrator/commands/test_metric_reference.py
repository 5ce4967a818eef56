"""docs/metrics.md against the metric table."""

from __future__ import annotations

from pathlib import Path

from orchestrator.commands.metric_reference import PAGE, page
from trainables.specs.metrics import QUANTITIES

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_current() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert text == page(), "run: python -m orchestrator.commands.metric_reference"


def test_every_recorded_name_has_one_row_and_a_meaning() -> None:
    text = page()
    for quantity in QUANTITIES:
        assert text.count(f"| `{quantity.name}` |") == 1
        assert quantity.meaning.endswith(".")
