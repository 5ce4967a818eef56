"""A folder in timm's layout: timm alone gives the same pixels, the same logits and the same names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.export.errors import ExportError, ModelFolderError, RefusedExportError
from orchestrator.export.export import export_model
from orchestrator.export.model import load
from orchestrator.export.pictures import decoded, list_pictures
from tests.support.exports import fresh, pictures, tuned
from trainables.data.transforms import BatchTransform

pytestmark = pytest.mark.usefixtures("cpu_only")

NETWORKS = ("test_vit", "test_resnet", "resnet10t.c3_in1k")
FRESH = """
import glob, os
import numpy as np, timm, torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

torch.set_num_threads(1)
result = {}
for name, folder in folders.items():
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    paths = sorted(glob.glob(f"{root}/*/*.jpg"))
    for test_size in (False, True):
        config = resolve_data_config({}, model=model, use_test_size=test_size)
        transform = create_transform(**config)
        raw = create_transform(**config, normalize=False)
        images = [Image.open(path).convert("RGB") for path in paths]
        pixels = torch.stack([raw(image) for image in images])
        with torch.no_grad():
            logits = model(torch.stack([transform(image) for image in images]))
        np.save(f"{name}-{test_size}.npy", pixels.numpy())
        result[f"{name}-{test_size}"] = {
            "logits": logits.tolist(),
            "labels": list(model.pretrained_cfg["label_names"]),
            "paths": [os.path.relpath(path, root) for path in paths],
        }
"""


class TestPicturesAndLogits:
    @pytest.fixture(scope="class")
    def root(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return pictures(tmp_path_factory.mktemp("export") / "pictures", ["cat", "dog", "fox"])

    @pytest.mark.thorough
    def test_timm_alone_sees_the_same_pixels_and_gives_the_same_logits(self, root: Path) -> None:
        """X01: for the usual and the test-time settings of timm, without Luthier."""
        folder = root.parent
        models = {name: tuned(name) for name in NETWORKS}
        for name, model in models.items():
            export_model(model, folder / name)
        result = fresh(FRESH, folder, root=str(root), folders={name: str(folder / name) for name in NETWORKS})
        for name, model in models.items():
            view = model.preprocessing
            chunks = list(decoded(sorted(list_pictures([root]).pictures, key=lambda p: p.location), view))
            transform = BatchTransform(view.mean, view.std, view.image_size, ())
            crop = BatchTransform([0.0] * 3, [1 / 255] * 3, view.image_size, ())
            pixels = torch.tensor(chunks[0].pixels)
            with torch.no_grad():
                logits = model.network(transform(pixels)).numpy()
            for test_size in ("False", "True"):
                timms = np.load(folder / f"{name}-{test_size}.npy")
                assert np.array_equal(timms, crop(pixels).numpy().round().astype(np.uint8)), (name, test_size)
                values = result[f"{name}-{test_size}"]
                assert values["paths"] == chunks[0].names
                assert values["labels"] == ["cat", "dog", "fox"]
                difference = np.abs(np.array(values["logits"]) - logits).max() / np.abs(logits).max()
                assert difference <= 1e-5, (name, test_size, difference)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_the_configuration_is_that_of_training(self, name: str, tmp_path: Path) -> None:
        model = tuned(name)
        export_model(model, tmp_path / "model")
        config = json.loads((tmp_path / "model/config.json").read_text())
        cfg = config["pretrained_cfg"]
        assert cfg["input_size"] == [3, 32, 32]
        assert cfg["crop_mode"] == "center"
        assert cfg["crop_pct"] == model.preprocessing.crop_pct
        assert cfg["interpolation"] == model.preprocessing.interpolation
        assert tuple(cfg["mean"]) == model.preprocessing.mean
        assert tuple(cfg["std"]) == model.preprocessing.std
        assert not [key for key in cfg if key.startswith("test_")]
        assert cfg["num_classes"] == config["num_classes"] == 3
        assert config["model_args"].get("img_size") == (32 if name == "test_vit" else None)
        assert "EXIF" in (tmp_path / "model/README.md").read_text()
        assert "white" in (tmp_path / "model/README.md").read_text()

    def test_loaded_again_it_is_the_network(self, tmp_path: Path) -> None:
        model = tuned("test_resnet")
        export_model(model, tmp_path / "model")
        loaded = load(tmp_path / "model")
        transform = BatchTransform(model.preprocessing.mean, model.preprocessing.std, 32, ())
        with torch.no_grad():
            expected = model.network(transform(torch.tensor(model.pictures)))
        assert torch.allclose(loaded(torch.tensor(model.pictures)), expected, atol=1e-6)
        assert loaded.classes == ("cat", "dog", "fox")


class TestArchitectures:
    @pytest.mark.parametrize(
        ("name", "side"),
        [
            pytest.param("deit_tiny_distilled_patch16_224", 32, id="two heads"),
            pytest.param("resnetv2_50x1_bit", 32, id="a convolution", marks=pytest.mark.sweep),
            pytest.param("convnext_atto", 32, id="layers before the head"),
            pytest.param("mobilenetv3_small_050", 32, id="a hidden layer", marks=pytest.mark.sweep),
            pytest.param("levit_128s", 224, id="two heads with BatchNorm", marks=pytest.mark.sweep),
        ],
    )
    def test_heads_of_every_shape(self, name: str, side: int, tmp_path: Path) -> None:
        export_model(tuned(name, image_size=side), tmp_path / "model")
        assert load(tmp_path / "model").classes == ("cat", "dog", "fox")

    def test_a_head_that_is_no_linear_map_is_refused(self, tmp_path: Path) -> None:
        model = tuned("test_resnet")
        model.network.head = torch.nn.Sequential(model.network.head)
        with pytest.raises(ValueError, match="linear map on pooled features, but this network's head is Sequential"):
            export_model(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()


class TestRefusals:
    def test_a_folder_in_use(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model/notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="new or empty folder"):
            export_model(tuned("test_resnet"), tmp_path / "model")
        assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        export_model(tuned("test_resnet"), tmp_path / "model")
        names = sorted(path.name for path in (tmp_path / "model").iterdir())
        assert names == ["README.md", "config.json", "luthier.json", "model.safetensors"]

    def test_an_unknown_format(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedExportError, match=r"but got 'onx'\. Did you mean 'onnx'"):
            export_model(tuned("test_resnet"), tmp_path / "model", "onx")

    def test_other_logits_end_the_export(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A format that computes something else writes nothing."""
        from orchestrator.export import formats

        def halved(folder: Path, module: torch.nn.Module) -> None:
            state = {name: value.clone() for name, value in module.state_dict().items()}
            state["fc.weight"] *= 0.5
            save_file(state, folder / "model.safetensors")

        monkeypatch.setattr(formats, "write_weights", halved)
        with pytest.raises(ExportError, match="to 1e-05 of the largest one, but they differ by"):
            export_model(tuned("test_resnet"), tmp_path / "model")
        assert list(tmp_path.iterdir()) == []


class TestReading:
    @pytest.fixture(scope="class")
    def original(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("reading") / "model"
        export_model(tuned("test_resnet"), folder)
        return folder

    @pytest.fixture
    def folder(self, original: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(original, tmp_path / "model"))

    def edit(self, folder: Path, keep_facts: bool = False, **fields: object) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        if not keep_facts:
            (folder / "luthier.json").unlink()

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFolderError, match=r"An exported model is a folder with config\.json"):
            load(tmp_path / "nothing")

    def test_a_changed_configuration_is_noticed(self, folder: Path) -> None:
        self.edit(folder, keep_facts=True, label_names=["dog", "cat", "fox"])
        with pytest.raises(ModelFolderError, match=r"config\.json must have the SHA-256"):
            load(folder)

    def test_a_flipped_bit_is_noticed(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        with pytest.raises(ModelFolderError, match=r"model\.safetensors must have the SHA-256"):
            load(folder)

    def test_a_folder_of_another_program_needs_no_digests(self, folder: Path) -> None:
        self.edit(folder, label_names=["a", "b", "c"])
        assert load(folder).classes == ("a", "b", "c")

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            ({"label_names": ["a", "b"]}, "3 logits have 2 names"),
            ({"label_names": ["a", "b", "b"]}, "3 names, 2 of them different"),
            ({"label_names": None}, "lacks or garbles"),
            ({"architecture": "test_resnet_2"}, "timm's architecture test_resnet_2"),
            ({"model_args": {"checkpoint_path": "/tmp/evil.pth"}}, "model_args has checkpoint_path"),
            ({"num_classes": 4, "label_names": list("abcd")}, "must fit test_resnet"),
        ],
    )
    def test_what_a_configuration_must_say(self, folder: Path, fields: dict[str, object], problem: str) -> None:
        self.edit(folder, **fields)
        with pytest.raises(ModelFolderError, match=problem):
            load(folder)

    def test_pickled_weights_are_not_read(self, folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / "luthier.json").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        with pytest.raises(ModelFolderError, match=r"has its weights in model\.safetensors"):
            load(folder)


def test_names_in_the_card_show_as_they_are(tmp_path: Path) -> None:
    export_model(tuned("test_resnet", classes=["a*b", "<script>", "x | y"]), tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    assert "a\\*b" in card
    assert "<script>" not in card
