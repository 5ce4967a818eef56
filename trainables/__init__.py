"""What runs inside one trial. The public files of this folder are the strategies; the folder is the registry.

Nothing here imports ray, mlflow, optuna or the orchestrator, with one exception: `engine/tune_trainable.py` is the
`ray.tune.Trainable`, so that the training core also runs where only torch and timm are installed.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainables.engine.contract import Strategy


def strategies() -> list[str]:
    """Names of all strategies, sorted: the public module files of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and not m.name.startswith("_"))


def strategy_class(name: str) -> type[Strategy]:
    """The `Strategy` of one name, imported on demand.

    Raises:
        ValueError: no such strategy; the message names the nearest ones.
    """
    known = strategies()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
        raise ValueError(f"A strategy is one of {', '.join(known)}, but got {name!r}. {hint}".rstrip())
    module = importlib.import_module(f"trainables.{name}")
    found: type[Strategy] = module.STRATEGY
    return found


def trainable(name: str) -> type[Any]:
    """The `ray.tune.Trainable` class of one strategy, ready for a `tune.Tuner` of your own.

    Its config holds `task` (see `trainables.specs.trial_spec.Task`), `hparams` (the strategy's `Config` fields) and
    `seed`. Raises ValueError for an unknown name.
    """
    strategy_class(name)
    from trainables.engine.tune_trainable import trainable_class

    return trainable_class(name)
