"""One driver per study, and what is counted before its first trial."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.planning.build import planned_units, solved_in_closed_form
from orchestrator.planning.estimates import TrialCounts, count_trials
from orchestrator.record.journal import Journal, JournalError
from orchestrator.record.records import TrialRecord
from orchestrator.results.comparison import DETERMINISTIC
from orchestrator.running.study_run import StudyRun
from orchestrator.study_file.schema import StudySpec
from search_spaces import default_point
from tests.support.driving import task
from trainables import strategies


def spec(**sections: Any) -> StudySpec:
    fields: dict[str, Any] = {
        "name": "tiny",
        "data": {"source": "digits"},
        "model": {"name": "digits_vit"},
        "strategies": ["linear_probe", "full"],
    }
    return StudySpec.from_fields(fields | sections)


def test_p10_a_second_driver_is_refused_before_it_touches_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    store: Any = SimpleNamespace(digest="d", domains=["handwritten"], splits=["train"], manifest={})

    def connect(nice: int) -> Any:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr("orchestrator.running.study_run.connect", connect)
    with Journal(folder / "journal.jsonl") as journal:
        (folder / "study.yaml").write_text("name: tiny  # as the first driver wrote it\n")
        journal.append("study_started", study="tiny")
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(JournalError) as refused:
            StudyRun(spec(), folder, store, task(), stages=lambda task: [], progress=False).run()
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert str(refused.value) == (
        f"A study is written by one process at a time, but another one holds {folder}/journal.jsonl. Wait until it "
        "ends, or use another name or storage for this study."
    )


@pytest.mark.parametrize(
    ("nice", "started", "messages"),
    [
        (
            5,
            False,
            [
                "resources.nice is 5, but the cluster was started elsewhere, with a niceness of its workers of its own "
                "(15, unless RAY_worker_niceness was set there): trials raise theirs to 5, and cannot lower it."
            ],
        ),
        (None, False, []),
        (5, True, []),
    ],
)
def test_what_niceness_can_do_in_a_cluster_that_was_started_elsewhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nice: int | None,
    started: bool,
    messages: list[str],
) -> None:
    def resources(*arguments: Any) -> Any:
        raise RuntimeError("far enough")

    given: list[int] = []

    @contextlib.contextmanager
    def connect(nice: int) -> Iterator[Any]:
        given.append(nice)
        yield SimpleNamespace(started=started, trial_resources=resources)

    monkeypatch.setattr("orchestrator.running.study_run.connect", connect)
    store: Any = SimpleNamespace(digest="d", manifest={}, classes=[])
    run = StudyRun(spec(resources={"nice": nice}), tmp_path, store, task(), stages=lambda task: [], progress=False)
    with pytest.raises(RuntimeError, match="far enough"):
        run.run()
    assert given == [nice or 0]
    assert caplog.messages == messages


class TestCounts:
    def test_a_search_and_its_confirmation(self) -> None:
        counts = count_trials(spec(search={"trials": 30}, confirm={"top_k": 4, "seeds": 2}))
        assert counts == TrialCounts(search=30, folds=0, confirm=7)  # linear probing on one seed
        assert counts.total == 37

    def test_sweeps_alone_take_their_own_number_of_trials(self) -> None:
        swept = {"strategies": ["full", "daft"], "search": {"trials": 50, "sampler": "paper"}}
        assert count_trials(spec(**swept)).search == 8 + 14

    def test_no_more_is_confirmed_than_was_searched(self) -> None:
        alone = count_trials(spec(strategies=["linear_probe"], search={"trials": 9}))
        assert (alone.search, alone.confirm) == (1, 1)

    def test_every_entry_is_confirmed_and_closed_form_ones_on_one_seed(self) -> None:
        assert count_trials(spec(search={"trials": 20})).confirm == 1 + 3
        assert count_trials(spec(search={"trials": 20}, confirm={"top_k": 1})).confirm == 3
        assert count_trials(spec(search={"trials": 20}, confirm={"seeds": 0})).confirm == 0

    def test_the_closed_form_strategies_are_those_that_results_take_for_deterministic(self) -> None:
        alike = {name for name in strategies() if solved_in_closed_form(name, default_point(name), epochs=4)}
        assert alike == DETERMINISTIC

    def test_folds_count(self) -> None:
        data = {"source": "folder", "root": "/data", "id": ["photo", "art"], "ood": ["sketch"]}
        counts = count_trials(spec(data=data, search={"trials": 20, "objective": "leave_one_domain_out"}))
        assert (counts.folds, counts.total) == (5 * 2, 20 + 10 + 4)
        data["id"] = []
        unknown = count_trials(spec(data=data, search={"trials": 20, "objective": "leave_one_domain_out"}))
        assert (unknown.folds, unknown.total) == (None, 20 + 4)

    def test_reference_trials_count_their_samples(self) -> None:
        diagnostics: dict[str, Any] = {"fsr": ["full", "extrapolated", "oracle"], "fsr_seeds": 2}
        data = {"source": "digits", "train_fraction": 0.1}
        counts = count_trials(spec(data=data, diagnostics=diagnostics, search={"trials": 20}))
        assert counts.references == 2 * (1 + 1 + 2 + 5)  # the own sample, the pool, two shares, five domains
        assert counts.total == 20 + 4 + 18
        data = {"source": "folder", "root": "/data", "train_fraction": 0.1}
        assert count_trials(spec(data=data, diagnostics=diagnostics)).references is None


def test_units_are_those_that_a_strategy_takes() -> None:
    units = planned_units(task(epochs=4))

    def of(strategy: str, **hparams: Any) -> int:
        return units(TrialRecord(trial_id="t", number=0, strategy=strategy, label=strategy, hparams=hparams))

    assert of("linear_probe") == 1
    assert of("full", lr_backbone=0.1) == 4
    assert of("full", lr_backbone=-1.0) == 4  # refused by the strategy; the trial reports it
