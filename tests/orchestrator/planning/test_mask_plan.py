"""Plans of studies on pictures with masks: what `luthier data check` says is said before anything is trained, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.commands.exit_status import OK, PREFLIGHT
from orchestrator.errors import PreflightError
from orchestrator.ingest.check import check
from orchestrator.ingest.errors import DataError
from orchestrator.ingest.pipeline import ingest
from orchestrator.planning.view import source_request
from orchestrator.study import Study
from orchestrator.study_file.load import load_study
from orchestrator.study_file.schema import StudySpec
from tests.support.masked import (
    write_cityscapes,
    write_colours,
    write_domains,
    write_names,
    write_pairs,
    write_sizes,
    write_voc,
    write_voids,
)

StudyOf = Callable[..., Study]


@pytest.fixture
def study(tmp_path: Path, network: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> StudyOf:
    """A study on the data of a folder; keyword arguments are keys of `data`, `task` excepted."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))

    def make(root: Path, task: str | None = "segmentation", **data: Any) -> Study:
        fields: dict[str, Any] = {
            "name": "scenes",
            "data": {"root": str(root), "image_size": 32, **data},
            "model": {"name": network("vit")},
            "strategies": ["full"],
            "search": {"trials": 1, "epochs": 1},
            "storage": str(tmp_path / "studies"),
        }
        return Study(**fields) if task is None else Study(task=task, **fields)

    return make


def test_m09_a_plan_says_pixels_void_masks_and_missing_classes(study: StudyOf, tmp_path: Path) -> None:
    plan = study(write_voids(tmp_path / "data")).plan()
    assert plan.splits == {"train": 9, "val": 3, "test": 3}
    assert plan.masks == (
        "Pairs of a picture and its mask: images/* with masks/*.",
        "1 mask has no labelled pixel: 'train/masks/8.png'.",
        "Pixels of train: 0 6,528, 1 1,152, 2 512; ignored 1,024.",
        "Pixels of val: 0 2,640, 1 432; ignored 0.",
        "Pixels of test: 0 2,448, 1 432, 2 192; ignored 0.",
        "Warning: val lacks pixels of 2: its numbers are over the other classes.",
    )
    assert set(plan.masks) <= set(plan.lines())


def test_m10_sizes_and_domains(study: StudyOf, tmp_path: Path) -> None:
    plan = study(write_domains(tmp_path / "data"), id=["photo"], ood=["sketch"]).plan()
    assert plan.splits == {"train": 4, "val": 1, "test": 1, "ood/sketch": 6}
    assert "Pixels of ood/sketch: 0 15,493, 1 600; ignored 0." in plan.masks
    # Whole pictures and masks: 4 bytes a pixel, besides the records of the trials.
    larger = study(write_domains(tmp_path / "data"), id=["photo"], ood=["sketch"], image_size=64).plan()
    assert larger.disk_bytes == plan.disk_bytes


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda root: write_voc(root), "4 pictures in no list are not used."),
        (lambda root: write_cityscapes(root), "2 pictures of the split test left out"),
        (lambda root: write_names(root, "suffix"), "Pairs are made by name without '_mask' of masks."),
        (lambda root: write_names(root, "one_folder"), "told by their names (*_L)"),
        (lambda root: write_colours(root), "The values of the masks have the classes of labelmap.txt."),
        (lambda root: write_sizes(root, "turned"), "2 pictures turned upright"),
    ],
)
def test_what_is_decided_is_said(study: StudyOf, tmp_path: Path, write: Callable[[Path], Path], words: str) -> None:
    assert words in " ".join(study(write(tmp_path / "data")).plan().masks)


@pytest.mark.parametrize(
    "write",
    [
        lambda root: write_pairs(root, values=(0, 255)),
        lambda root: write_pairs(root, values=(0, 1, 2), ending="jpg", quality=75),
        lambda root: write_colours(root, label_file=False),
        lambda root: write_colours(root, stray=5),
        lambda root: write_sizes(root, "half"),
        lambda root: write_sizes(root, "two_more"),
        lambda root: write_sizes(root, "as_stored"),
    ],
)
def test_check_plan_and_run_name_a_problem_alike(study: StudyOf, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    made = study(write(tmp_path / "data"))
    (problem,) = check(tmp_path / "data", workers=1).problems
    with pytest.raises(PreflightError) as planned:
        made.plan()
    assert [str(each) for each in planned.value.problems] == [f"data: {problem}"]
    with pytest.raises(DataError) as read:
        ingest(source_request(made.spec), tmp_path / "stores", workers=1)
    assert str(read.value) == problem
    assert not (tmp_path / "stores").exists()


def test_declared_values_are_those_of_the_study(study: StudyOf, tmp_path: Path) -> None:
    made = study(write_pairs(tmp_path / "data", values=(0, 255)), labels={"background": 0, "object": 255})
    plan = made.plan()
    assert plan.classes == 2
    assert any(line.startswith("Pixels of train: background ") for line in plan.masks)
    with pytest.raises(PreflightError, match=r"A value of masks is one class, but in data.labels 0 is both a and b"):
        study(tmp_path / "data", labels={"a": 0, "b": [0, 255]}).plan()


def test_a_label_file_counts_from_the_study_file(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    fields = {"name": "a", "task": "segmentation", "model": {"name": "resnet18"}, "strategies": ["full"]}
    for labels, read in (("names.csv", str(tmp_path / "names.csv")), ("cityscapes", "cityscapes")):
        # JSON is YAML.
        file.write_text(json.dumps({**fields, "data": {"root": "data", "labels": labels}}))
        assert load_study(file).data.labels == read


class TestTheTaskIsNotSaid:
    """Rule 6 of pictures with masks: they are recognised without the task."""

    @pytest.mark.parametrize(
        "write", [write_voc, write_cityscapes, write_voids, write_domains, lambda root: write_names(root, "one_folder")]
    )
    def test_a_study(self, study: StudyOf, tmp_path: Path, write: Callable[[Path], Path]) -> None:
        with pytest.raises(PreflightError, match=r"holds pictures with masks \(.*\). Set task: segmentation in the"):
            study(write(tmp_path / "data"), task=None).plan()

    def test_init_proposes_it(self, tmp_path: Path) -> None:
        for name, write in (("voc", write_voc), ("sizes", write_domains)):
            file = tmp_path / f"{name}.yaml"
            arguments = ["init", str(write(tmp_path / name)), "--model", "test_resnet", "-o", str(file)]
            assert CliRunner().invoke(cli.app, arguments).exit_code == OK
            assert "task: segmentation\n" in file.read_text()
            spec = load_study(file)
            assert spec.task == "segmentation"
        assert (spec.data.id, spec.data.ood) == (["photo"], ["sketch"])

    def test_plan_ends_with_4(self, study: StudyOf, tmp_path: Path) -> None:
        made = study(write_voc(tmp_path / "data"), task=None)
        file = tmp_path / "study.yaml"
        file.write_text(json.dumps(made.spec.model_dump(mode="json", exclude_unset=True)))
        result = CliRunner().invoke(cli.app, ["plan", str(file)])
        assert result.exit_code == PREFLIGHT
        assert "Set task: segmentation" in result.stderr

    def test_folders_of_classes_are_not_taken_for_masks(self, tmp_path: Path) -> None:
        """A class called masks has no partners by name; neither have augmented copies."""
        from tests.orchestrator.ingest.pictures import fill

        fill(tmp_path / "data", {"images": 6, "masks": 6})
        assert check(tmp_path / "data", workers=1).task == "classification"
        numbers = fill(tmp_path / "copies", {"cat": 4, "dog": 4})
        for path in list((tmp_path / "copies").rglob("*.png")):
            fill(path.parent, {"": 1}, first=numbers)
            (path.parent / f"{numbers:04d}.png").rename(path.with_name(f"{path.stem}_flipped.png"))
            numbers += 1
        assert check(tmp_path / "copies", workers=1).task == "classification"


def test_spec_has_the_task() -> None:
    fields = {"name": "a", "data": {"root": "x"}, "model": {"name": "resnet18"}, "strategies": ["full"]}
    assert StudySpec.from_fields(fields).task == "classification"
