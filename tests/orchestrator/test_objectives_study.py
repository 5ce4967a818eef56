"""A whole study over accuracy, parameters and seconds: real trials, a front with a known end, a lost database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.synthetic import write_images
from orchestrator import Study
from orchestrator.commands.check import check_study
from orchestrator.record.journal import Journal
from orchestrator.record.records import TrialRecord, fold
from orchestrator.report.page import REPORT
from orchestrator.results.study_results import Results

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TRIALS = 14
COSTS = ("trainable_parameters", "device_seconds")
RECORDED = ("cost/trainable_parameters", "cost/total_seconds")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from orchestrator.cluster.connection import connect

    with connect(cpus=1, dashboard=False):
        yield


@pytest.fixture(scope="module")
def make(network: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Study]:
    """The study in a storage folder."""
    images = write_images(tmp_path_factory.mktemp("images"))

    def study(storage: Path) -> Study:
        return Study(
            name="shapes",
            data={"root": str(images), "id": ["bright", "dim"], "ood": ["inverted"]},
            model={"name": network("vit")},
            strategies=["linear_probe", "full", "bitfit"],
            search={
                "trials": TRIALS, "epochs": 1, "scheduler": "none", "seed": 3, "batch_size": 32,
                "objectives": ["id_val", *COSTS],
            },
            confirm={"seeds": 1},
            diagnostics={"measure": [], "plasticity": False},
            resources={"concurrent": 1, "channels_last": False},
            storage=str(storage),
        )  # fmt: skip

    return study


@pytest.fixture(scope="module")
def first(make: Callable[[Path], Study], tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Results]:
    study = make(tmp_path_factory.mktemp("storage"))
    return study, study.run(progress=False)


def scores(record: TrialRecord) -> tuple[float, ...]:
    return record.metrics["best/val/acc"], *(-record.metrics[name] for name in RECORDED)


def test_the_front_is_that_of_the_confirmed_trials(first: tuple[Study, Results]) -> None:
    study, results = first
    confirmed = {r.config_hash: scores(r) for r in results.records if r.role == "confirm"}
    assert 3 < len(confirmed) <= 6, "the best of each entry, and the search's front"
    expected = {
        key
        for key, mine in confirmed.items()
        if not any(
            other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in confirmed.values()
        )
    }
    table = results.front()
    assert set(table["config_hash"]) == set(confirmed)
    assert set(table[table["on_front"]]["config_hash"]) == expected
    cheapest = table.sort_values("trainable_parameters").iloc[0]
    assert cheapest["label"] == "linear_probe"
    assert cheapest["on_front"], "no other entry trains so few parameters"
    parameters = dict(zip(table["label"], table["trainable_parameters"], strict=True))
    assert parameters["linear_probe"] < parameters["bitfit"] < parameters["full"]
    assert "<h2>Accuracy and cost</h2>" in (study.folder / REPORT).read_text()


def test_the_check_finds_search_and_journal_in_agreement(first: tuple[Study, Results]) -> None:
    levels = {finding.what: finding.level for finding in check_study(first[0]).findings}
    assert levels["search"] == "ok"


def test_from_the_journal_alone_the_next_proposal_is_the_same(
    first: tuple[Study, Results], make: Callable[[Path], Study], tmp_path: Path
) -> None:
    """Seconds differ from run to run, but those of finished trials are in the journal."""
    study, results = first
    again = make(tmp_path)
    again.folder.mkdir(parents=True)
    ends = [e["seq"] for e in Journal.read(study.folder / "journal.jsonl") if e["kind"] == "trial_finished"]
    known = TRIALS - 2
    lines = (study.folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (again.folder / "journal.jsonl").write_bytes(b"".join(lines[: ends[known - 1] + 1]))
    assert not (again.folder / "optuna.db").exists()
    again.run(progress=False)
    before = [record for record in results.records if record.role == "search"]
    after = [r for r in fold(Journal.read(again.folder / "journal.jsonl")) if r.role == "search"]
    assert len(after) == len(before) == TRIALS
    assert [r.number for r in after] == list(range(TRIALS))
    assert [scores(r) for r in after[:known]] == [scores(r) for r in before[:known]]
    # The sampler learned from twelve trials and three objectives; what it proposes after this depends on new seconds.
    assert identity(after[known]) == identity(before[known])
    assert after[known].metrics["best/val/acc"] == before[known].metrics["best/val/acc"]


def identity(record: TrialRecord) -> tuple[Any, ...]:
    return record.label, dict(record.hparams), dict(record.search_values), record.config_hash
