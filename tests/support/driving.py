"""Tune's side of a search without Tune: asks a searcher for trials, makes up their results, tells it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher

from orchestrator.search.searcher import SearchSettings, StudySearcher
from orchestrator.search.stages import Entry
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings

EPOCHS = 4
BASE = {"linear_probe": 0.70, "full": 0.72, "lp_ft": 0.74, "daft": 0.78}
PEAK = {"lr_backbone": 1e-3, "lr_head": 0.5}

Config = dict[str, Any]
Outcome = Callable[[Config], dict[str, Any] | None]
"""Config → the final result; None = the trial raises."""

_ids = itertools.count()


def entries(*names: str) -> list[Entry]:
    """Plain entries of the named strategies."""
    return [Entry("", name) for name in names]


def task(**fields: Any) -> SharedTrialSettings:
    """A task; its store is never opened."""
    return SharedTrialSettings(
        **{"store": "/data/store", "model": ModelSpec(name="resnet18"), "epochs": EPOCHS, **fields}
    )


def url(folder: Path) -> str:
    """Optuna's SQLite storage in a folder."""
    return f"sqlite:///{folder}/optuna.db"


def searcher(
    folder: Path, names: tuple[str, ...] = ("linear_probe", "full", "lp_ft", "daft"), **fields: Any
) -> StudySearcher:
    """A searcher over plain entries."""
    settings: dict[str, Any] = {"entries": entries(*names), "task": task(), "trials": 12, "sampler": "tpe", "seed": 3}
    names_of_settings = {field.name for field in dataclasses.fields(SearchSettings)}
    settings |= {key: value for key, value in fields.items() if key in names_of_settings}
    rest = {key: value for key, value in fields.items() if key not in names_of_settings}
    return StudySearcher(SearchSettings(**settings), url=url(folder), **{"study_name": "s", **rest})


def accuracy(config: Config) -> float:
    """A smooth objective: a strategy's own level, less the squared distance of each rate from its peak in decades."""
    value = BASE[config["strategy"]]
    for key, peak in PEAK.items():
        rate = config["hparams"].get(key)
        if rate is not None:
            value -= 0.02 * math.log10(rate / peak) ** 2
    return max(value, 0.05)


def finished(config: Config) -> dict[str, Any]:
    """The final result of a trial that went well."""
    return {"val/acc": accuracy(config), "best/val/acc": accuracy(config), "unit": EPOCHS, "finished": True}


def drive(
    search: StudySearcher, outcome: Outcome = finished, concurrent: int = 1, stop_after: int | None = None
) -> list[Config]:
    """Run the searcher to its end with first-in-first-out workers; returns the configs in order of proposal.

    After `stop_after` proposals it returns at once, as a killed driver would: running trials are never completed.
    """
    proposed: list[Config] = []
    running: deque[tuple[str, Config]] = deque()
    while True:
        trial_id = f"trial{next(_ids)}"
        answer = search.suggest(trial_id) if len(running) < concurrent else None
        if answer == Searcher.FINISHED:
            assert not running, "finished while trials run"
            return proposed
        if isinstance(answer, dict):
            proposed.append(answer)
            running.append((trial_id, answer))
            if len(proposed) == stop_after:
                return proposed
            continue
        assert running, "the searcher waits for nothing"
        complete(search, *running.popleft(), outcome)


def complete(search: StudySearcher, trial_id: str, config: Config, outcome: Outcome = finished) -> None:
    """End one trial with the result of `outcome`."""
    result = outcome(config)
    search.on_trial_complete(trial_id, result, error=result is None)


def optuna_trials(folder: Path, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    """What Optuna's storage holds."""
    return optuna.load_study(study_name=name, storage=url(folder)).get_trials()


def shown(configs: list[Config]) -> Iterator[tuple[int, str, str, dict[str, Any], int]]:
    """What identifies a trial, for comparisons."""
    for config in configs:
        yield config["_number"], config["label"], config["role"], config["hparams"], config["seed"]
