"""Header tags of every run."""

from __future__ import annotations

from orchestrator.tracking.run_update import Header


def test_d18_every_run_states_how_many_classes_its_numbers_are_over() -> None:
    facts = {"classes": 10, "classes_present": {"train": 10, "val": 10, "test": 10, "ood/art": 9}, "images_leaked": 2}
    tags = Header("study", facts).tags()
    assert (tags["n_classes"], tags["n_classes_present"]) == ("10", "test 10, ood/art 9")
    assert tags["dataset_leaks"] == "2"
