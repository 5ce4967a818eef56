"""Folds and confirmation after the search, in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.records import TrialRecord
from orchestrator.results.selection import top_candidates
from orchestrator.search.stages import Configuration, ConfirmStage, Entry, FoldStage
from tests.support.driving import Config, accuracy, drive, finished, optuna_trials, searcher, task
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import TrialSpec

DOMAINS = ("photo", "sketch", "clipart")


def best(count: int) -> Any:
    return lambda records: top_candidates(records, count, "id_val")


def by_fold(records: list[TrialRecord]) -> Sequence[Configuration]:
    """The configuration with the best mean on held-out domains."""
    means: dict[str, list[float]] = {}
    for record in records:
        if record.role == "fold":
            means.setdefault(record.config_hash, []).append(record.metrics["held_out/acc"])
    chosen = max(means, key=lambda key: sum(means[key]))
    record = next(r for r in records if r.config_hash == chosen)
    return [(record.label, record.strategy, record.hparams)]


def outcome(config: Config) -> dict[str, Any]:
    """A fold of lp_ft does better than its ID accuracy suggests."""
    held_out = {"held_out/acc": 0.9 if config["strategy"] == "lp_ft" else 0.5} if config["role"] == "fold" else {}
    return {**finished(config), **held_out}


def test_the_best_configurations_run_again_on_fresh_seeds(tmp_path: Path) -> None:
    proposed = drive(
        searcher(tmp_path, trials=10, stages=[ConfirmStage(task(), best(3), seeds=2, seed=3)]), concurrent=3
    )
    search, confirm = proposed[:10], proposed[10:]
    assert {c["role"] for c in search} == {"search"}
    assert [c["role"] for c in confirm] == ["confirm"] * 6
    expected = [stream_seed(3, "confirm", 0)] * 3 + [stream_seed(3, "confirm", 1)] * 3
    assert [c["seed"] for c in confirm] == expected
    assert stream_seed(3, "search") not in expected
    ranked = sorted(search, key=accuracy, reverse=True)
    first = {c["label"]: c for c in reversed(ranked)}  # the best of every label
    top = sorted(first.values(), key=accuracy, reverse=True)[:3]
    assert [c["hparams"] for c in confirm[:3]] == [c["hparams"] for c in top]
    assert [c["_number"] for c in proposed] == list(range(16))


def test_trials_that_no_scheduler_stops_are_evaluated_at_their_end_alone() -> None:
    settings = task(evaluate_at=(1, 3), interim_splits=("ood/noisy",))
    records = [TrialRecord(trial_id="t", number=0, strategy="full", label="full", state="complete")]
    stages = (
        FoldStage(settings, lambda records: records, DOMAINS, seed=0),
        ConfirmStage(settings, lambda records: records, seeds=2, seed=0),
    )
    shared = [spec.shared for stage in stages for spec in stage.next(records)]
    assert len(shared) == 5
    assert {(one.evaluate_at, one.interim_splits) for one in shared} == {((), None)}


def test_a_deterministic_configuration_is_confirmed_once() -> None:
    records = [TrialRecord(trial_id=name, number=n, strategy=name, label=name) for n, name in enumerate(("lp", "full"))]
    stage = ConfirmStage(
        task(), lambda history: history, seeds=3, seed=0, deterministic=lambda strategy, hparams: strategy == "lp"
    )
    assert [trial.label for trial in stage.next(records)] == ["lp", "full", "full", "full"]


def test_confirmations_start_only_when_the_search_has_ended(tmp_path: Path) -> None:
    search = searcher(tmp_path, trials=4, stages=[ConfirmStage(task(), best(1), seeds=1, seed=3)])
    configs = {name: search.suggest(name) for name in "abcd"}
    for name in "abc":
        assert search.suggest("later") is None
        search.on_trial_complete(name, finished(configs[name]))  # type: ignore[arg-type]
    assert search.suggest("later") is None
    search.on_trial_complete("d", finished(configs["d"]))  # type: ignore[arg-type]
    answer = search.suggest("later")
    assert isinstance(answer, dict)
    assert answer["role"] == "confirm"
    assert search.suggest("more") is None
    search.on_trial_complete("later", finished(answer))
    assert search.suggest("more") == "FINISHED"


def test_folds_hold_out_every_domain_and_decide_what_is_confirmed(tmp_path: Path) -> None:
    stages = [FoldStage(task(), best(4), DOMAINS, seed=3), ConfirmStage(task(), by_fold, seeds=2, seed=3)]
    proposed = drive(searcher(tmp_path, trials=8, stages=stages), outcome, concurrent=2)
    folds, confirm = proposed[8:-2], proposed[-2:]
    assert len(folds) == 4 * 3
    assert [c["held_out"] for c in folds] == list(DOMAINS) * 4
    assert {c["seed"] for c in folds} == {stream_seed(3, "search")}
    assert {c["label"] for c in confirm} == {"lp_ft"}
    assert {c["held_out"] for c in confirm} == {None}


def test_folds_and_confirmations_do_not_teach_the_sampler(tmp_path: Path) -> None:
    drive(searcher(tmp_path, ("full",), trials=5, stages=[ConfirmStage(task(), best(1), seeds=3, seed=3)]))
    assert len(optuna_trials(tmp_path)) == 5
    roles = [t.user_attrs["trial"]["role"] for t in optuna_trials(tmp_path, "s/given")]
    assert roles == ["confirm"] * 3


def test_a_killed_stage_continues_and_repeats_nothing_that_ended(tmp_path: Path) -> None:
    def stages() -> list[Any]:
        return [FoldStage(task(), best(2), DOMAINS, seed=3), ConfirmStage(task(), by_fold, seeds=2, seed=3)]

    (tmp_path / "whole").mkdir()
    whole = drive(searcher(tmp_path / "whole", trials=6, stages=stages()), outcome)
    (tmp_path / "parts").mkdir()
    runs = [
        drive(searcher(tmp_path / "parts", trials=6, stages=stages()), outcome, stop_after=stop)
        for stop in (8, 3, 5, None)
    ]
    parts = {c["_number"]: c for run in runs for c in run}
    assert [parts[n] for n in sorted(parts)] == whole
    assert sum(map(len, runs)) == len(whole) + 3  # one trial of each killed driver


def test_a_failed_confirmation_is_not_repeated(tmp_path: Path) -> None:
    stage = ConfirmStage(task(), best(2), seeds=2, seed=3)
    proposed = drive(
        searcher(tmp_path, trials=6, stages=[stage]), lambda c: None if c["role"] == "confirm" else finished(c)
    )
    assert [c["role"] for c in proposed].count("confirm") == 4


def test_a_search_without_a_complete_trial_confirms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = ConfirmStage(task(), best(2), seeds=2, seed=3)
    proposed = drive(searcher(tmp_path, trials=5, stages=[stage]), lambda c: None)
    assert len(proposed) == 5
    assert "Nothing to run for the stage 'confirm': Selection needs at least one complete search trial" in caplog.text


def test_the_description_of_a_stage() -> None:
    record = TrialRecord(trial_id="t", number=0, strategy="full", label="mine", hparams={"lr_backbone": 0.1})
    stage = ConfirmStage(task(), lambda records: records, seeds=1, seed=0)
    assert stage.next([record]) == [
        TrialSpec(
            shared=task(),
            strategy="full",
            label="mine",
            hparams={"lr_backbone": 0.1},
            seed=stream_seed(0, "confirm", 0),
            role="confirm",
        )
    ]


def test_one_domain_cannot_be_left_out() -> None:
    with pytest.raises(
        ValueError,
        match=r"^Leaving one domain out needs at least 2 ID domains, but got 1: photo\. List more under data\.id, or "
        r"select by id_val\.$",
    ):
        FoldStage(task(), best(1), ("photo",), 0)


def test_an_entry_without_a_label_is_named_after_its_strategy() -> None:
    assert Entry("", "full").label == "full"
    assert Entry("mine", "full").label == "mine"
