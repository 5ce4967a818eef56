"""A new SQLite file for MLflow, complete from the moment that it has its name."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock


def ensure_tracking_file(file: Path) -> None:
    """Make MLflow's tables in a file that does not exist yet; does nothing if it does.

    MLflow's own way is dozens of migrations of the file in its place, unlocked: two studies that start together run
    them twice over each other, and a process that is killed among them leaves a file that no MLflow opens again. Here
    they run on a file beside it, which gets the name when it is whole; whoever comes second finds it there.

    Args:
        file: absolute path; its folder is made.
    """
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        draft = file.with_name(f".{file.name}.new")
        if not file.exists():
            draft.unlink(missing_ok=True)  # of a process that was killed here
            _migrate(draft)
            _publish(draft, file)


def _migrate(draft: Path) -> None:
    from mlflow.store.db import utils
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{draft}")
    try:
        utils._initialize_tables(engine)
    finally:
        engine.dispose()


def _publish(draft: Path, file: Path) -> None:
    try:
        os.link(draft, file)  # never over the file of an MLflow that was faster
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.rename(draft, file)
    draft.unlink(missing_ok=True)
