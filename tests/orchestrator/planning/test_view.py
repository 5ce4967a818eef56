"""The view of a study: its default, its settings, and what a begun study keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import StudyError
from orchestrator.ingest.manifest import UNGROUPED_VERSION
from orchestrator.ingest.request import IngestRequest, scan
from orchestrator.planning.build import make_task
from orchestrator.planning.view import Choices, view_of
from orchestrator.record.journal import Journal
from orchestrator.study import Study
from tests.support.albums import album, split_of
from tests.support.exports import finished_study, pictures
from trainables.data.store import FORMAT, Store
from trainables.data.transforms import BatchTransform
from trainables.models.backbone import backbone_data_config, load_pretrained
from trainables.specs.short_hash import short_hash
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, ViewSettings

NETWORK = "resnet10t.c3_in1k"
"""Of 176 px, crop share 0.875, bicubic, ImageNet's mean and standard deviation."""


def write_pictures(root: Path, width: int, height: int, count: int = 4) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def study_of(root: Path, storage: Path, data: Mapping[str, Any] | None = None) -> Study:
    return Study(
        name="pets",
        data={"root": str(root), "image_size": 32, **(data or {})},
        model={"name": NETWORK, "pretrained": False},
        strategies=["full"],
        storage=str(storage),
    )


class TestDefault:
    @pytest.mark.parametrize(
        ("size", "crop_pct", "words"),
        [
            ((48, 36), 1.0, "pictures of 36 px are reduced to 32 px (bicubic), not cropped"),
            ((32, 32), 1.0, "pictures of 32 px are kept at 32 px, not cropped"),
            ((20, 24), 1.0, "pictures of 20 px are enlarged to 32 px (bicubic), not cropped"),
            ((176, 200), 1.0, "pictures of 176 px are reduced to 32 px (bicubic), not cropped"),
            ((177, 200), 0.875, "pictures of 177 px are reduced to 36 px (bicubic), cropped to 32 px"),
        ],
    )
    def test_small_pictures_are_not_cropped(
        self, size: tuple[int, int], crop_pct: float, words: str, tmp_path: Path
    ) -> None:
        study = study_of(write_pictures(tmp_path / "pets", *size), tmp_path)
        view = view_of(study.spec)
        assert view.config.crop_pct == crop_pct
        assert view.sentence() == f"View: {words}, mean 0.485 0.456 0.406, std 0.229 0.224 0.225."
        store = study.prepare()
        assert store.image_size == view.config.stored_size
        assert make_task(study.spec, store).view.crop_pct == (1.0 if crop_pct == 1 else None)

    def test_one_huge_picture_decides_nothing(self, tmp_path: Path) -> None:
        root = write_pictures(tmp_path / "pets", 40, 40, count=10)
        Image.new("RGB", (900, 900), "red").save(root / "cat" / "huge.png")
        assert view_of(study_of(root, tmp_path).spec).picture_side == 40

    def test_unreadable_pictures_are_not_measured(self, tmp_path: Path) -> None:
        root = write_pictures(tmp_path / "pets", 40, 40)
        for number in range(12):
            (root / "cat" / f"bad{number}.png").write_bytes(b"no picture")
        assert view_of(study_of(root, tmp_path).spec).picture_side == 40


class TestSettings:
    def test_they_reach_the_store_and_the_network(self, tmp_path: Path) -> None:
        data = {"crop_pct": 0.8, "interpolation": "nearest", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.5]}
        study = study_of(write_pictures(tmp_path / "pets", 60, 60), tmp_path, data)
        assert study.plan().view == (
            "View: pictures of 60 px are reduced to 40 px (nearest), cropped to 32 px, mean 0.5, std 0.25 0.25 0.5."
        )
        store = study.prepare()
        assert store.image_size == 40
        shared = make_task(study.spec, store)
        assert SharedTrialSettings.from_dict(json.loads(json.dumps(dataclasses.asdict(shared)))) == shared
        config = load_pretrained(shared.model, 32, view=shared.view).data_config
        assert (config.crop_pct, config.interpolation) == (0.8, "nearest")
        assert (config.mean, config.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.5))
        # The network is shared; its own configuration stays.
        assert load_pretrained(shared.model, 32).data_config.crop_pct == 0.875

    @pytest.mark.parametrize(
        ("field", "value"), [("crop_pct", 1.2), ("crop_pct", 0.1), ("interpolation", "cubic"), ("mean", [0.5]),
                             ("std", [0.0, 0.1, 0.1]), ("copies", "far")]
    )  # fmt: skip
    def test_other_values_are_refused(self, field: str, value: Any, tmp_path: Path) -> None:
        with pytest.raises(StudyError) as error:
            study_of(tmp_path, tmp_path, {field: value})
        assert f"data.{field}" in str(error.value)

    def test_weights_from_elsewhere_may_have_had_another_mean(self, tmp_path: Path) -> None:
        root = write_pictures(tmp_path / "pets", 32, 32)
        torch.save(load_pretrained(ModelSpec(name=NETWORK, pretrained=False)).module.state_dict(), tmp_path / "w.pth")
        fields = study_of(root, tmp_path).spec.model_dump()
        fields["model"]["weights"] = str(tmp_path / "w.pth")
        assert (
            Study(**fields)
            .plan()
            .view.endswith(
                f" Mean and std are those of timm's own weights of {NETWORK}; data.mean and data.std change them."
            )
        )


def begun(study: Study, **facts: Any) -> None:
    """Write the journal of a study that has a trial."""
    study.folder.mkdir(parents=True)
    with Journal(study.folder / "journal.jsonl") as journal:
        journal.append("study_started", study="pets", spec=study.spec.model_dump(mode="json"), **facts)
        journal.append("trial_suggested", trial_id="t0", number=0, strategy="full", label="full", hparams={}, seed=0)
        journal.append("trial_started", trial_id="t0")


class TestBegunStudies:
    def test_a_study_of_an_earlier_version_keeps_its_split_and_its_crop(self, tmp_path: Path) -> None:
        root = album(tmp_path / "album")
        view = backbone_data_config(ModelSpec(name=NETWORK, pretrained=False), 32)
        apart = study_of(root, tmp_path / "expected", {"copies": "apart", "crop_pct": view.crop_pct}).prepare()
        study = study_of(root, tmp_path / "studies")
        begun(study)
        store = study.prepare()
        assert store.digest == apart.digest
        assert split_of(store) == split_of(apart)
        assert store.image_size == 36
        assert make_task(study.spec, store).view == ViewSettings()
        plan = study.plan()
        assert plan.copies == "Copies: splits are drawn image by image (data.copies: apart)."
        assert "reduced to 36 px (bicubic), cropped to 32 px" in plan.view
        # A new study on the same data has other splits.
        assert split_of(study_of(root, tmp_path / "new").prepare()) != split_of(store)

    def test_its_store_has_the_name_that_the_earlier_version_gave_it(self, tmp_path: Path) -> None:
        root = album(tmp_path / "album")
        study = study_of(root, tmp_path / "studies")
        begun(study)
        source = scan(IngestRequest(source="folder", root=str(root)))
        fields = {
            "source": "folder", "id": (), "ood": (), "image_size": 36, "interpolation": "bicubic",
            "val_fraction": 0.15, "test_fraction": 0.15, "seed": 0, "label": None,
        }  # fmt: skip
        assert UNGROUPED_VERSION == 2
        name = short_hash([FORMAT, 2, source.digest, fields], digits=16)
        assert study.prepare().path.name == f"folder-{name}"

    def test_a_begun_study_keeps_what_it_has_decided(self, tmp_path: Path) -> None:
        study = study_of(write_pictures(tmp_path / "pets", 300, 300), tmp_path / "studies")
        begun(study, copies="near", view={"crop_pct": 1.0})
        assert view_of(study.spec, Choices("near", 1.0)).config.crop_pct == 1.0
        assert study.prepare().image_size == 32

    def test_without_a_trial_nothing_is_decided(self, tmp_path: Path) -> None:
        study = study_of(write_pictures(tmp_path / "pets", 40, 40), tmp_path / "studies")
        study.folder.mkdir(parents=True)
        with Journal(study.folder / "journal.jsonl") as journal:
            journal.append("study_started", study="pets", spec=study.spec.model_dump(mode="json"))
        assert study.prepare().image_size == 32


@pytest.mark.thorough
@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize(
    "data", [{}, {"crop_pct": 0.875}, {"crop_pct": 0.8, "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6]}]
)
@pytest.mark.parametrize("name", [NETWORK, "test_vit"])
def test_an_export_has_the_view_of_the_study(name: str, data: dict[str, Any], tmp_path: Path) -> None:
    """X01: store, `config.json` and timm's own transform agree in every pixel; small pictures are not cropped."""
    root = pictures(tmp_path / "pictures", ["cat", "dog", "fox"], suffix=".png")
    model = {"name": name, "pretrained": False}
    study = finished_study(tmp_path / "studies", root, model, [{"strategy": "full", "hparams": {}}], data=data)
    ended = CliRunner().invoke(app, ["export", str(study.folder), "--to", str(tmp_path / "model")])
    assert ended.exit_code == 0, ended.stderr
    cfg = json.loads((tmp_path / "model/config.json").read_text())["pretrained_cfg"]
    assert cfg["input_size"] == [3, 32, 32]
    assert cfg["crop_pct"] == data.get("crop_pct", 1.0)
    assert cfg["crop_mode"] == "center"
    assert cfg["interpolation"] == data.get("interpolation", "bicubic")
    own = backbone_data_config(ModelSpec(name=name, pretrained=False), 32)
    assert tuple(cfg["mean"]) == tuple(data.get("mean", own.mean))
    assert tuple(cfg["std"]) == own.std
    timms = create_transform(
        tuple(cfg["input_size"]), is_training=False, interpolation=cfg["interpolation"], crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"], mean=cfg["mean"], std=cfg["std"], normalize=False,
    )  # fmt: skip
    stored = Store(next(path for path in (tmp_path / "studies/data").iterdir() if path.is_dir()))
    crop = BatchTransform([0.0] * 3, [1 / 255] * 3, 32, ())
    for split in stored.splits:
        seen = crop(torch.tensor(stored.images(split))).numpy().round().astype(np.uint8)
        for image, file in zip(seen, stored.names(split), strict=True):
            assert np.array_equal(np.asarray(timms(Image.open(root / file))), image)
