"""`luthier fsr` on a whole study: what it runs, that it repeats nothing, and the λ that a later search begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Study
from orchestrator.errors import StudyError
from orchestrator.fsr import IMAGES, SHIFT, estimates
from orchestrator.fsr_command import FsrReport, measure_fsr
from orchestrator.journal import Journal
from orchestrator.lambda_hint import lambda_hints
from tests.synthetic import write_images

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from orchestrator.cluster import connect

    with connect(cpus=2, dashboard=False):
        yield


@pytest.fixture(scope="module")
def make(network: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Study]:
    root, storage = write_images(tmp_path_factory.mktemp("images")), tmp_path_factory.mktemp("storage")

    def study(kind: str = "vit", **changes: Any) -> Study:
        fields: dict[str, Any] = {
            "name": "shapes",
            "data": {"root": str(root), "id": ["bright", "dim"], "ood": ["inverted", "noisy"], "train_fraction": 0.5},
            "model": {"name": network(kind)},
            "strategies": [{"name": "layernorm", "fixed": {"lr_backbone": 0.1, "lr_head": 3.0}}],
            "search": {"trials": 3, "epochs": 2, "scheduler": "none", "seed": 3, "batch_size": 8},
            "confirm": {"top_k": 0, "seeds": 0},
            "diagnostics": {"fsr_seeds": 2},
            "storage": str(storage),
        }
        return Study(**{**fields, **changes})

    return study


@pytest.fixture(scope="module")
def measured(make: Callable[..., Study]) -> tuple[Study, FsrReport]:
    study = make()
    return study, measure_fsr(study, progress=False)


def test_only_references_run_on_samples_of_the_right_size(measured: tuple[Study, FsrReport]) -> None:
    study, report = measured
    records = study.results().records
    assert {record.role for record in records} == {"reference"}
    assert all(record.state == "complete" for record in records)
    images = {record.sample: record.metric(IMAGES) for record in records}
    assert set(images) == {"0.25", "0.5", "1", "full"}
    assert images["full"] == 2 * (images["1"] or 0)
    assert images["1"] == pytest.approx(2 * (images["0.5"] or 0), abs=4)
    assert len(records) == 4 * 2
    assert {e.reference for e in report.found} == {"full", "extrapolated"}
    by_seed = {(r.sample, r.seed): r.metric(SHIFT) for r in records}
    ratios = [(by_seed["1", s] or 0) / (by_seed["full", s] or 1) for s in {r.seed for r in records}]
    assert report.found[0].value == pytest.approx(sum(ratios) / 2)


def test_a_second_call_trains_nothing_and_says_the_same(measured: tuple[Study, FsrReport]) -> None:
    study, report = measured
    before = len(study.results().records)
    again = measure_fsr(study, progress=False)
    assert len(study.results().records) == before
    assert again.to_dict() == report.to_dict()


def test_the_search_that_follows_begins_with_the_lambda_that_the_references_suggest(
    measured: tuple[Study, FsrReport], make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, report = measured
    monkeypatch.setattr("orchestrator.lambda_hint.suggested", lambda found: report.found[0])
    hints = lambda_hints(study.spec, study.folder)
    expected = round(min(max(report.found[0].lam, 0.0), 2.0), 3)
    assert hints == {"layernorm": {"lam": expected}}
    later = make(name="later", diagnostics={"fsr_from": "shapes"})
    records = [r for r in later.run(progress=False).records if r.role == "search"]
    assert [r.hparams["lam"] for r in records[:2]] == [1.0, expected]
    assert lambda_hints(make(name="fresh").spec, Path(study.spec.storage) / "fresh") == {}
    fixed = make(strategies=[{"name": "layernorm", "fixed": {"lam_choice": "sweep"}}])
    assert lambda_hints(fixed.spec, study.folder) == {}


def test_an_unknown_study_to_take_fsr_from(make: Callable[..., Study], tmp_path: Path) -> None:
    spec = make(diagnostics={"fsr_from": "nowhere"}).spec
    with pytest.raises(FileNotFoundError) as error:
        lambda_hints(spec, tmp_path / "shapes")
    assert str(error.value) == (
        "diagnostics.fsr_from is the name of a study in the same storage that has been run, but 'nowhere' has no "
        f"journal at {tmp_path / 'nowhere' / 'journal.jsonl'}. Run `luthier fsr` on it, or leave the key out."
    )


def test_references_follow_the_search_where_the_study_asks_for_them(make: Callable[..., Study]) -> None:
    study = make(name="whole", diagnostics={"fsr": ["full"], "fsr_seeds": 1})
    records = study.run(progress=False).records
    roles = [event["role"] for event in Journal.read(study.folder / "journal.jsonl") if "role" in event]
    assert roles == ["search"] * 3 + ["reference"] * 2
    (found,) = estimates(records)
    assert (found.reference, found.seeds) == ("full", 1)


def test_a_network_without_layer_norm(make: Callable[..., Study]) -> None:
    study = make(kind="cnn", name="cnn", strategies=["linear_probe"])
    with pytest.raises(StudyError, match=r"FSR is measured by tuning LayerNorms, but .* has none"):
        measure_fsr(study, progress=False)
    assert not (study.folder / "journal.jsonl").exists()
