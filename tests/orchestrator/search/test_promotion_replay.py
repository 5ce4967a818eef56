"""A study that pauses and promotes trials, whose driver dies at any event: the same study comes of it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from orchestrator.record.journal import Journal, fold
from orchestrator.record.records import TrialRecord
from orchestrator.results.selection import top_candidates
from orchestrator.running.journal_callback import RecordCallback, close_open_trials
from orchestrator.search.promotion import Promotions
from orchestrator.search.promotion_scheduler import PromotionScheduler
from orchestrator.search.rungs import rungs
from orchestrator.search.stages import ConfirmStage
from tests.support import interrupted_study as replay
from tests.support.driving import EPOCHS, optuna_trials, searcher, task

fault = replay.fault
TRIALS = 14
NAMES = ("linear_probe", "full", "daft")


@dataclass(eq=False)
class FakeTrial:
    trial_id: str
    config: dict[str, Any]
    status: str = Trial.PENDING
    unit: int = 0
    """0 = without a process."""
    last_result: dict[str, Any] = field(default_factory=dict)

    def set_status(self, status: str) -> None:
        self.status = status


class Driver:
    """One process of a study: the calls of Tune's controller, in its order, for one slot."""

    every = 1
    """Units between two checkpoints of a trial; at a rung there is always one."""

    def __init__(self, folder: Path, checkpoints: replay.Checkpoints, **fields: Any) -> None:
        self.journal = Journal(folder / "journal.jsonl")
        close_open_trials(self.journal)
        self.journal.append("study_started", study="s", spec={})
        self.checkpoints = checkpoints
        stage = ConfirmStage(task(), lambda records: top_candidates(records, 2, "id_val"), seeds=2, seed=3)
        self.promotions = Promotions.replay(
            rungs(EPOCHS, 1, 2), 2, fold(self.journal.events()), "val/acc", True, list(NAMES)
        )
        fields = {"trials": TRIALS, **fields}
        self.searcher = searcher(
            folder, NAMES, journal=self.journal, stages=[stage], promotions=self.promotions, **fields
        )
        self.searcher.set_max_concurrency(1)
        self.scheduler = PromotionScheduler(self.promotions, "val/acc", True, EPOCHS, 1, 2)
        self.callback = RecordCallback(self.journal, promotions=self.promotions)
        self.trials: list[FakeTrial] = []

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    def pause_trial(self, trial: FakeTrial, should_checkpoint: bool) -> None:
        assert not should_checkpoint, "Tune would save the trial into its own storage"
        trial.status, trial.unit = Trial.PAUSED, 0

    def stop_trial(self, trial: FakeTrial) -> None:
        if trial.status == Trial.PAUSED:
            self.scheduler.on_trial_remove(self, trial)
            self.searcher.on_trial_complete(trial.trial_id)
        else:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
            self.searcher.on_trial_complete(trial.trial_id, trial.last_result)
        trial.status = Trial.TERMINATED
        self.callback.on_trial_complete(0, [], trial)

    def run(self) -> None:
        while self.propose():
            chosen = self.scheduler.choose_trial_to_run(self)
            if chosen is not None:
                self.callback.on_trial_start(0, [], chosen)
                chosen.status = Trial.RUNNING
                # The result of its newest checkpoint is reported once more.
                chosen.unit = self.checkpoints.get(chosen.config["_number"], 1)
            running = [trial for trial in self.trials if trial.status == Trial.RUNNING]
            assert len(running) <= 1
            for trial in running:
                self.step(trial)
        self.callback.on_experiment_end([])
        self.journal.append("study_finished", state="complete")
        assert self.callback.problems == []

    def propose(self) -> bool:
        """Ask for trials as Tune does, while none is pending; False = the study is over."""
        while not any(trial.status == Trial.PENDING for trial in self.trials):
            trial_id = uuid.uuid4().hex[:8]
            config = self.searcher.suggest(trial_id)
            if config == Searcher.FINISHED:
                assert not any(trial.status in (Trial.RUNNING, Trial.PAUSED) for trial in self.trials)
                return False
            if config is None:
                break
            assert isinstance(config, dict)
            trial = FakeTrial(trial_id, config)
            self.trials.append(trial)
            self.scheduler.on_trial_add(self, trial)
        return True

    def step(self, trial: FakeTrial) -> None:
        number = trial.config["_number"]
        last = trial.last_result = replay.result(trial.config, trial.unit)
        if trial.unit % self.every == 0 or trial.unit in trial.config.get("_checkpoint_at", ()):
            self.checkpoints[number] = trial.unit
        decision = TrialScheduler.STOP if last["done"] else self.scheduler.on_trial_result(self, trial, last)
        if decision != TrialScheduler.STOP:
            self.searcher.on_trial_result(trial.trial_id, last)
        self.callback.on_trial_result(0, [], trial, last)
        if decision == TrialScheduler.STOP:
            self.stop_trial(trial)
        trial.unit += trial.status == Trial.RUNNING

    def die(self) -> None:
        """As the kernel does it."""
        self.journal.close()
        if hasattr(self, "searcher"):
            self.searcher.ledger._storage.close()


def study(folder: Path, checkpoints: replay.Checkpoints | None = None, **fields: Any) -> list[TrialRecord]:
    """Run a study, as often as a planned fault interrupts it."""
    folder.mkdir(exist_ok=True)
    checkpoints = {} if checkpoints is None else checkpoints
    for _ in range(30):
        driver = Driver.__new__(Driver)
        try:
            driver.__init__(folder, checkpoints, **fields)  # type: ignore[misc]  # it may die in here
            driver.run()
            driver.searcher.close()
            return replay.continued(folder)
        except KeyboardInterrupt:
            continue
        finally:
            driver.die()
    raise AssertionError("the study does not end")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrialRecord]]:
    """The study without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, study(folder)


def test_a_study_promotes_and_then_confirms(whole: tuple[Path, list[TrialRecord]]) -> None:
    folder, records = whole
    assert [r.role for r in records] == ["search"] * TRIALS + ["confirm"] * 4
    events = Journal.read(folder / "journal.jsonl")
    kinds = Counter(event["kind"] for event in events)
    assert kinds["trial_suggested"] == TRIALS + 4, "the budget counts trials, not promotions"
    assert kinds["trial_promoted"] > 0
    assert kinds["trial_started"] == TRIALS + 4, "a promotion is no further attempt"
    assert {r.attempts for r in records} == {1}
    states = {label: Counter(r.state for r in records if r.label == label and r.role == "search") for label in NAMES}
    assert all(count["complete"] >= 1 for count in states.values()), "every entry can be ranked"
    assert states["full"]["pruned"]
    assert states["daft"]["pruned"]
    assert {r.unit for r in records if r.state == "pruned"} <= {1, 2}, "the rungs"
    first_confirmation = next(e["seq"] for e in events if e.get("role") == "confirm")
    assert max(e["seq"] for e in events if e["kind"] in ("trial_paused", "trial_promoted")) < first_confirmation


def test_optuna_has_a_paused_trial_as_running_and_then_as_pruned(
    whole: tuple[Path, list[TrialRecord]], fault: Callable[[str], None], tmp_path: Path
) -> None:
    folder, records = whole
    pruned = [t for t in optuna_trials(folder) if t.state == TrialState.PRUNED]
    assert len(pruned) == sum(r.state == "pruned" for r in records)
    assert all(t.value == t.intermediate_values[max(t.intermediate_values)] for t in pruned)
    assert all(t.user_attrs["metrics"]["val/acc"] == t.value for t in pruned)
    fault(f"phase=after_event,seq={replay.events_of(folder, 'trial_paused')[6]},action=interrupt")
    driver = Driver(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    driver.searcher.close()
    driver.die()
    close_open_trials(Journal(tmp_path / "journal.jsonl"))
    paused = [r.number for r in replay.continued(tmp_path) if r.state == "paused"]
    running = [t.user_attrs["trial"]["number"] for t in optuna_trials(tmp_path) if t.state == TrialState.RUNNING]
    assert len(paused) > 2
    assert set(paused) <= set(running)


DEATHS = [f"phase={phase},seq={seq}" for seq in range(2, 115, 19) for phase in ("before_event", "after_event")]
OFTEN = ";".join(f"phase=before_event,seq={seq},action=interrupt" for seq in range(6, 140, 9))


@pytest.mark.parametrize("deaths", [*(f"{death},action=interrupt" for death in DEATHS), OFTEN])
def test_p5_p6_a_driver_killed_at_any_event_changes_nothing(
    whole: tuple[Path, list[TrialRecord]], fault: Callable[[str], None], tmp_path: Path, deaths: str
) -> None:
    fault(deaths)
    study(tmp_path / "s")
    assert len((tmp_path / "faults").read_text().splitlines()) == deaths.count(";") + 1, "every planned death happened"
    replay.check_same_study(tmp_path / "s", whole[0])


@pytest.mark.parametrize("every", [2, 99])
def test_p5_trials_whose_checkpoints_are_old_change_nothing_either(
    whole: tuple[Path, list[TrialRecord]], fault: Callable[[str], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, every: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(Driver, "every", every)
    test_p5_p6_a_driver_killed_at_any_event_changes_nothing(whole, fault, tmp_path, OFTEN)


@pytest.mark.parametrize("index", [0, 2])
def test_p30_the_journal_alone_gives_the_same_study(
    whole: tuple[Path, list[TrialRecord]], tmp_path: Path, index: int
) -> None:
    """Checkpoints and Optuna's database are lost."""
    seq = replay.events_of(whole[0], "trial_promoted")[index]
    copy = replay.interrupted_copy(tmp_path / "s", whole[0], seq)
    assert replay.shown(study(copy)) == replay.shown(whole[1])
    assert replay.known_to_optuna(copy) == replay.known_to_optuna(whole[0])


@pytest.mark.parametrize(
    "fields", [{"sampler": "gp"}, {"sampler": "random"}, {"sampler": "paper", "trials": 30}], ids=str
)
def test_p30_under_every_sampler(fault: Callable[[str], None], tmp_path: Path, fields: dict[str, Any]) -> None:
    records = study(tmp_path / "whole", **fields)
    fault(f"phase=after_event,seq={replay.events_of(tmp_path / 'whole', 'trial_paused')[9]},action=interrupt")
    assert replay.shown(study(tmp_path / "s", **fields)) == replay.shown(records)


def test_a_stage_alone_leaves_paused_trials_as_they_are(whole: tuple[Path, list[TrialRecord]], tmp_path: Path) -> None:
    seq = replay.events_of(whole[0], "trial_paused")[6]
    copy = replay.interrupted_copy(tmp_path / "s", whole[0], seq)
    before = [r.number for r in replay.continued(copy) if r.state == "paused"]
    driver = Driver(copy, {}, searching=False)
    driver.run()
    driver.searcher.close()
    driver.die()
    assert [r.number for r in replay.continued(copy) if r.state == "paused"] == before
    search = [(r.hparams, r.state, r.history) for r in study(copy) if r.role == "search"]
    assert search == [(r.hparams, r.state, r.history) for r in whole[1] if r.role == "search"]
