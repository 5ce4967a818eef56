"""Optuna's storage of a study: opened, checked, and made again from the journal where that knows better.

Two Optuna studies share one database. `<name>` holds the trials that the sampler may learn from; `<name>/given` holds
those whose configuration was given to it: folds, confirmations, single points, and (beside a learning sampler) the
papers' sweeps.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.search.replay import History, Replay, set_aside
from orchestrator.search.space import SearchError

log = logging.getLogger("luthier")

LOCK_SECONDS = 30
"""How long SQLite waits for somebody else's transaction."""


def _storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's storage; SQLite with a write-ahead log, so that a commit (some twenty per trial) does not wait for the
    disk and a dashboard may read meanwhile. Killing the driver loses nothing; a power cut may lose the last trials,
    never the file, and what the journal knows of them is joined again by their numbers."""
    if not url.startswith("sqlite"):
        return optuna.storages.RDBStorage(url)
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})

    def prepare(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(storage.engine, "connect", prepare)
    storage.engine.dispose()  # the constructor's connection was opened without
    return storage


class OptunaStorage:
    """Both studies, open.

    Args:
        url: Optuna storage, e.g. `sqlite:////abs/study/optuna.db`.
        name: the Optuna study.
        maximise: per objective, whether higher is better.
        contents: what the study is about; a study of this name with other contents is an error.
        replay: the journal's side; where the storage disagrees with it, or cannot be read, it is made again.
        changed: a person allowed a change of the contents: then it is made again, too.

    Raises:
        SearchError: a study of that name exists with other directions or contents, or the storage is locked.
    """

    drawn: optuna.Study
    given: optuna.Study

    def __init__(
        self,
        url: str,
        name: str,
        maximise: Sequence[bool],
        contents: Mapping[str, Any],
        replay: Replay | None = None,
        changed: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # what a person has to know, Luthier says itself
        self.url, self._name = url, name
        self._directions = [StudyDirection.MAXIMIZE if m else StudyDirection.MINIMIZE for m in maximise]
        self._contents = json.loads(json.dumps(contents))
        self._database: optuna.storages.RDBStorage | None = None
        problem = self._connect(replay, changed)
        if problem is not None and replay is not None:
            log.log(*problem)
            self.close()
            set_aside(Path(url.removeprefix("sqlite:///")))
            self._connect(None, False)
            replay.fill(self.drawn, self.given)

    def interrupt(self, study: optuna.Study, number: int) -> None:
        """End a running trial that nobody runs any more; a later one continues it."""
        trial = study.get_trials(deepcopy=False)[number]
        study._storage.set_trial_user_attr(trial._trial_id, "interrupted", True)
        study.tell(number, state=optuna.trial.TrialState.FAIL)

    def close(self) -> None:
        """Let go of the database; SQLite then folds its write-ahead log into its one file."""
        if self._database is not None:
            self._database.remove_session()
            self._database.engine.dispose()

    def _connect(self, replay: Replay | None, changed: bool) -> tuple[int, str] | None:
        """Open both studies. What is wrong with them, as level and line of the log, if `replay` can mend it."""
        try:
            self._database = _storage(self.url)
            cached = optuna.storages.get_storage(self._database)
            self.drawn, self.given = (self._open(cached, name) for name in (self._name, f"{self._name}/given"))
            if replay is None or replay.history.agrees(
                *(s.get_trials(deepcopy=False) for s in (self.drawn, self.given))
            ):
                return None
            return logging.INFO, f"{self.url} is made again from the journal, which knows better."
        except SearchError as error:
            if not changed:
                raise
            return logging.WARNING, f"{self.url} is made again for the changed study. {error}"
        except (SQLAlchemyError, StorageInternalError, RuntimeError, sqlite3.Error) as error:
            if "locked" in f"{error} {error.__cause__}":
                raise SearchError(
                    f"Optuna's storage is written by one process at a time, but another one holds {self.url}. Close "
                    "the program that writes to it, such as another study or a database browser, and run again."
                ) from error
            if replay is None:
                raise
            reason = str(error).partition("\n")[0]
            return logging.WARNING, f"{self.url} cannot be read ({reason}): it is made again from the journal."

    def _open(self, storage: optuna.storages.BaseStorage, name: str) -> optuna.Study:
        directions, contents = self._directions, self._contents
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, directions=directions)
        if study.directions != directions:
            found, asked = (", ".join(d.name.lower() for d in ds) for ds in (study.directions, directions))
            raise SearchError(
                f"The Optuna study {name!r} at {self.url} has the directions {found}, but this study needs {asked}. "
                "Give the study another name."
            )
        before = study.user_attrs.get("luthier")
        if before is None and study.get_trials(deepcopy=False):
            raise SearchError(
                f"The Optuna study {name!r} at {self.url} was not made by Luthier. Give the study another name."
            )
        if before is None:
            study.set_user_attr("luthier", contents)
        elif before != contents:
            differ = sorted(k for k in {*before, *contents} if before.get(k) != contents.get(k))
            raise SearchError(
                f"The Optuna study {name!r} at {self.url} was made for something else: {', '.join(differ)} "
                f"{'differs' if len(differ) == 1 else 'differ'}. Its trials cannot be compared with new ones. Give the "
                "study another name, or put the old values back."
            )
        return study


def disagreement(url: str, name: str, history: History) -> str | None:
    """What is wrong with the storage of a study, seen from its journal; None = nothing. May write to the database."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = _storage(url)
        studies = [optuna.load_study(study_name=found, storage=storage) for found in (name, f"{name}/given")]
        agrees = history.agrees(*(study.get_trials(deepcopy=False) for study in studies))
        storage.engine.dispose()
    except (SQLAlchemyError, StorageInternalError, RuntimeError, KeyError, sqlite3.Error) as error:
        return f"cannot be read ({str(error).partition(chr(10))[0]})"
    return None if agrees else "does not agree with the journal"
