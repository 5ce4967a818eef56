"""Outages of a real tracking server: training does not wait for it, and in the end it has every point once."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.journal import Journal
from tests.support.outages import Server, proxy
from tests.support.tracking import (
    SPEC,
    FollowerThread,
    contents,
    follower,
    suggest,
    tracking_process,
    wait_until,
)

pytestmark = pytest.mark.server

TRIALS, UNITS = 4, 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    try:
        started.start()
        yield started
    finally:
        started.kill()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl") as opened:
        yield opened


def train(journal: Journal, between: Callable[[int], object] = lambda unit: None) -> float:
    """Record a study of `TRIALS` trials that run side by side; returns the longest time of an append."""
    longest = 0.0

    def append(kind: str, **fields: Any) -> None:
        nonlocal longest
        start = time.perf_counter()
        journal.append(kind, **fields)
        longest = max(longest, time.perf_counter() - start)

    append("study_started", study="pets", spec=SPEC, dataset_digest="d" * 64)
    for number in range(TRIALS):
        suggest(journal, f"t{number}", number)
        append("trial_started", trial_id=f"t{number}", node=None, pid=None)
    for unit in range(1, UNITS + 1):
        between(unit)
        for number in range(TRIALS):
            metrics = {"val/acc": unit / 20 + number / 100, "train/loss": 1 / unit, "ood/mean/acc": unit / 30}
            append("result", trial_id=f"t{number}", unit=unit, metrics=metrics)
    for number in range(TRIALS):
        append("trial_finished", trial_id=f"t{number}", state="complete")
    append("study_finished", state="complete")
    return longest


def expected(journal: Journal, template: Path, folder: Path, experiment: str) -> dict[str, list[Any]]:
    """Contents of a server that never fails."""
    straight = folder / "straight.db"
    copy = folder / "straight.jsonl"
    shutil.copy(template, straight)
    shutil.copy(journal.path, copy)
    assert follower(copy, straight, experiment=experiment).finish(60) == 0
    return without_inputs(contents(straight, experiment))


def without_inputs(stored: dict[str, list[Any]]) -> dict[str, list[Any]]:
    del stored["inputs"]
    return stored


def check(server: Server, journal: Journal, template: Path, folder: Path, experiment: str) -> None:
    """Every run, point, parameter and tag once, and nothing RUNNING."""
    stored = without_inputs(contents(server.database, experiment))
    assert stored == expected(journal, template, folder, experiment)
    assert len(stored["runs"]) == TRIALS + 1
    assert len([row for row in stored["metrics"] if row[1] == "val/acc"]) == TRIALS * UNITS
    assert "RUNNING" not in [run[1] for run in stored["runs"]]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@pytest.mark.usefixtures("impatient")
def test_p13_a_stopped_server_costs_no_unit_more_than_a_second_and_gets_everything_once(
    server: Server, journal: Journal, template: Path, tmp_path: Path
) -> None:
    """Requests that it received before it stopped are executed when it continues, also those that create runs."""
    try:
        with tracking_process(journal.path, server.uri, experiment="stopped") as following:
            journal.append("study_started", study="pets", spec=SPEC, dataset_digest="d" * 64)
            wait_until(lambda: following.delivered_offset > 0)
            server.signal(signal.SIGSTOP)
            assert train(journal) < 1.0
            wait_until(lambda: following.problem is not None)
            server.signal(signal.SIGCONT)
            wait_until(lambda: following.backlog == 0)
            server.signal(signal.SIGSTOP)
            journal.append("study_finished", state="complete")
            assert following.close(30, 1) == 1
    finally:
        server.signal(signal.SIGCONT)
    assert follower(journal.path, server.uri, experiment="stopped").finish(60) == 0
    check(server, journal, template, tmp_path, "stopped")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("experiment", ["late", "late-at-the-end"])
def test_p13_a_run_that_a_server_makes_late_is_not_there_twice(
    experiment: str, server: Server, journal: Journal, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    create_run = MlflowClient.create_run
    late = list[tuple[Any, ...]]()

    def create(self: MlflowClient, *args: Any) -> Any:
        if not late:
            late.append(args)
            raise TimeoutError("no answer")
        created = create_run(self, *args)
        if len(late) == 1:  # now the server executes the first request
            late.append(args)
            create_run(self, *late[0])
        return created

    monkeypatch.setattr(MlflowClient, "create_run", create)
    following = FollowerThread(follower(journal.path, server.uri, experiment=experiment))
    if experiment == "late":
        following.start()
        train(journal)
        wait_until(lambda: len(late) == 2)
    else:  # both requests in the last moments of the study
        train(journal)
        following.start()
    assert following.close(60) == 0
    assert len(late) == 2
    check(server, journal, template, tmp_path, experiment)


KINDS = ("429", "500", "502", "503", "html", "rst", "lost", "slow", "401", "403")


@pytest.mark.parametrize("seed", [0, 1])
def test_p14_n1_refusals_resets_lost_answers_and_delays_lose_and_double_nothing(
    seed: int, server: Server, journal: Journal, template: Path, tmp_path: Path
) -> None:
    generator = random.Random(seed)
    experiment = f"proxy-{seed}"
    faults = {number: generator.choice(KINDS) for number in range(400) if generator.random() < 0.4}
    with (
        proxy(server.port, faults) as (uri, seen),
        tracking_process(journal.path, uri, experiment=experiment, poll_s=0.005) as following,
    ):
        tick = threading.Event()
        assert train(journal, lambda unit: tick.wait(0.05)) < 1.0
        assert following.close(120, 120) == 0
    assert len(set(KINDS) & set(seen)) >= 6, seen
    check(server, journal, template, tmp_path, experiment)


def test_p11_a_killed_server_that_comes_back_gets_everything_once(
    server: Server, journal: Journal, template: Path, tmp_path: Path
) -> None:
    with tracking_process(journal.path, server.uri, experiment="killed") as following:
        killing = threading.Timer(0.01, server.kill)

        def between(unit: int) -> None:
            if unit == 4:
                wait_until(lambda: following.backlog == 0)
                killing.start()  # while units are in flight

        assert train(journal, between) < 1.0
        wait_until(lambda: following.problem is not None)
        assert following.backlog > 0
        killing.join()
        server.start()
        assert following.close(60, 30) == 0
    check(server, journal, template, tmp_path, "killed")
