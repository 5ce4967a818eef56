"""The Trainable: as a plain object, and in Tuners on a cluster of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune import Callback
from ray.tune.search import Searcher

import trainables
from benchmarks.support.synthetic import write_shapes
from tests.support.clusters import plain_cluster
from tests.support.trials import CLOCK, history_of, same_numbers
from trainables.engine.trial import Trial
from trainables.engine.tune_trainable import TuneTrainable, trainable_class
from trainables.specs.errors import NonFiniteError
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec

pytestmark = pytest.mark.usefixtures("cpu_only")
"""A Tune trial chooses its device by itself; the numbers that it must equal are those of a run on the CPU."""

POINTS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("full", {"lr_backbone": 0.02}, 0),
    ("daft", {"lr_head": 0.1}, 0),
    ("full", {"lr_backbone": 0.02}, 1),
    ("lp_ft", {}, 0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trials")
    write_shapes(root / "store")
    return root


@pytest.fixture(scope="module")
def task(folder: Path, network: Callable[[str], str], one_thread: None) -> SharedTrialSettings:
    model = ModelSpec(name=network("cnn"))
    return SharedTrialSettings(
        store=str(folder / "store"), model=model, epochs=3, batch_size=16, cache=str(folder / "cache")
    )


@pytest.fixture(scope="module")
def specs(task: SharedTrialSettings) -> list[TrialSpec]:
    return [TrialSpec(shared=task, strategy=s, hparams=h, seed=seed) for s, h, seed in POINTS]


@pytest.fixture(scope="module")
def expected(specs: list[TrialSpec]) -> list[list[dict[str, Any]]]:
    """Every trial on its own, without ray."""
    return [history_of(Trial(spec, device="cpu")) for spec in specs]


def train(trial: Any) -> list[dict[str, Any]]:
    """All results of a Trainable, as Tune gets them."""
    results = [trial.train()]
    while not results[-1]["done"]:
        results.append(trial.train())
    return results


def shared(results: list[dict[str, Any]], like: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The part of Tune's results that the run itself reported."""
    return [
        {name: result[name] for name in unit if name not in CLOCK} for result, unit in zip(results, like, strict=True)
    ]


def test_a_trial_has_at_least_the_niceness_of_its_study(
    specs: list[TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[int] = []
    monkeypatch.setattr("trainables.engine.tune_trainable.raise_niceness", raised.append)
    for nice in (7, None):
        TuneTrainable({**specs[0].to_dict(), "_nice": nice}).step()
    assert raised == [7]


def test_setup_touches_nothing(tmp_path: Path) -> None:
    task = SharedTrialSettings(store=str(tmp_path / "none"), model=ModelSpec(name="no_such_model"))
    trial = TuneTrainable(TrialSpec(shared=task, strategy="daft").to_dict() | {"_number": 7})
    assert repr(trial) == "trial-0007-daft-no_such_model"
    with pytest.raises(ValueError, match="data store is a folder"):
        trial.step()


def test_a_trial_is_named_by_its_label_and_its_local_network(task: SharedTrialSettings) -> None:
    spec = TrialSpec(shared=task, strategy="daft", label="daft, no conversion")
    assert repr(TuneTrainable(spec.to_dict())) == "trial-daft_no_conversion-cnn"


def test_fresh_and_reused_trainables_give_the_numbers_of_a_plain_run(
    specs: list[TrialSpec], expected: list[list[dict[str, Any]]]
) -> None:
    reused = TuneTrainable(specs[1].to_dict())
    reused.train()  # left in the middle, as a stopped trial
    for spec, history in zip(specs, expected, strict=True):
        assert same_numbers(shared(train(TuneTrainable(spec.to_dict())), history), history)
        assert reused.reset(spec.to_dict()) is True
        assert same_numbers(shared(train(reused), history), history)


def test_a_reused_trainable_loads_neither_network_nor_store_again(
    specs: list[TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch of its next trials waits for neither; `benchmarks.overhead` measures the remainder."""
    trial = TuneTrainable(specs[0].to_dict())
    trial.train()

    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("loaded again")

    monkeypatch.setattr("timm.create_model", load)
    monkeypatch.setattr("pyarrow.memory_map", load)
    for spec in specs:
        trial.reset(spec.to_dict())
        assert trial.train()["cost/first_batch_seconds"] > 0


def test_an_unknown_strategy_raises_instead_of_stalling_tune(specs: list[TrialSpec]) -> None:
    trial = TuneTrainable(specs[0].to_dict())
    assert trial.reset(specs[0].to_dict() | {"strategy": "dart"}) is True
    with pytest.raises(ValueError) as error:
        trial.train()
    assert str(error.value).endswith("but got 'dart'. Did you mean 'daft'?")


def test_a_saved_trial_continues_in_another_trainable(
    specs: list[TrialSpec], expected: list[list[dict[str, Any]]], tmp_path: Path
) -> None:
    trial = TuneTrainable(specs[1].to_dict())
    results = [trial.train()]
    trial.save(str(tmp_path / "checkpoint_000000"))
    other = TuneTrainable(specs[0].to_dict())
    other.train()
    other.reset(specs[1].to_dict())
    other.restore(str(tmp_path / "checkpoint_000000"))
    other.save(str(tmp_path / "checkpoint_000001"))  # before any step: the state that was loaded
    results += train(other)
    assert same_numbers(shared(results, expected[1]), expected[1])
    assert results[-1]["training_iteration"] == 3


def test_a_damaged_checkpoint_costs_one_unit_not_the_trial(
    specs: list[TrialSpec], expected: list[list[dict[str, Any]]], tmp_path: Path
) -> None:
    trial = TuneTrainable(specs[0].to_dict())
    for number in range(2):
        trial.train()
        trial.save(str(tmp_path / f"checkpoint_{number:06d}"))
    (tmp_path / "checkpoint_000001" / "tensors.safetensors").write_bytes(b"torn")
    other = TuneTrainable(specs[0].to_dict())
    other.restore(str(tmp_path / "checkpoint_000001"))
    rest = train(other)
    assert same_numbers(shared(rest, expected[0][1:]), expected[0][1:])
    assert rest[0]["training_iteration"] == 2


def test_divergence_is_an_error_of_the_trial(task: SharedTrialSettings) -> None:
    trial = TuneTrainable(TrialSpec(shared=task, strategy="full", hparams={"lr_backbone": 1e30}).to_dict())
    with pytest.raises(NonFiniteError):
        train(trial)


def test_the_class_of_a_strategy_needs_no_strategy_in_its_config(
    specs: list[TrialSpec], expected: list[list[dict[str, Any]]]
) -> None:
    config = specs[1].to_dict()
    del config["strategy"]
    cls = trainables.trainable("daft")
    assert cls is trainable_class("daft")
    assert cls.__name__ == "DaftTrial"
    assert same_numbers(shared(train(cls(config)), expected[1]), expected[1])


@pytest.fixture(scope="module")
def cluster(one_thread: None) -> Iterator[None]:
    with plain_cluster(cpus=2):
        yield


class Listed(Searcher):
    """Proposes given configs, in order."""

    def __init__(self, configs: list[dict[str, Any]]) -> None:
        super().__init__(metric="val/acc", mode="max")
        self.configs = configs

    def suggest(self, trial_id: str) -> Any:
        return self.configs.pop(0) if self.configs else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing is learnt."""


class Histories(Callback):
    """Keeps what every trial reported, by the trial's number, and the process that it ran in."""

    def __init__(self) -> None:
        self.units: dict[int, list[dict[str, Any]]] = {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.units.setdefault(trial.config["_number"], []).append(result)


def tuned(
    specs: list[TrialSpec], folder: Path, *, reuse: bool, at_once: int, cls: Any = TuneTrainable
) -> list[list[dict[str, Any]]]:
    """The histories of `specs`, run by a Tuner, in their order."""
    configs = [spec.to_dict() | {"_number": number} for number, spec in enumerate(specs)]
    histories = Histories()
    tuner = tune.Tuner(
        tune.with_resources(cls, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=Listed(configs), num_samples=len(specs), reuse_actors=reuse, max_concurrent_trials=at_once
        ),
        run_config=tune.RunConfig(
            name=f"{reuse}-{at_once}", storage_path=str(folder), verbose=0, callbacks=[histories]
        ),
    )
    results = tuner.fit()
    assert results.errors == []
    return [histories.units[number] for number in range(len(specs))]


@pytest.mark.ray
@pytest.mark.parametrize(("reuse", "at_once", "trials"), [(True, 1, 4), (True, 2, 4), (False, 2, 2)])
def test_numbers_depend_neither_on_the_actor_nor_on_the_neighbours(
    cluster: None,
    specs: list[TrialSpec],
    expected: list[list[dict[str, Any]]],
    tmp_path: Path,
    reuse: bool,
    at_once: int,
    trials: int,
) -> None:
    outcome = tuned(specs[:trials], tmp_path, reuse=reuse, at_once=at_once)
    for results, history in zip(outcome, expected[:trials], strict=True):
        assert same_numbers(shared(results, history), history)
    assert len({results[0]["pid"] for results in outcome}) == (at_once if reuse else trials)


@pytest.mark.ray
def test_the_first_batch_on_a_reused_actor_comes_sooner_than_on_a_new_one(
    cluster: None, specs: list[TrialSpec], tmp_path: Path
) -> None:
    outcome = tuned(specs[:1] * 4, tmp_path, reuse=True, at_once=1)
    cold, *warm = [results[0]["cost/first_batch_seconds"] for results in outcome]
    assert 0 < min(warm) < cold / 2


@pytest.mark.ray
def test_a_strategy_can_be_handed_to_a_tuner_of_ones_own(
    cluster: None, task: SharedTrialSettings, tmp_path: Path
) -> None:
    tuner = tune.Tuner(
        trainables.trainable("daft"),
        param_space={
            "task": dataclasses.asdict(dataclasses.replace(task, epochs=1)),
            "hparams": {"lr_backbone": tune.loguniform(1e-4, 1e-2), "lr_head": tune.grid_search([0.03, 0.1])},
            "seed": 5,
        },
        tune_config=tune.TuneConfig(metric="val/acc", mode="max", reuse_actors=True, max_concurrent_trials=1),
        run_config=tune.RunConfig(name="own", storage_path=str(tmp_path), verbose=0),
    )
    results = tuner.fit()
    assert results.errors == []
    assert sorted(r.config["hparams"]["lr_head"] for r in results) == [0.03, 0.1]
    assert all(0 <= r.metrics["test/acc"] <= 1 and r.metrics["finished"] is True for r in results)


@pytest.mark.ray
def test_a_stopped_and_restored_tune_trial_continues_bit_for_bit(
    cluster: None, specs: list[TrialSpec], expected: list[list[dict[str, Any]]], tmp_path: Path
) -> None:
    """An actor that dies in the middle: the trial resumes from its checkpoint in a new process."""
    configs = [specs[1].to_dict() | {"_number": 0, "_die_once": str(tmp_path / "died")}]
    histories = Histories()
    tuner = tune.Tuner(
        tune.with_resources(Mortal, {"cpu": 1}),
        tune_config=tune.TuneConfig(search_alg=Listed(configs), num_samples=1, max_concurrent_trials=1),
        run_config=tune.RunConfig(
            name="mortal",
            storage_path=str(tmp_path),
            verbose=0,
            callbacks=[histories],
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=2),
        ),
    )
    assert tuner.fit().errors == []
    units = histories.units[0]
    assert same_numbers(shared(units, expected[1]), expected[1])
    assert len({result["pid"] for result in units}) == 2


class Mortal(TuneTrainable):
    """Kills its own process once, before its third unit."""

    def step(self) -> dict[str, Any]:
        marker = Path(self.config["_die_once"])
        if self.iteration == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step()
