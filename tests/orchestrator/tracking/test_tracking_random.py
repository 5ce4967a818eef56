"""Random faults of a server and its followers in random order: in the end it has the journal's contents, once."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.journal import Journal
from orchestrator.tracking.mlflow_internals import dispose_engine
from orchestrator.tracking.projection import DeliveredItems
from orchestrator.tracking.writer import MlflowWriter
from tests.support.tracking import SPEC, contents, follower, suggest

CALLS = (
    "create_run", "log_batch", "log_inputs", "log_artifacts", "log_artifact", "set_terminated", "update_run",
    "search_runs", "get_experiment_by_name", "get_metric_history",
)  # fmt: skip


class Killed(BaseException):
    """Ends a delivery, as a kill ends its process."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty tracking database; making one takes seconds."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowWriter(f"sqlite:///{path}", "pets", "none")
    return path


def events(generator: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """A study of three trials in three runs, of which the first two are killed or interrupted."""
    done = dict.fromkeys(range(3), 0)
    ended = set[int]()
    for part in range(3):
        last = part == 2
        yield "study_started", {"study": "pets", "spec": SPEC, "dataset_digest": "d" * 64}
        running = {number: f"{number}-{part}" for number in done if number not in ended}
        for number, name in running.items():
            yield "suggest", {"trial_id": name, "number": number}
            yield "trial_started", {"trial_id": name, "node": None, "pid": None}
        for _ in range(4 if last else generator.randrange(4)):
            for number, name in running.items():  # now and then a unit is reported again
                done[number] = unit = max(1, done[number] + (generator.random() < 0.9))
                yield (
                    "result",
                    {"trial_id": name, "unit": unit, "metrics": {"val/acc": unit / 9, "train/loss": 1 / unit}},
                )
        for number, name in running.items():
            if last or generator.random() < 0.2:
                ended.add(number)
                yield "trial_finished", {"trial_id": name, "state": generator.choice(["complete", "pruned"])}
            else:
                reason = generator.choice(["interrupted", "infra"])
                yield "trial_failed", {"trial_id": name, "reason": reason, "error": "E"}
        if last or generator.random() < 0.5:
            yield "study_finished", {"state": "complete" if last else "interrupted"}


class Weather:
    """What happens to the calls of MLflow's client."""

    def __init__(self, generator: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
        from mlflow import MlflowClient

        self.storm = 0.0
        self._generator = generator
        for name in CALLS:
            monkeypatch.setattr(MlflowClient, name, self._wrapped(getattr(MlflowClient, name)))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        from mlflow.exceptions import MlflowException

        def call(*args: Any, **kwargs: Any) -> Any:
            fault = self._generator.choice(("refused", "lost", "500", "killed", "killed after"))
            if self._generator.random() >= self.storm:
                fault = ""
            if fault == "refused":
                raise ConnectionError("refused before the server did anything")
            if fault == "500":
                raise MlflowException("500")
            if fault == "killed":
                raise Killed
            result = real(*args, **kwargs)
            if fault == "lost":
                raise ConnectionError("the answer was lost after the server did it")
            if fault == "killed after":
                raise Killed
            return result

        return call


class World:
    """A journal, a server on one SQLite file, and those who deliver the one to the other."""

    def __init__(self, folder: Path, template: Path, generator: random.Random) -> None:
        self.journal, self.file = folder / "journal.jsonl", folder / "mlflow.db"
        self.restored = False
        self.deleted = set[str]()
        self._template = template
        self._generator = generator
        self.empty()

    def empty(self) -> None:
        """A server that starts again without its data."""
        fresh = self.file.with_name("fresh.db")
        shutil.copy(self._template, fresh)
        fresh.rename(self.file)
        self.deleted.clear()

    def delete_run(self) -> None:
        """Delete the run of a trial."""
        client, experiment = self._experiment()
        runs = client.search_runs([experiment.experiment_id], "tags.`luthier.kind` = 'trial'")
        if runs:
            run = self._generator.choice(runs)
            client.delete_run(run.info.run_id)
            self.deleted.add(run.info.run_name)

    def delete_experiment(self) -> None:
        """Delete the experiment, deliver in vain, and restore it with all its runs.

        Runs that were deleted before lack what was delivered meanwhile.
        """
        client, experiment = self._experiment()
        client.delete_experiment(experiment.experiment_id)
        self.deliver()
        client.restore_experiment(experiment.experiment_id)
        self.restored |= bool(self.deleted)
        self.deleted.clear()

    def forget(self) -> None:
        """The position is lost."""
        Path(f"{self.journal}.mlflow.json").unlink(missing_ok=True)

    def deliver(self, sync: bool = False, verify: bool = False, seconds: float = 0.2) -> int:
        """Follow the journal for a moment, as the driver does or as `luthier sync` does."""
        options: dict[str, Any] = {"poll_s": 0.002, "replay": verify}
        if sync:
            options |= {"delivered": DeliveredItems(), "is_abandoned": lambda: True}
        following = follower(self.journal, self.file, **options)
        with contextlib.suppress(Killed):
            return following.finish(seconds, seconds)
        return following.backlog

    def _experiment(self) -> tuple[Any, Any]:
        from mlflow import MlflowClient

        dispose_engine(f"sqlite:///{self.file}")
        client = MlflowClient(f"sqlite:///{self.file}")
        return client, client.get_experiment_by_name("pets")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_p11_p12_p15_whatever_happens_the_server_ends_with_the_contents_of_the_journal(
    seed: int, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(seed)
    world = World(tmp_path, template, generator)
    weather = Weather(generator, monkeypatch)
    happenings: list[Callable[[], object]] = [
        world.empty, world.delete_run, world.delete_experiment, world.forget,
        lambda: world.deliver(sync=True), lambda: world.deliver(sync=True, verify=True),
    ]  # fmt: skip
    with Journal(world.journal) as journal:
        for kind, fields in events(generator):
            if kind == "suggest":
                suggest(journal, **fields)
            else:
                journal.append(kind, **fields)
            if generator.random() < 0.3:
                weather.storm = generator.choice((0.0, 0.1, 0.5))
                world.deliver()
                weather.storm = 0.0
                if generator.random() < 0.4:
                    generator.choice(happenings)()
    assert world.deliver(sync=True, verify=world.restored, seconds=60) == 0
    stored = contents(world.file)
    assert world.deliver(sync=True, verify=True, seconds=60) == 0
    assert contents(world.file) == stored
    shutil.copy(template, tmp_path / "straight.db")
    world.file = tmp_path / "straight.db"
    world.forget()
    assert world.deliver(seconds=60) == 0
    expected = contents(world.file)
    for part in ("runs", "metrics", "params", "tags"):
        assert stored[part] == [row for row in expected[part] if row[0] not in world.deleted], part
