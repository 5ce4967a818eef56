"""Which entries early stopping leaves alone at the first rung."""

from __future__ import annotations

from orchestrator.search.grace import later_graces
from orchestrator.search.stages import Entry


def test_entries_that_start_at_a_solved_head_wait_for_the_second_rung() -> None:
    entries = [
        Entry("", "linear_probe"),
        Entry("", "full"),
        Entry("from the probe", "full", {"head_init": "linear_probe"}),
        Entry("", "lp_ft"),
        Entry("published", "lp_ft", preset="paper"),
        Entry("from a random head", "lp_ft", {"head_init": "random"}),
        Entry("", "daft"),
    ]
    assert later_graces(entries, 2, 3) == {"from the probe": 6, "lp_ft": 6, "published": 6}
