"""Everything that runs inside one trial.

The public files of this folder are the strategies; the folder is the registry.

The packages are layers, each importing only those before it: `specs`, `storage`, `demo`, `models`, `data`, `tasks`,
`diagnostics`, `engine`, and the strategies at the root. Nothing here imports ray, mlflow, optuna or the orchestrator,
with one exception: `engine/tune_trainable.py` is the `ray.tune.Trainable`. So the engine also runs where only torch and
timm are installed.
"""

from __future__ import annotations

from typing import Any

from trainables.engine.registry import strategies, strategy_class

__all__ = ["strategies", "strategy_class", "trainable"]


def trainable(name: str) -> type[Any]:
    """The `ray.tune.Trainable` class of one strategy, for a `tune.Tuner` of your own.

    Its config holds `shared` (`trainables.specs.trial_spec.SharedTrialSettings`, also under its former name `task`),
    `hparams` (fields of the strategy's `Config`) and `seed`.

    Raises:
        ValueError: an unknown name.
    """
    strategy_class(name)
    from trainables.engine.tune_trainable import trainable_class

    return trainable_class(name)
