"""Tune's events reach the journal, and nothing that goes wrong there reaches Tune."""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from orchestrator.ray_internals import in_memory_tune_storage, without_tune_files
from orchestrator.record.checkpoints import checkpoint_folder, tidy
from orchestrator.record.journal import Journal, JournalWriteError, fold
from orchestrator.running.journal_callback import RecordCallback, close_open_trials
from orchestrator.running.progress import Progress
from orchestrator.search.promotion import Promotions
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec


def config(number: int = 0, **fields: Any) -> dict[str, Any]:
    task = SharedTrialSettings(store="/data", model=ModelSpec(name="digits_vit"), epochs=3)
    spec = TrialSpec(shared=task, strategy="full", hparams={"lr_head": 0.1}, seed=5, label="mine", **fields)
    return spec.to_dict() | {"_number": number}


def tune_trial(trial_id: str = "t0", **fields: Any) -> Any:
    """What the callback uses of `ray.tune.experiment.Trial`."""
    defaults = {"config": config(), "trial_id": trial_id, "last_result": {}}
    return SimpleNamespace(**(defaults | fields))


def result(unit: int, **fields: Any) -> dict[str, Any]:
    defaults = {"val/acc": unit / 10, "unit": unit, "training_iteration": unit, "finished": False, "pid": 9}
    return defaults | {"hostname": "n1", "time_total_s": 3.0} | fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl") as opened:
        yield opened


def test_a_trial_from_start_to_end(journal: Journal) -> None:
    console = Console(file=io.StringIO(), width=120)
    callback = RecordCallback(journal, Progress(1, 3, console))
    trial = tune_trial()
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result(1))
    callback.on_trial_result(0, [], trial, result(2, finished=True))
    callback.on_trial_complete(0, [], trial)
    callback.on_experiment_end([])
    events = journal.events()
    assert [e["kind"] for e in events] == [
        "trial_suggested", "trial_started", "result", "result", "trial_finished",
    ]  # fmt: skip
    assert [(e.get("node"), e.get("pid")) for e in events if e["kind"] == "result"] == [("n1", 9), (None, None)]
    (record,) = fold(events)
    assert (record.state, record.number, record.label, record.seed) == ("complete", 0, "mine", 5)
    assert record.config_hash == TrialSpec.from_dict(config()).config_hash
    assert record.metrics == {"val/acc": 0.2}
    assert record.node == "n1"
    assert callback.problems == []
    assert isinstance(console.file, io.StringIO)
    assert "trial 0 mine: complete after 2 epochs" in console.file.getvalue()


def test_a_trial_that_the_searcher_announced_is_not_announced_again(journal: Journal) -> None:
    journal.append("trial_suggested", trial_id="t0", number=4, strategy="full", search_values={"full.lr": 1})
    RecordCallback(journal).on_trial_start(0, [], tune_trial())
    (record,) = fold(journal.events())
    assert (record.number, record.state, record.search_values) == (4, "running", {"full.lr": 1})


def test_a_trial_stopped_before_its_budget_is_pruned(journal: Journal) -> None:
    callback = RecordCallback(journal)
    trial = tune_trial()
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result(1))
    callback.on_trial_complete(0, [], trial)
    assert [record.state for record in fold(journal.events())] == ["pruned"]


def test_failures_carry_reason_and_message_of_the_last_attempt(journal: Journal) -> None:
    errors = {"t0": "ray.exceptions.ActorDiedError: The actor died."}
    callback = RecordCallback(journal, errors=errors)
    trial = tune_trial()
    callback.on_trial_start(0, [], trial)
    callback.on_trial_recover(0, [], trial)
    callback.on_trial_start(0, [], trial)
    errors["t0"] = "Traceback\nmodule.NonFiniteError: the loss is nan\n"
    callback.on_trial_error(0, [], trial)
    failures = [(e["kind"], e["reason"], e["error"]) for e in journal.events() if "reason" in e]
    assert failures == [
        ("trial_retried", "infra", "ray.exceptions.ActorDiedError: The actor died."),
        ("trial_failed", "nan", "module.NonFiniteError: the loss is nan"),
    ]
    (record,) = fold(journal.events())
    assert (record.state, record.attempts) == ("failed", 2)


def test_what_tune_leaves_open_is_closed_as_interrupted(journal: Journal) -> None:
    callback = RecordCallback(journal)
    for trial_id, number in (("done", 0), ("open", 1)):
        trial = tune_trial(trial_id, config=config(number))
        callback.on_trial_start(0, [], trial)
        callback.on_trial_result(0, [], trial, result(1, finished=trial_id == "done"))
    callback.on_trial_complete(0, [], tune_trial("done"))
    journal.append("trial_suggested", trial_id="waiting", number=2, strategy="full")
    callback.on_experiment_end([])
    records = fold(journal.events())
    assert [(r.state, r.reason) for r in records] == [
        ("complete", None), ("failed", "interrupted"), ("failed", "interrupted"),
    ]  # fmt: skip
    assert records[1].error == "The driver ended at unit 1."
    assert close_open_trials(journal) == []


def test_a_trial_that_pauses_and_is_promoted_is_one_attempt(journal: Journal, tmp_path: Path) -> None:
    promotions = Promotions((1, 2), 2, ["mine"])
    callback = RecordCallback(journal, folder=tmp_path, promotions=promotions)
    for number in range(2):
        checkpoint_folder(tmp_path, number).mkdir(parents=True)
    for number in range(2):
        callback.on_trial_start(0, [], tune_trial(f"t{number}", config=config(number)))
        promotions.add(number, "mine")
        assert not promotions.report(number, 1, 1.0 - number)
        callback.on_trial_result(0, [], tune_trial(f"t{number}", config=config(number)), result(1))
    assert [r.state for r in fold(journal.events())] == ["paused", "paused"]
    assert [r.resumable for r in fold(journal.events())] == [True, True]
    assert promotions.promote_next() == 0
    promoted = tune_trial("t0", config=config(0))
    callback.on_trial_start(0, [], promoted)
    assert fold(journal.events())[0].state == "running"
    callback.on_trial_result(0, [], promoted, result(1))  # that of its checkpoint
    callback.on_trial_result(0, [], promoted, result(2, finished=True))
    callback.on_trial_complete(0, [], promoted)
    callback.on_trial_start(0, [], tune_trial("t2", config=config(2)))
    callback.on_experiment_end([])
    records = fold(journal.events())
    assert [(r.state, r.reason, r.unit, r.attempts) for r in records] == [
        ("complete", None, 2, 1), ("paused", None, 1, 1), ("failed", "interrupted", 0, 1),
    ]  # fmt: skip
    assert [e["kind"] for e in journal.events() if e["trial_id"] == "t0"] == [
        "trial_suggested", "trial_started", "result", "trial_paused", "trial_promoted", "result", "trial_finished",
    ]  # fmt: skip
    tidy(tmp_path, records)
    assert [checkpoint_folder(tmp_path, number).exists() for number in range(2)] == [False, True]
    callback.on_trial_complete(0, [], tune_trial("t1", config=config(1)))  # it was withdrawn
    assert fold(journal.events())[1].state == "pruned"
    assert not checkpoint_folder(tmp_path, 1).exists(), "only what may still be promoted keeps a checkpoint"


def test_p2_a_unit_that_is_said_twice_is_written_once(journal: Journal) -> None:
    """Also across drivers: a trial resumed from a checkpoint re-reports its result."""
    callback = RecordCallback(journal)
    trial = tune_trial("t0")
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result(1) | {"cost/unit_seconds": 1.0, "train/loss": float("nan")})
    again = RecordCallback(journal)
    resumed = tune_trial("t1")
    again.on_trial_start(0, [], resumed)
    again.on_trial_result(0, [], resumed, result(1) | {"cost/unit_seconds": 9.0, "train/loss": float("nan")})
    again.on_trial_result(0, [], resumed, result(2))
    again.on_trial_result(0, [], resumed, result(2))
    assert [e["unit"] for e in journal.events() if e["kind"] == "result"] == [1, 2]
    again.on_trial_result(0, [], resumed, result(2) | {"val/acc": 0.9})  # other numbers, as after a change of settings
    assert [e["metrics"] for e in journal.events() if e["kind"] == "result"][2:] == [{"val/acc": 0.9}]


def test_p20_a_result_that_is_a_failure_ends_the_trial_as_failed(journal: Journal, tmp_path: Path) -> None:
    callback = RecordCallback(journal, folder=tmp_path)
    trial = tune_trial()
    kept = checkpoint_folder(tmp_path, 0)
    kept.mkdir(parents=True)
    callback.on_trial_start(0, [], trial)
    text = "Traceback …\ntrainables.specs.errors.NonFiniteError: The training loss must be finite.\n"
    callback.on_trial_result(0, [], trial, {"failure": text, "checkpoint_problems": ["torn"], "done": True})
    callback.on_trial_complete(0, [], trial)
    (record,) = fold(journal.events())
    assert (record.state, record.reason) == ("failed", "nan")
    assert record.error == "trainables.specs.errors.NonFiniteError: The training loss must be finite."
    assert [e["problem"] for e in journal.events() if e["kind"] == "checkpoint_problem"] == ["torn"]
    assert not kept.exists()


def test_checkpoints_of_a_trial_whose_machines_failed_it_stay_for_the_next_run(
    journal: Journal, tmp_path: Path
) -> None:
    callback = RecordCallback(journal, folder=tmp_path)
    for number, (ending, kept) in enumerate(((callback.on_trial_error, True), (callback.on_trial_complete, False))):
        folder = checkpoint_folder(tmp_path, number)
        trial = tune_trial(f"t{number}", config=config(number))
        folder.mkdir(parents=True)
        callback.on_trial_start(0, [], trial)
        ending(0, [], trial)
        assert folder.exists() is kept
    records = fold(journal.events())
    assert [(r.reason, r.unfinished, r.resumable) for r in records] == [("infra", False, True), (None, False, False)]
    (tmp_path / "checkpoints" / ".trial-0004.ab12").mkdir()
    checkpoint_folder(tmp_path, 1).mkdir()
    tidy(tmp_path, records)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["trial-0000"]


def test_nothing_raises_whatever_is_wrong(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    callback = RecordCallback(journal)
    trial = tune_trial()
    monkeypatch.setattr(journal, "append", full)
    with caplog.at_level(logging.ERROR):
        callback.on_trial_start(0, [], tune_trial(config={"nonsense": 1}))
        for _ in range(3):
            callback.on_trial_result(0, [], trial, result(1))
        callback.on_trial_result(0, [], trial, {})
        for hook in (callback.on_trial_complete, callback.on_trial_error, callback.on_trial_recover):
            hook(0, [], trial)
        monkeypatch.setattr(journal, "events", full)
        callback.on_experiment_end([])
    assert len(callback.problems) == 9
    full_disk = "on_trial_result: OSError: [Errno 28] No space left on device"
    assert callback.problems.count(full_disk) == 3
    assert caplog.text.count(full_disk) == 1


def test_s1_a_result_that_the_journal_does_not_take_stops_the_experiment(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that continued would lose a result: stopped now, it re-reports this one when it is resumed."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise JournalWriteError(28, "No space left on device")

    callback = RecordCallback(journal)
    trial = tune_trial()
    monkeypatch.setattr(journal, "append", full)
    for hook in (callback.on_trial_start, callback.on_trial_complete, callback.on_trial_recover):
        with pytest.raises(JournalWriteError):
            hook(0, [], trial)
    with pytest.raises(JournalWriteError):
        callback.on_trial_result(0, [], trial, result(1))
    monkeypatch.undo()
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, result(1))
    assert [event["unit"] for event in journal.events() if event["kind"] == "result"] == [1]


def test_tune_can_pickle_it(journal: Journal) -> None:
    callback = RecordCallback(journal, Progress(1, 3))
    copy = pickle.loads(pickle.dumps(callback))  # noqa: S301  # what Tuner does at construction
    assert copy.journal.path == journal.path


def given_trials(configs: list[dict[str, Any]]) -> Any:
    """A Tune searcher that proposes what it is given."""
    from ray import tune

    class Given(tune.search.Searcher):  # type: ignore[misc]
        """Proposes what it was given."""

        def __init__(self, configs: list[dict[str, Any]]) -> None:
            super().__init__(metric="val/acc", mode="max")
            self.configs = configs

        def suggest(self, trial_id: str) -> Any:
            return self.configs.pop(0) if self.configs else self.FINISHED

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """Nothing to learn."""

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).touch()

        def restore(self, checkpoint_path: str) -> None:
            """Nothing to restore."""

    return Given(configs)


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_experiment_with_every_ending(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler

    from tests.support.clusters import plain_cluster

    class Work(tune.Trainable):  # type: ignore[misc]
        """Three units; `nan` raises in the second."""

        def step(self) -> dict[str, Any]:
            if self.iteration == 1 and self.config["label"] == "nan":
                raise ArithmeticError("NonFiniteError: the loss is nan")
            return result(self.iteration + 1, finished=self.iteration == 2, done=self.iteration == 2)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

    class StopOne(FIFOScheduler):  # type: ignore[misc]
        """Stops the trial labelled `slow` after its first unit."""

        def on_trial_result(self, tune_controller: Any, trial: Any, unit_result: dict[str, Any]) -> str:
            return str(self.STOP if trial.config["label"] == "slow" else self.CONTINUE)

    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    errors: dict[str, str] = {}
    callback = RecordCallback(journal, errors=errors)
    configs = [config(n) | {"label": label} for n, label in enumerate(("good", "nan", "slow"))]
    with plain_cluster(cpus=1), without_tune_files(errors):
        tune.Tuner(
            tune.with_resources(Work, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=given_trials(configs), scheduler=StopOne(), num_samples=-1, max_concurrent_trials=1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                **in_memory_tune_storage(), callbacks=[callback], verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()  # fmt: skip
    assert callback.problems == []
    records = fold(journal.events())
    assert [(r.label, r.state, r.reason, r.unit) for r in records] == [
        ("good", "complete", None, 3),
        ("nan", "failed", "nan", 1),
        ("slow", "pruned", None, 1),
    ]
    assert records[0].history[0] == {"unit": 1.0, "val/acc": 0.1}
    assert records[0].node
