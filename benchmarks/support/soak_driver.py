"""Driver of a soak (`luthier run` or plain Ray Tune) that records how long callbacks block Tune's loop.

    python -m benchmarks.support.soak_driver luthier|plain FOLDER

While a callback of the record or of the tracker runs, no trial of the study gets its next unit. `FOLDER/stalls` gets a
line, in seconds, whenever one took longer than all before it.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STALLS = "stalls"


class Stopwatch:
    """Times methods and writes each new maximum to disk, since the driver may be killed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._longest = 0.0

    def on(self, owner: type[Any], *names: str) -> None:
        """Measure these methods of a class from now on."""
        for name in names:
            setattr(owner, name, self._measured(getattr(owner, name)))

    def _measured(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._note(time.perf_counter() - began, method.__name__)

        return timed

    def _note(self, seconds: float, name: str) -> None:
        if seconds > self._longest:
            self._longest = seconds
            with self._file.open("a") as file:
                file.write(f"{seconds:.4f} {name}\n")


HOOKS = ("on_trial_start", "on_trial_result", "on_trial_complete", "on_trial_recover", "on_trial_error")


def luthier(folder: Path, watch: Stopwatch) -> None:
    """`luthier run FOLDER/study.yaml`."""
    from orchestrator.cli import app
    from orchestrator.record.journal import Journal
    from orchestrator.running.journal_callback import RecordCallback

    watch.on(RecordCallback, *HOOKS)
    watch.on(Journal, "append")
    app(["run", str(folder / "study.yaml"), "--no-progress"])


def plain(folder: Path, watch: Stopwatch) -> None:
    """The study of `benchmarks.support.soak_plain`."""
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    from benchmarks.support.soak_plain import run

    watch.on(MLflowLoggerCallback, "setup", "log_trial_start", "log_trial_result", "log_trial_end")
    sys.exit(run(folder))


if __name__ == "__main__":
    study_folder = Path(sys.argv[2])
    {"luthier": luthier, "plain": plain}[sys.argv[1]](study_folder, Stopwatch(study_folder / STALLS))
