"""A tournament on two classes, 95 : 5: the constant classifier wins by accuracy, and not by balanced accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator import Study
from orchestrator.results.study_results import Results
from tests.support.imbalanced import write_imbalanced

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from orchestrator.cluster.connection import connect

    with connect(cpus=1, dashboard=False):
        yield


@pytest.fixture(scope="module")
def run(network: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    images = write_imbalanced(tmp_path_factory.mktemp("discs"))
    storage = tmp_path_factory.mktemp("storage")

    def results(name: str, metric: str | None, **sections: Any) -> Results:
        search = {"trials": 4, "epochs": 3, "grace": 1, "seed": 1, "batch_size": 40, "metric": metric}
        study = Study(
            name=name,
            data={"root": str(images), "id": ["plain"], "ood": ["inverted"]},
            model={"name": network("vit")},
            strategies=["linear_probe", "lp_ft"],
            search=search,
            confirm={"top_k": 1, "seeds": 1},
            diagnostics={"measure": [], "plasticity": False},
            resources={"concurrent": 1, "channels_last": False},
            storage=str(storage),
            **sections,
        )
        return study.run(progress=False)

    return results


def rare_predictions(results: Results) -> float:
    """Test images that the winner predicts to be of the rare class."""
    (confirmed,) = (record for record in results.records if record.role == "confirm")
    columns = confirmed.curves["per_class"]["columns"]
    rows = zip(columns["class"], columns["split"], columns["predicted"], strict=True)
    return next(float(count) for name, split, count in rows if (name, split) == ("rare", "test"))


def test_by_accuracy_the_constant_classifier_wins(run: Callable[..., Results]) -> None:
    results = run("plain", None)
    assert results.best().criterion == "best/val/acc"
    assert rare_predictions(results) == 0


def test_by_balanced_accuracy_it_does_not(run: Callable[..., Results]) -> None:
    results = run("balanced", "balanced_acc", loss={"class_weights": "balanced"})
    best = results.best()
    assert best.criterion == "best/val/balanced_acc"
    complete = [r for r in results.records if r.role == "search" and r.state == "complete"]
    (confirmed,) = (r for r in results.records if r.role == "confirm")
    assert confirmed.config_hash == max(complete, key=lambda r: r.metrics["best/val/balanced_acc"]).config_hash
    assert best.value == confirmed.metrics["best/val/balanced_acc"]
    assert rare_predictions(results) > 0
    table = results.leaderboard()
    assert table["test/balanced_acc"][0] > 0.6
    assert table["test/acc"][0] < 0.95
    for record in results.records:
        for unit in record.history:
            assert "val/balanced_acc" in unit
            assert "val/acc" not in unit
