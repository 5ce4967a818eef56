"""A study that is not the one that was run: what is said, what is refused, what may be allowed."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from orchestrator.commands.exit_status import PREFLIGHT, of_error
from orchestrator.record.changes import ChangedStudyError, changes, check_changes, code_digest, versions
from orchestrator.study_file.schema import StudySpec


def header(**fields: Any) -> dict[str, Any]:
    header_fields: dict[str, Any] = {
        "name": "pets",
        "data": {"source": "digits"},
        "model": {"name": "digits_vit"},
        "strategies": ["full", {"name": "daft", "label": "daft-1", "fixed": {"lr_head": 0.1}}],
        "search": {"trials": 10, "batch_size": 64},
    }
    spec = StudySpec.from_fields(header_fields).model_dump(mode="json")
    return {"study": "pets", "spec": spec, "dataset_digest": "ab" * 32, "versions": versions()} | fields


def changed(**at: Any) -> dict[str, Any]:
    """The header with some values changed, by dotted key (`__` for the dot)."""
    made = copy.deepcopy(header())
    for path, value in at.items():
        *parents, last = path.split("__")
        section = made
        for name in parents:
            section = section[name]
        section[last] = value
    return made


def journal(first: dict[str, Any], started: bool = True) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"kind": "study_started", "time": 1.0, **first}]
    return events + ([{"kind": "trial_started", "time": 2.0, "trial_id": "t"}] if started else [])


def test_p29_a_study_that_is_the_same_has_no_changes() -> None:
    assert changes(header(), header()) == []
    assert check_changes([], header()) == []


def test_p29_a_study_from_before_there_was_a_key_for_the_layout_keeps_that_of_its_device() -> None:
    before = header()
    del before["spec"]["resources"]["channels_last"]
    assert [(change.key, change.harmless) for change in changes(before, header())] == [
        ("resources.channels_last", True)
    ]
    given = changed(spec__resources__channels_last=True)
    assert [change.harmless for change in changes(before, given)] == [False]


def test_p29_a_study_from_before_there_were_tasks_is_a_classification() -> None:
    before = header()
    del before["spec"]["task"]
    assert changes(before, header()) == []
    assert [str(change) for change in changes(before, changed(spec__task="segmentation"))] == [
        "task: classification -> segmentation"
    ]


def test_p29_every_difference_is_said_and_refused_with_exit_code_4() -> None:
    now = changed(spec__search__batch_size=32, versions__torch="3.0.0", dataset_digest="cd" * 32)
    now["spec"]["strategies"][1]["fixed"] = {"lr_head": 0.2, "momentum": 0.5}
    with pytest.raises(ChangedStudyError) as error:
        check_changes(journal(header()), now)
    assert str(error.value) == (
        "The study 'pets' was changed since its last run, 5 problems:\n"
        "  search.batch_size: 64 -> 32\n"
        "  strategies.daft-1.fixed.lr_head: 0.1 -> 0.2\n"
        "  strategies.daft-1.fixed.momentum: none -> 0.5\n"
        f"  versions.torch: {versions()['torch']} -> 3.0.0\n"
        f"  dataset_digest: {'ab' * 32} -> {'cd' * 32} (images, classes or splits differ)\n"
        "Put the old values back, or give the study another name. If its trials may differ in this, run it with "
        "--allow-change search.batch_size --allow-change strategies.daft-1.fixed.lr_head --allow-change "
        "strategies.daft-1.fixed.momentum --allow-change versions.torch --allow-change dataset_digest"
    )
    assert of_error(error.value) == PREFLIGHT == 4


def test_p29_what_a_user_allows_is_let_through_and_nothing_else() -> None:
    now = changed(spec__search__batch_size=32, spec__search__epochs=9, versions__code="0" * 12)
    allowed = ["search.batch_size", "versions"]
    with pytest.raises(ChangedStudyError, match=r"last run: search.epochs: 20 -> 9\nPut the old"):
        check_changes(journal(header()), now, allowed)
    differences = check_changes(journal(header()), now, [*allowed, "search"])
    assert [change.key for change in differences] == ["search.epochs", "search.batch_size", "versions.code"]


@pytest.mark.parametrize(
    ("change", "harmless"),
    [
        ({"spec__search__trials": 20}, True),
        ({"spec__search__trials": 5}, False),
        ({"spec__storage": "/elsewhere"}, True),
        ({"spec__tracking__uri": "http://mlflow:5000"}, True),
        ({"spec__resources__concurrent": 4}, True),
        ({"spec__search__evaluate_at_rungs": True}, True),
        ({"spec__resources__nice": 5}, True),
        ({"spec__resources__channels_last": True}, False),
        ({"spec__confirm__seeds": 9}, True),
        ({"spec__data__root": "/moved"}, True),
        ({"spec__data__seed": 7}, False),
        ({"spec__diagnostics__measure": []}, True),
        ({"spec__diagnostics__plasticity_pairs": 8}, False),
        ({"spec__model__weights": "/other.safetensors"}, False),
        ({"versions__mlflow": "9"}, True),
        ({"versions__optuna": "9"}, False),
        ({"versions__python": "3.11.99"}, True),
        ({"versions__python": "3.99.1"}, False),
    ],
)
def test_p29_what_no_number_depends_on_may_change(change: dict[str, Any], harmless: bool) -> None:
    first = header()
    first["versions"]["python"] = "3.11.1"
    now = copy.deepcopy(first)
    for path, value in change.items():
        *parents, last = path.split("__")
        section = now
        for name in parents:
            section = section[name]
        section[last] = value
    assert [c.harmless for c in changes(first, now)] == [harmless]
    if harmless:
        check_changes(journal(first), now)
    else:
        with pytest.raises(ChangedStudyError):
            check_changes(journal(first), now)


def test_entries_that_come_go_or_move_are_one_change() -> None:
    now = header()
    now["spec"]["strategies"] = [{"name": "lp_ft", "label": "lp_ft"}, *now["spec"]["strategies"][::-1]]
    assert [str(c) for c in changes(header(), now)] == ["strategies: full, daft-1 -> lp_ft, daft-1, full"]


def test_nothing_is_refused_before_the_first_trial() -> None:
    now = changed(spec__search__batch_size=32)
    assert [c.key for c in check_changes(journal(header(), started=False), now)] == ["search.batch_size"]


def test_what_an_older_luthier_did_not_say_is_no_change() -> None:
    first = header()
    del first["versions"]["code"]
    assert check_changes(journal(first), header()) == []


def test_a_study_of_an_earlier_version_is_refused_with_what_to_do_and_continued_where_that_is_allowed() -> None:
    first = changed(versions__code="0" * 12)
    first["spec"].pop("task", None)
    with pytest.raises(ChangedStudyError) as error:
        check_changes(journal(first), header())
    assert str(error.value) == (
        f"The study 'pets' was changed since its last run: versions.code: {'0' * 12} -> {code_digest()} (Luthier's own "
        "code differs, as after an update)\nPut the old values back, or give the study another name. If its trials may "
        "differ in this, run it with --allow-change versions.code"
    )
    assert [change.key for change in check_changes(journal(first), header(), ["versions.code"])] == ["versions.code"]


def test_the_digest_of_the_code_is_twelve_hex_digits() -> None:
    assert len(code_digest()) == 12
    assert int(code_digest(), 16) >= 0


def test_p29_a_key_that_an_earlier_version_had_not_is_no_change_while_it_is_null() -> None:
    before = header()
    del before["spec"]["loss"]
    del before["spec"]["search"]["metric"]
    del before["spec"]["data"]["sampling"]
    assert changes(before, header()) == []
    assert changes(header(), before) == []
    now = changed(spec__search__metric="balanced_acc")
    assert [str(change) for change in changes(before, now)] == ["search.metric: none -> balanced_acc"]
    assert not changes(before, now)[0].harmless
