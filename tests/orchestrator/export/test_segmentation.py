"""Segmentation models that leave a study: the same logits in every format, and masks that score what the trial did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import luthier
from orchestrator.cli import app
from orchestrator.commands.export import export_study
from orchestrator.export.errors import ModelFolderError, RefusedExportError
from orchestrator.export.segmentation_model import SegmentationModel
from orchestrator.record.records import TrialRecord, fold
from orchestrator.study import Study, read_journal
from tests.support.exports import finished_study, fresh
from tests.support.masked import boxes, photo, save

pytestmark = [pytest.mark.usefixtures("cpu_only"), pytest.mark.thorough]

torch.set_num_threads(1)

SHAPES = ((33, 47), (50, 70), (64, 64), (96, 40), (31, 31), (65, 33))
"""Widths and heights, those of M10."""
VALUES = {"background": 7, "object": 200}
"""Of the masks' files: label ids, not train ids."""
Trained = tuple[Study, TrialRecord]


def write_pictures(root: Path, count: int) -> Path:
    """images/ and masks/ of the sizes `SHAPES` in turn."""
    values = np.array([*VALUES.values()], np.uint8)
    for number in range(count):
        width, height = SHAPES[number % len(SHAPES)]
        mask = boxes(width, height, (5, 6, 15 + number % 7, 18, 1))
        save(photo(mask, number), root / "images" / f"{number:03d}.png")
        save(values[mask], root / "masks" / f"{number:03d}.png")
    return root


def trained_study(folder: Path, evaluation: str, network: str = "test_resnet", decoder: str = "unet") -> Trained:
    root = write_pictures(folder / "pictures", 24)
    trial = {"strategy": "full", "hparams": {"lr_backbone": 0.3}, "seed": 1}
    data = {"evaluation": evaluation, "labels": VALUES}
    model = {"name": network, "pretrained": False, "decoder": decoder}
    study = finished_study(folder / "studies", root, model, [trial], epochs=8, data=data, task="segmentation")
    (record,) = fold(read_journal(study.spec, study.folder))
    return study, record


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_study(tmp_path_factory.mktemp("slide"), "slide")


@pytest.fixture(scope="module")
def model(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    export_study(trained[0].folder, folder)
    return folder


def test_pictures(trained: Trained) -> list[Path]:
    """The test pictures of a study as files."""
    study, _ = trained
    return [Path(str(study.spec.data.root)) / name for name in study.prepare().names("test")]


test_pictures.__test__ = False  # type: ignore[attr-defined]


def truth_of(picture: Path) -> NDArray[np.uint8]:
    """The mask of a picture as class indices."""
    raw = np.asarray(Image.open(picture.parents[1] / "masks" / picture.name))
    return (raw == VALUES["object"]).astype(np.uint8)


def mean_iou(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> float:
    """Mean over both classes of intersection by union, counted over all pairs of truth and prediction."""
    quotients = []
    for index in range(len(VALUES)):
        shared = sum(int(((truth == index) & (mask == index)).sum()) for truth, mask in pairs)
        either = sum(int(((truth == index) | (mask == index)).sum()) for truth, mask in pairs)
        quotients.append(shared / either)
    return float(np.mean(quotients))


def command(*arguments: object) -> tuple[int, str, str]:
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return ended.exit_code, ended.stdout, ended.stderr


@pytest.mark.parametrize("batch_size", [1, 16])
def test_written_masks_score_what_the_trial_scored(
    trained: Trained, model: Path, batch_size: int, tmp_path: Path
) -> None:
    files = test_pictures(trained)
    code, out, err = command("predict", model, *files, "--to", tmp_path / "out", "--batch-size", batch_size)
    assert code == 0, err
    assert out.splitlines()[-1] == f"Wrote {tmp_path / 'out'}: 4 masks, 0 unreadable, 0 ignored"
    pairs = [(truth_of(file), np.asarray(Image.open(tmp_path / "out" / file.name))) for file in files]
    score = mean_iou(pairs)
    assert 0.5 < score < 1
    assert score == trained[1].metrics["test/miou"]


def test_resized_views_score_what_the_trial_scored(tmp_path: Path) -> None:
    resized = trained_study(tmp_path, "resize")
    export_study(resized[0].folder, tmp_path / "model")
    masks = luthier.load(tmp_path / "model", "cpu").predict(test_pictures(resized))
    pairs = [(truth_of(Path(name)), mask) for name, mask in masks.items()]
    assert mean_iou(pairs) == resized[1].metrics["test/miou"]


def test_the_stored_test_split_has_the_masks_of_its_files(trained: Trained, model: Path, tmp_path: Path) -> None:
    store = trained[0].prepare()
    code, _, err = command("predict", model, store.path, "--to", tmp_path / "out", "--split", "test")
    assert code == 0, err
    exported = luthier.load(model, "cpu")
    assert isinstance(exported, SegmentationModel)
    for name, mask in zip(store.names("test"), exported.predict(test_pictures(trained)).values(), strict=True):
        assert (np.asarray(Image.open(tmp_path / "out" / name)) == mask).all()


class TestPredict:
    """Masks as files."""

    def test_m10_masks_have_size_and_name_of_their_pictures(self, model: Path, tmp_path: Path) -> None:
        root = write_pictures(tmp_path / "sketch", len(SHAPES))
        code, _, err = command("predict", model, root / "images", "--to", tmp_path / "out", "--overlay")
        assert code == 0, err
        for number, shape in enumerate(SHAPES):
            mask = Image.open(tmp_path / "out" / f"{number:03d}.png")
            assert mask.size == shape
            assert mask.mode == "L"
            assert set(np.unique(np.asarray(mask))) <= {0, 1}
            assert Image.open(tmp_path / "out/overlays" / f"{number:03d}.jpg").size == shape

    def test_labels_say_what_the_values_are(self, model: Path, tmp_path: Path) -> None:
        root = write_pictures(tmp_path / "sketch", 1)
        command("predict", model, root / "images", "--to", tmp_path / "out")
        assert json.loads((tmp_path / "out/labels.json").read_text()) == {
            "values": "Masks hold indices of the model's 2 classes from 0 (train ids), not the values of the training "
            "masks (label ids, colours).",
            "classes": [
                {"value": 0, "name": "background", "training_values": [7]},
                {"value": 1, "name": "object", "training_values": [200]},
            ],
        }

    def test_a_picture_that_exif_turns_has_an_upright_mask(self, model: Path, tmp_path: Path) -> None:
        mask = boxes(60, 40, (5, 6, 17, 18, 1))
        exif = Image.Exif()
        exif[0x0112] = 6
        photo(mask, 1).save(tmp_path / "turned.png", exif=exif)
        photo(mask, 1).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
        masks = luthier.load(model, "cpu").predict([tmp_path / "turned.png", tmp_path / "upright.png"])
        turned, upright = masks.values()
        assert turned.shape == (60, 40)
        assert (turned == upright).all()

    def test_unreadable_pictures_are_listed_and_names_stay_apart(self, model: Path, tmp_path: Path) -> None:
        root = tmp_path / "mixed"
        for name in ("1.png", "1.jpg", "a/1.png", "b/2.png"):
            save(photo(boxes(40, 36, (5, 6, 15, 16, 1)), 1), root / name)
        (root / "6.jpg").write_bytes(b"")
        (root / "notes.txt").write_text("none")
        code, out, _ = command("predict", model, root, "--to", tmp_path / "out")
        assert code == 3
        assert "Unreadable: 6.jpg: the file is empty" in out
        assert out.splitlines()[-1].endswith("4 masks, 1 unreadable, 1 ignored")
        written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
        assert written == {"1.png.png", "1.jpg.png", "a/1.png", "b/2.png"}

    def test_nothing_is_written_where_no_picture_is_readable(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "6.jpg").write_bytes(b"")
        code, _, err = command("predict", model, tmp_path / "6.jpg", "--to", tmp_path / "out")
        assert code == 4
        assert "At least one picture must be readable, but none of 1 is" in err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (["-o", "out.csv"], "a segmentation model writes masks into a folder, so give --to DIR"),
            (["--to", "out", "--domain-report"], "neither --output nor --domain-report"),
            (["--to", "used"], "masks are written into a new or empty folder, but used exists"),
            (["--to", "missing/out"], "its folder must exist"),
        ],
    )
    def test_outputs_that_do_not_fit(
        self, model: Path, options: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        save(photo(boxes(40, 36), 1), tmp_path / "used/1.png")
        code, _, err = command("predict", model, "used", *options)
        assert code == 2
        assert problem in " ".join(err.split())

    def test_pillow_images_go_by_their_position(self, model: Path) -> None:
        image = photo(boxes(40, 36, (5, 6, 15, 16, 1)), 1)
        masks = luthier.load(model, "cpu").predict([image, image.rotate(90, expand=True)])
        assert {name: mask.shape for name, mask in masks.items()} == {"0": (36, 40), "1": (40, 36)}


class TestFolder:
    """Exported folders."""

    def test_the_card_has_the_score_with_its_classes_and_interval(self, model: Path) -> None:
        card = (model / "README.md").read_text()
        assert "pipeline_tag: image-segmentation" in card
        (row,) = [line for line in card.splitlines() if line.startswith("| `test/miou`")]
        assert "(95 % interval over pictures: " in row
        assert "of 2 classes" in row

    def test_timm_builds_the_encoder_without_luthier(self, model: Path, trained: Trained, tmp_path: Path) -> None:
        code = """
        import timm, torch

        encoder = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        with torch.no_grad():
            result = encoder(torch.full((1, 3, 32, 32), 0.5))[0].tolist()
        """
        exported = luthier.load(model, "cpu")
        with torch.no_grad():
            features = exported.network.backbone(torch.full((1, 3, 32, 32), 0.5))[0]
        assert fresh(code, tmp_path, path=str(model)) == pytest.approx(features.tolist(), rel=1e-5, abs=1e-6)

    def test_peft_is_refused_before_anything_is_written(self, trained: Trained, tmp_path: Path) -> None:
        with pytest.raises(RefusedExportError) as caught:
            export_study(trained[0].folder, tmp_path / "model", format_name="peft")
        assert str(caught.value) == (
            "A segmentation model is exported as one of timm, onnx, torch_export, mlflow, but got 'peft': a peft "
            "adapter fits on one base network, and a segmentation model is an encoder under a decoder. Adapters are "
            "merged in the other formats."
        )
        assert not (tmp_path / "model").exists()

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "decoder.safetensors"])
    def test_a_damaged_file_is_named(self, model: Path, name: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_bytes((model / name).read_bytes() + b" ")
        with pytest.raises(ModelFolderError, match=name):
            luthier.load(folder)

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"decoder": {"name": "mask2former"}}, "a decoder 'mask2former'"),
            ({"evaluation": {"view": "tile", "side": 32}}, "a view 'tile'"),
            ({"label_names": ["a", "a"]}, "2 classes with 1 names"),
            ({"model_args": {"checkpoint_path": "x"}}, "model_args with checkpoint_path"),
        ],
    )
    def test_a_config_that_makes_no_sense(
        self, model: Path, changes: dict[str, Any], problem: str, tmp_path: Path
    ) -> None:
        config = json.loads((model / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelFolderError, match="lacks or garbles") as caught:
            luthier.load(tmp_path)
        assert problem in str(caught.value)

    def test_a_refit_is_scored_on_test_pictures_alone(self, trained: Trained, tmp_path: Path) -> None:
        study, _ = trained
        exported = export_study(study.folder, tmp_path / "model", refit=True)
        assert exported.selected.reason.startswith(
            "Trained once more on training and validation pictures together (20); no validation number"
        )
        card = (tmp_path / "model/README.md").read_text()
        assert "## Numbers of the refit" in card
        assert "val/miou" not in card


CARD_CODE = """
import os, re

os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
card = open("model/README.md").read()
exec(re.search("```python\\n(.*?)```", card, re.S).group(1))
result = {"classes": classes, "mask": mask.tolist()}
if sizes:
    result["logits"] = {}
    for height, width in sizes:
        for batch in (1, 3):
            images = torch.linspace(-1, 1, batch * 3 * height * width).reshape(batch, 3, height, width)
            result["logits"][f"{batch} {height} {width}"] = run(images).detach().tolist()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch_export", "mlflow"])
def test_the_code_of_the_card_gives_the_mask_without_luthier(
    trained: Trained, model: Path, kind: str, tmp_path: Path
) -> None:
    """M10: one file takes two sizes and two batch sizes, or says which size it takes."""
    if kind != "torch_export":
        pytest.importorskip("onnxruntime")
    export_study(trained[0].folder, tmp_path / "model", format_name=kind)
    photo(boxes(65, 47, (5, 6, 17, 18, 1)), 3).save(tmp_path / "picture.jpg")
    facts = json.loads((tmp_path / "model/luthier.json").read_text())
    sizes = [(33, 47), (64, 40)] if facts["any_size"] else []
    result = fresh(CARD_CODE, tmp_path, sizes=sizes)
    reference = luthier.load(model, "cpu")
    (mask,) = reference.predict(tmp_path / "picture.jpg").values()
    assert result["classes"] == list(VALUES)
    assert (np.array(result["mask"]) == mask).mean() > 0.999
    for key, logits in result.get("logits", {}).items():
        batch, height, width = map(int, key.split())
        images = torch.linspace(-1, 1, batch * 3 * height * width).reshape(batch, 3, height, width)
        assert (np.array(logits).argmax(1) == reference(images).numpy().argmax(1)).all()
    if not sizes:
        assert "of images of 32 x 32 pixels and no others" in (tmp_path / "model/README.md").read_text()
