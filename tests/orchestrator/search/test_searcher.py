"""The searcher against Optuna's storage: order, states, determinism, duplicates, restart, errors."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import search_spaces
from orchestrator.record.journal import Journal
from orchestrator.search.searcher import Entry, StudySearcher
from orchestrator.search.space import SearchError
from tests.support.driving import (
    EPOCHS,
    accuracy,
    complete,
    drive,
    finished,
    optuna_trials,
    searcher,
    shown,
    task,
    url,
)
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import TrialSpec


def test_default_points_of_all_entries_come_first_in_the_order_of_the_study(tmp_path: Path) -> None:
    proposed = drive(searcher(tmp_path))
    assert [c["label"] for c in proposed[:4]] == ["linear_probe", "full", "lp_ft", "daft"]
    for config in proposed[:4]:
        assert config["hparams"] == search_spaces.default_point(config["strategy"])
    assert [c["_number"] for c in proposed] == list(range(12))


def test_a_config_is_a_trial_spec_with_the_shared_search_seed(tmp_path: Path) -> None:
    config = drive(searcher(tmp_path), stop_after=2)[1]
    assert TrialSpec.from_dict(config) == TrialSpec(
        shared=task(),
        strategy="full",
        label="full",
        hparams=search_spaces.default_point("full"),
        seed=stream_seed(3, "search"),
        role="search",
    )


def test_parameters_are_conditional_and_named_after_their_entry(tmp_path: Path) -> None:
    configs = drive(searcher(tmp_path, ("full", "daft"), trials=16))
    trials = optuna_trials(tmp_path)
    assert len(trials) == len(configs) == 16
    for trial, config in zip(trials, configs, strict=True):
        label = config["label"]
        assert trial.params["strategy"] == label
        assert set(trial.params) == {"strategy", f"{label}.lr_backbone", f"{label}.lr_head"}
        assert {k.partition(".")[2]: v for k, v in trial.params.items() if "." in k} == config["hparams"]
        assert trial.user_attrs["config_hash"] == TrialSpec.from_dict(config).config_hash
        assert trial.user_attrs["label"] == label
        assert trial.user_attrs["tune_trial_id"].startswith("trial")


def test_what_an_entry_fixes_is_never_drawn(tmp_path: Path) -> None:
    fixed = {"lr_head": None, "bn_conversion": True}
    proposed = drive(searcher(tmp_path, entries=[Entry("tied", "full", fixed)], trials=6))
    assert all({k: c["hparams"][k] for k in fixed} == fixed for c in proposed)
    assert len({c["hparams"]["lr_backbone"] for c in proposed}) == 6
    assert all(set(t.params) == {"strategy", "tied.lr_backbone"} for t in optuna_trials(tmp_path))


def test_one_seed_proposes_the_same_and_another_seed_does_not(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        runs.append(list(shown(drive(searcher(tmp_path / name, trials=20, seed=seed)))))
    assert runs[0] == runs[1]
    assert [hparams for _, _, _, hparams, _ in runs[0]] != [hparams for _, _, _, hparams, _ in runs[2]]


def test_a_fresh_process_proposes_the_same(tmp_path: Path) -> None:
    here = [config["hparams"] for config in drive(searcher(tmp_path, trials=18))]
    (tmp_path / "other").mkdir()
    code = (
        "import json, pathlib, sys\nfrom tests.support.driving import drive, searcher\n"
        "found = drive(searcher(pathlib.Path(sys.argv[1]), trials=18))\n"
        "print(json.dumps([c['hparams'] for c in found]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(there.stdout.splitlines()[-1]) == here


def test_a_study_that_was_killed_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = list(shown(drive(searcher(tmp_path / "whole", trials=16))))
    (tmp_path / "parts").mkdir()
    parts: dict[int, Any] = {}
    for stop in (2, 3, 6, 4, None):
        parts |= {trial[0]: trial for trial in shown(drive(searcher(tmp_path / "parts", trials=16), stop_after=stop))}
    assert [parts[number] for number in sorted(parts)] == whole


def test_every_entry_gets_its_rounds_before_the_sampler_chooses(tmp_path: Path) -> None:
    proposed = drive(searcher(tmp_path, trials=22))
    assert [c["label"] for c in proposed[4:10]] == ["full", "lp_ft", "daft"] * 2
    later = Counter(c["label"] for c in proposed[10:])
    assert later["daft"] > later["full"]  # it is better by 0.06 throughout


def test_tpe_finds_what_random_does_not(tmp_path: Path) -> None:
    best: dict[str, list[float]] = {"tpe": [], "random": []}
    for sampler, seed in itertools.product(best, range(2)):
        folder = tmp_path / f"{sampler}{seed}"
        folder.mkdir()
        proposed = drive(searcher(folder, ("full", "daft"), trials=26, sampler=sampler, seed=seed))
        best[sampler].append(sum(accuracy(c) for c in proposed[-10:]) / 10)
    assert min(best["tpe"]) > max(best["random"])


def test_a_strategy_without_choices_is_proposed_once(tmp_path: Path) -> None:
    proposed = drive(
        searcher(tmp_path, trials=24),
        lambda c: {**finished(c), "best/val/acc": 0.99 if c["strategy"] == "linear_probe" else 0.5},
    )
    assert Counter(c["label"] for c in proposed)["linear_probe"] == 1
    assert len(proposed) == 24


def test_the_search_ends_when_no_new_configuration_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = search_spaces.Hyperparameter("sgd", optuna.distributions.CategoricalDistribution(("sgd", "adamw")))
    monkeypatch.setattr("search_spaces.full.SPACE", {"optimizer": optimizer})
    proposed = drive(searcher(tmp_path, ("full",), trials=10))
    assert sorted(c["hparams"]["optimizer"] for c in proposed) == ["adamw", "sgd"]
    assert "16 proposals in a row were known already: the search ends early." in caplog.text
    twins = [t for t in optuna_trials(tmp_path) if "duplicate_of" in t.user_attrs]
    values = {t.params["full.optimizer"]: t.value for t in optuna_trials(tmp_path) if t not in twins}
    assert len(twins) == 16
    assert all(t.state == TrialState.COMPLETE and t.value == values[t.params["full.optimizer"]] for t in twins)


def test_optuna_receives_the_end_of_each_trial(tmp_path: Path) -> None:
    search = searcher(tmp_path, ("full",), trials=6)
    configs = {f"t{i}": search.suggest(f"t{i}") for i in range(6)}
    for unit in (1, 2):
        for trial_id in configs:
            search.on_trial_result(trial_id, {"val/acc": 0.1 * unit, "unit": unit})
    search.on_trial_complete("t0", {"val/acc": 0.4, "best/val/acc": 0.5, "unit": 4, "finished": True})
    search.on_trial_complete("t1", {"val/acc": 0.3, "unit": 3, "finished": False, "done": True})
    search.on_trial_complete("t2", {"val/acc": math.nan, "unit": 3})
    search.on_trial_complete("t3", None, error=True)
    search.on_trial_complete("t4", {"unit": 4, "finished": True})
    search.on_trial_complete("t5", None)
    search.on_trial_complete("t5", {"val/acc": 0.9, "unit": 4, "finished": True})  # ended already: ignored
    search.on_trial_complete("stranger", {"val/acc": 0.9, "unit": 4, "finished": True})
    trials = {t.user_attrs["tune_trial_id"]: t for t in optuna_trials(tmp_path)}
    states = {name: trial.state.name for name, trial in trials.items()}
    assert states == {"t0": "COMPLETE", "t1": "PRUNED", "t2": "FAIL", "t3": "FAIL", "t4": "FAIL", "t5": "PRUNED"}
    assert trials["t0"].value == 0.5  # the weights of the best unit are what the trial is worth
    assert trials["t0"].intermediate_values == {1: 0.1, 2: 0.2, 4: 0.4}
    assert trials["t1"].value == 0.3  # the last value, as Optuna defines it for pruned trials
    assert trials["t2"].intermediate_values == {1: 0.1, 2: 0.2}
    assert trials["t0"].user_attrs["metrics"] == {"val/acc": 0.4, "best/val/acc": 0.5}


def test_a_foreign_trainable_without_finished_is_complete_at_its_last_unit(tmp_path: Path) -> None:
    search = searcher(tmp_path, ("full",), trials=2, task=task(epochs=3))
    for trial_id, units in (("a", 3), ("b", 2)):
        search.suggest(trial_id)
        search.on_trial_complete(trial_id, {"val/acc": 0.5, "training_iteration": units})
    assert [t.state.name for t in optuna_trials(tmp_path)] == ["COMPLETE", "PRUNED"]


def test_a_unit_that_is_reported_twice_is_kept_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    search = searcher(tmp_path, ("full",), trials=1)
    config = search.suggest("t")
    assert isinstance(config, dict)
    for unit in (1, 2, 1, 2, 3):  # an actor died after unit 2 and started over
        search.on_trial_result("t", {"val/acc": 0.1 * unit, "unit": unit})
    complete(search, "t", config)
    assert list(optuna_trials(tmp_path)[0].intermediate_values) == [1, 2, 3, EPOCHS]
    assert [w for w in recwarn if "already reported" in str(w.message)] == []


def test_failed_trials_are_not_repeated_and_count(tmp_path: Path) -> None:
    proposed = drive(searcher(tmp_path), lambda c: None if c["_number"] % 2 else finished(c))
    assert len(proposed) == 12
    assert Counter(t.state.name for t in optuna_trials(tmp_path))["FAIL"] == 6


def test_the_concurrency_limit_is_kept_here(tmp_path: Path) -> None:
    search = searcher(tmp_path)
    assert search.set_max_concurrency(2) is True
    assert isinstance(search.suggest("a"), dict)
    assert isinstance(search.suggest("b"), dict)
    assert search.suggest("c") is None
    search.on_trial_complete("a", {"val/acc": 0.5, "unit": 4, "finished": True})
    assert isinstance(search.suggest("c"), dict)


def test_asking_twice_for_one_trial_gives_one_config(tmp_path: Path) -> None:
    search = searcher(tmp_path)
    assert search.suggest("a") == search.suggest("a")
    assert len(search.ledger.records) == 1


def test_trials_side_by_side_are_all_different_and_end(tmp_path: Path) -> None:
    proposed = drive(searcher(tmp_path, trials=20), concurrent=6)
    assert len({TrialSpec.from_dict(c).config_hash for c in proposed}) == len(proposed) == 20


def test_a_trial_that_a_killed_driver_left_is_proposed_again_under_its_number(tmp_path: Path) -> None:
    before = drive(searcher(tmp_path, trials=14), concurrent=3, stop_after=12)
    running = {c["_number"]: c for c in before[-3:]}
    again = searcher(tmp_path, trials=14)
    assert [t.state.name for t in optuna_trials(tmp_path)].count("RUNNING") == 0
    after = drive(again)
    assert {c["_number"]: c for c in after[:3]} == running
    assert [c["_number"] for c in after[3:]] == [12, 13]
    assert sorted(r.number for r in again.ledger.finished) == list(range(14))
    assert [t for t in optuna_trials(tmp_path) if t.state == TrialState.RUNNING] == []


def test_a_driver_may_be_killed_any_number_of_times(tmp_path: Path) -> None:
    numbers: set[int] = set()
    for _ in range(4):
        numbers |= {c["_number"] for c in drive(searcher(tmp_path, trials=9), concurrent=2, stop_after=3)}
    last = searcher(tmp_path, trials=9)
    numbers |= {c["_number"] for c in drive(last)}
    assert numbers == set(range(9))
    assert len(last.ledger.finished) == 9


def test_close_withdraws_what_runs(tmp_path: Path) -> None:
    search = searcher(tmp_path)
    first = search.suggest("a")
    search.close()
    assert [path.name for path in tmp_path.iterdir()] == ["optuna.db"]
    assert [t.state for t in optuna_trials(tmp_path, "s/given")] == [TrialState.FAIL]
    assert searcher(tmp_path).suggest("b") == first


def test_a_trial_is_journalled_before_tune_gets_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        search = searcher(tmp_path, journal=journal)
        search.suggest("a")
        config = search.suggest("b")
        events = journal.events()
    assert isinstance(config, dict)
    assert [e["kind"] for e in events] == ["trial_suggested"] * 2
    fields = {k: v for k, v in events[1].items() if k not in ("seq", "time", "kind")}
    default = search_spaces.default_point("full")
    assert fields == {
        "trial_id": "b",
        "number": 1,
        "sample": None,
        "strategy": "full",
        "label": "full",
        "hparams": default,
        "seed": stream_seed(3, "search"),
        "role": "search",
        "held_out": None,
        "config_hash": TrialSpec.from_dict(config).config_hash,
        "search_values": {"strategy": "full", **{f"full.{k}": v for k, v in default.items()}},
    }


def test_a_study_of_other_contents_is_refused(tmp_path: Path) -> None:
    drive(searcher(tmp_path), stop_after=1)
    with pytest.raises(SearchError, match=r"was made for something else: seed differs\. Its trials cannot be compared"):
        searcher(tmp_path, seed=4)
    with pytest.raises(
        SearchError, match=r"something else: batch_size, epochs, strategies differ\. .*put the old values back\.$"
    ):
        searcher(tmp_path, ("full",), task=task(epochs=9, batch_size=8))
    with pytest.raises(
        SearchError,
        match=r"has the directions maximize, but this study needs minimize\. Give the study another name\.$",
    ):
        searcher(tmp_path, objectives=("val/nll",))
    searcher(tmp_path, task=task(store="/moved", cache="/elsewhere"), trials=30, sampler="random")


def test_a_study_of_another_program_is_refused(tmp_path: Path) -> None:
    optuna.create_study(study_name="s", storage=url(tmp_path), direction="maximize").optimize(lambda t: 1.0, n_trials=1)
    with pytest.raises(
        SearchError,
        match=r"^The Optuna study 's' at sqlite:.* was not made by Luthier\. Give the study another name\.$",
    ):
        searcher(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"trials": 3},
            r"^The default points and sweeps of linear_probe, full, lp_ft, daft take 4 trials, but search\.trials is "
            r"3\. Raise it to 4 or more, or leave entries out\.$",
        ),
        ({"sampler": "paper", "trials": 20}, r"take 29 trials, but search\.trials is 20\."),
        ({"entries": []}, r"^A study needs entries with distinct labels, but got no entry\. Add or change `label`\.$"),
        ({"entries": [Entry("a", "full"), Entry("a", "daft")]}, r"but got a twice\."),
        ({"sampler": "tpee"}, r"^A sampler is one of tpe, gp, random, .*, but got 'tpee'\. Did you mean 'tpe'\?$"),
        (
            {"sampler": "random", "objectives": ("val/acc", "trainable_parameters")},
            r"^Several objectives need a sampler that learns from results, but got random and 2 objectives\. Use tpe "
            r"or gp, or one objective\.$",
        ),
        ({"sampler": "paper", "objectives": ("val/acc", "device_seconds"), "trials": 40}, r"but got paper and 2 obj"),
        ({"objectives": ("test/acc",)}, r"^A search never looks at test data, but got the metric 'test/acc'\."),
        ({"objectives": ("ood/mean/acc",)}, r"never looks at test data"),
        ({"objectives": ("calib/ece",)}, r"never looks at test data"),
        (
            {"objectives": ("val/accuracy",)},
            r"^A search optimises a metric with a direction, but got 'val/accuracy'\. Use val/acc, or a cost such as "
            r"cost/total_seconds \(docs/metrics\.md has all names\)\.$",
        ),
        ({"entries": [Entry("", "ful")]}, r"but got 'ful'\. Did you mean 'full'\?$"),
        ({"entries": [Entry("", "full", {}, "papr")]}, r"^full has no preset 'papr'\."),
        (
            {"entries": [Entry("", "full", {"lr_backbone": 0.1}, "paper")]},
            r"^A preset decides the values that it sweeps, but full fixes lr_backbone too\.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_an_error(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        searcher(tmp_path, **fields)


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_samplers_of_one_objective_or_two_draw_new_configurations(tmp_path: Path, sampler: str) -> None:
    objectives = ("val/acc", "val/nll")
    search = searcher(tmp_path, ("linear_probe", "full", "daft"), sampler=sampler, objectives=objectives, trials=14)
    proposed = drive(search, lambda c: {**finished(c), "val/nll": 1 - accuracy(c)})
    trials = [t for t in optuna_trials(tmp_path) if "duplicate_of" not in t.user_attrs]
    assert all(t.values == [pytest.approx(accuracy(c)), pytest.approx(1 - accuracy(c))] for t, c in zip(
        trials, proposed[1:], strict=True
    ))  # fmt: skip
    assert all(set(c["hparams"]) == {"lr_backbone", "lr_head"} for c in proposed[1:])
    assert len(optuna_trials(tmp_path, "s/given")) == 1  # what has nothing to learn from lies beside


def test_a_sampler_without_conditions_draws_all_entries_and_uses_one(tmp_path: Path) -> None:
    drive(searcher(tmp_path, ("linear_probe", "full", "daft"), sampler="gp", trials=14))
    trials = [t for t in optuna_trials(tmp_path) if "duplicate_of" not in t.user_attrs]
    full = {"strategy", "full.lr_backbone", "full.lr_head", "daft.lr_backbone", "daft.lr_head"}
    assert all(set(trial.params) == full for trial in trials)
    assert len(trials) == 13


def test_tune_may_pickle_it_but_not_restore_it(tmp_path: Path) -> None:
    search = searcher(tmp_path, journal=Journal(tmp_path / "journal.jsonl"))
    search.save(str(tmp_path / "state"))
    assert isinstance(pickle.loads(pickle.dumps(search)), StudySearcher)  # noqa: S301
    with pytest.raises(
        SearchError, match=r"^A study is continued by running it again over the same storage, not by Tuner\.restore\.$"
    ):
        search.restore(str(tmp_path / "state"))
