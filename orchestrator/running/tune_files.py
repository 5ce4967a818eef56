"""Tune keeps no files of its own while it runs a study.

Luthier asks Tune for nothing back: the journal says what happened, and trials keep their own checkpoints. What Tune
(Ray 2.60) writes beside that is a risk without a use: it ends the experiment where one of its folders in Ray's session
has gone or takes no more files, prints tracebacks of a copy that failed, leaves another snapshot at every start, and at
the end unpickles what it finds in its folder, whoever put it there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any


def nowhere() -> dict[str, Any]:
    """Arguments of `tune.RunConfig`: a storage in this process's memory, because Tune tries at once if it can write."""
    import pyarrow.fs
    from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

    handler = pyarrow.fs.FSSpecHandler(MemoryFileSystem())
    return {"storage_path": "/luthier", "storage_filesystem": pyarrow.fs.PyFileSystem(handler)}


@contextlib.contextmanager
def tune_keeps_no_files(errors: dict[str, str]) -> Iterator[None]:
    """Let Tune write neither snapshots nor a folder per trial, and read nothing back, for the length of a block.

    `Tuner.fit` returns no results then.

    Args:
        errors: trial id → text of its last failure; filled here, where Tune would have written `error.txt`.
    """
    import ray.tune.tune as tune_run
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    known = Trial.handle_error

    def named(trial: Any) -> None:
        """Tune's own makes the folder, too."""
        trial.relative_logdir = trial.storage.trial_dir_name = trial._generate_dirname()

    def failed(trial: Any, exc: BaseException | None = None) -> None:
        errors[trial.trial_id] = str(exc)
        known(trial, exc)

    with contextlib.ExitStack() as replaced:
        for owner, name, value in (
            (TuneController, "checkpoint", lambda *_, **__: None),
            (Trial, "local_path", None),  # a trial without a folder writes no error into it
            (Trial, "init_local_path", named),
            (Trial, "handle_error", failed),
            (tune_run, "ExperimentAnalysis", lambda **_: SimpleNamespace(trials=[])),
        ):
            replaced.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)
        yield
