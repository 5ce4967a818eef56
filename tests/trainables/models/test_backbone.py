"""Backbones: every family split into features and head, weights complete or refused, messages for people."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from trainables.models.backbone import backbone_data_config, check_model, load_pretrained
from trainables.models.weights import create
from trainables.specs.trial_spec import ModelSpec
from trainables.tasks.classification import new_classifier

FAMILIES = ("test_vit", "resnet18", "test_efficientnet", "convnext_atto", "swin_tiny_patch4_window7_224",
            "mobilenetv3_small_100", "regnety_002", "deit_tiny_distilled_patch16_224")  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The machine is shared."""


def refusal(spec: ModelSpec, check: Callable[[ModelSpec], object] = check_model) -> str:
    with pytest.raises(ValueError) as error:
        check(spec)
    return str(error.value)


class TestFamilies:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_features_and_head_make_the_network_that_timm_makes(self, name: str) -> None:
        side = 96 if "swin" in name else 64
        backbone = load_pretrained(ModelSpec(name=name, pretrained=False), side)
        assert not any(m.training for m in backbone.module.modules())
        model = new_classifier(backbone, 5, "cpu", seed=0).eval()
        assert {n.partition(".")[0] for n, _ in model.named_parameters()} == {"backbone", "head"}
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = model.features(images)
            logits = model(images)
            torch.testing.assert_close(logits, features @ model.head.weight.T + model.head.bias)
            whole = timm.create_model(name, num_classes=5, **({"img_size": side} if has_size(name) else {})).eval()
            whole.load_state_dict(backbone.module.state_dict(), strict=False)
            expected = whole.forward_head(whole.forward_features(images), pre_logits=True)
        torch.testing.assert_close(features, expected)
        assert features.shape == (2, backbone.num_features)
        assert logits.shape == (2, 5)

    def test_a_network_that_gives_no_vector_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        maps = nn.Conv2d(3, 4, 1)
        monkeypatch.setattr("trainables.models.backbone.create", lambda *a, **k: maps)
        assert refusal(ModelSpec(name="resnet10t", pretrained=False), lambda s: load_pretrained(s, 8)) == (
            "A backbone gives one feature vector per image, but resnet10t gives a tensor of shape (1, 4, 8, 8). "
            "Choose a classification model."
        )


def has_size(name: str) -> bool:
    return any(family in name for family in ("vit", "swin", "deit"))


def test_the_data_config_is_that_of_timm() -> None:
    for name in ("resnet18", "vit_tiny_patch16_224", "tf_efficientnet_lite0"):
        config = backbone_data_config(ModelSpec(name=name))
        expected = timm.get_pretrained_cfg(name)
        assert (config.mean, config.std) == (expected.mean, expected.std)
        assert (config.interpolation, config.crop_pct) == (expected.interpolation, expected.crop_pct)
        assert config.image_size == expected.input_size[-1]
    assert backbone_data_config(ModelSpec(name="vit_tiny_patch16_224"), 64).image_size == 64
    assert backbone_data_config(ModelSpec(name="resnet18"), 64).image_size == 64


class TestCopies:
    def test_the_pristine_network_is_shared_and_a_copy_leaves_it_alone(self) -> None:
        spec = ModelSpec(name="test_resnet", pretrained=False)
        backbone = load_pretrained(spec, 32)
        assert load_pretrained(spec, 32) is backbone
        before = {k: v.clone() for k, v in backbone.module.state_dict().items()}
        model = new_classifier(backbone, 3, "cpu", seed=1)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        assert all(torch.equal(v, before[k]) for k, v in backbone.module.state_dict().items())

    def test_the_head_is_a_linear_layer_drawn_from_the_seed_alone(self) -> None:
        backbone = load_pretrained(ModelSpec(name="test_resnet", pretrained=False), 32)
        state = torch.random.get_rng_state()
        first, second, other = (new_classifier(backbone, 3, "cpu", seed=s).head for s in (7, 7, 8))
        assert torch.equal(torch.random.get_rng_state(), state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            expected = nn.Linear(backbone.num_features, 3)
        assert torch.equal(first.weight, expected.weight)
        assert torch.equal(first.bias, expected.bias)
        assert torch.equal(first.weight, second.weight)
        assert not torch.equal(first.weight, other.weight)

    def test_random_weights_are_the_same_everywhere_and_leave_the_generator_alone(self) -> None:
        torch.manual_seed(3)
        state = torch.random.get_rng_state()
        first = create("test_resnet", pretrained=False, image_size=None).state_dict()
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(4)
        second = create("test_resnet", pretrained=False, image_size=None).state_dict()
        assert all(torch.equal(v, second[k]) for k, v in first.items())

    def test_the_digest_covers_weights_and_structure(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=0)
        digests = set()
        for name, change in (("a", 0.0), ("b", 1e-6)):
            with torch.no_grad():
                model.bn1.bias[0] += change
            save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
            spec = ModelSpec(name="test_resnet", weights=str(tmp_path / f"{name}.safetensors"))
            digests.add(load_pretrained(spec).digest)
        for side in (None, 64):
            digests.add(load_pretrained(spec, side).digest)
        assert len(digests) == 2


class TestNames:
    def test_an_unknown_name_is_answered_with_the_nearest_ones(self) -> None:
        assert refusal(ModelSpec(name="resnet81")) == (
            "A model is a timm name, local-dir:…, hf-hub:… or digits_vit or digits_cnn, but got 'resnet81'. "
            "Did you mean 'resnet18' or 'resnet61q' or 'resnet51q'?"
        )
        assert "Did you mean 'digits_vit'" in refusal(ModelSpec(name="digit_vit"))

    def test_an_unknown_tag_is_answered_with_those_that_exist(self) -> None:
        assert refusal(ModelSpec(name="resnet10t.nope")) == (
            "timm has these weights of resnet10t: resnet10t.c3_in1k; but got 'resnet10t.nope'."
        )

    def test_a_network_without_pretrained_weights_needs_a_file_or_an_explicit_wish(self, tmp_path: Path) -> None:
        spec = ModelSpec(name="cspresnet50d")
        assert refusal(spec) == (
            "timm has no pretrained weights for cspresnet50d. Give model.weights, or set pretrained: false."
        )
        check_model(ModelSpec(name="cspresnet50d", pretrained=False))
        (tmp_path / "w.pth").touch()
        check_model(ModelSpec(name="cspresnet50d", weights=str(tmp_path / "w.pth")))

    def test_what_a_folder_must_hold(self, tmp_path: Path, network: Callable[[str], str]) -> None:
        assert refusal(ModelSpec(name="resnet18", weights="/no/such")) == (
            "Weights must be an existing file or folder, but /no/such does not exist."
        )
        assert refusal(ModelSpec(name=f"local-dir:{tmp_path}")) == (
            f"A local-dir model is a folder with weights and a config.json that names its timm architecture, but "
            f"{tmp_path} has none (FileNotFoundError). `timm.models.save_for_hf(model, folder)` writes one."
        )
        folder = network("cnn").removeprefix("local-dir:")
        assert refusal(ModelSpec(name="resnet18", weights=folder)) == (
            f"Weights must be of the model's architecture resnet18, but {folder} holds test_resnet."
        )

    def test_a_side_that_the_network_cannot_take(self) -> None:
        message = refusal(ModelSpec(name="test_vit", pretrained=False), lambda s: load_pretrained(s, 8))
        assert message == (
            "test_vit does not take images of 8 x 8 pixels (Input height (8) should be divisible by patch size (16).). "
            "Choose another data.image_size."
        )


class TestWeightFiles:
    @pytest.fixture
    def trained(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model: nn.Module = timm.create_model("test_vit", num_classes=7)
        return model

    @pytest.mark.parametrize("ending", [".safetensors", ".pth"])
    def test_a_file_is_read_and_its_classifier_left_out(self, trained: nn.Module, ending: str, tmp_path: Path) -> None:
        path = tmp_path / f"weights{ending}"
        if ending == ".pth":
            torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, path)
        else:
            save_file(trained.state_dict(), path)
        backbone = load_pretrained(ModelSpec(name="test_vit", weights=str(path)))
        for name, value in backbone.module.state_dict().items():
            assert torch.equal(value, trained.state_dict()[name])

    def test_position_embeddings_are_resampled_to_another_side(self, trained: nn.Module, tmp_path: Path) -> None:
        save_file(trained.state_dict(), tmp_path / "w.safetensors")
        backbone = load_pretrained(ModelSpec(name="test_vit", weights=str(tmp_path / "w.safetensors")), 64)
        assert backbone.module.state_dict()["pos_embed"].shape[1] == 1 + (64 // 16) ** 2
        assert torch.equal(backbone.module.state_dict()["norm.weight"], trained.state_dict()["norm.weight"])

    def test_a_file_that_lacks_tensors_is_refused(self, trained: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "part.safetensors"
        save_file({k: v for k, v in trained.state_dict().items() if not k.startswith("norm.")}, path)
        assert refusal(ModelSpec(name="test_vit", weights=str(path)), load_pretrained) == (
            f"The weight file {path} lacks 2 tensors of the model or has them in another shape: norm.weight, "
            "norm.bias. Give the weights of this very architecture."
        )

    @pytest.mark.parametrize("ending", [".safetensors", ".pth"])
    def test_s11_a_cut_file_is_refused(self, trained: nn.Module, ending: str, tmp_path: Path) -> None:
        path = tmp_path / f"cut{ending}"
        if ending == ".pth":
            torch.save(trained.state_dict(), path)
        else:
            save_file(trained.state_dict(), path)
        path.write_bytes(path.read_bytes()[:2000])
        message = refusal(ModelSpec(name="test_vit", weights=str(path)), load_pretrained)
        assert message.startswith(f"The weight file {path} cannot be read (")
        assert message.endswith("). Give an undamaged .safetensors or .pth file of this architecture.")

    def test_s7_a_pickle_with_code_is_refused(self, tmp_path: Path) -> None:
        class Harmful:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(tmp_path / "executed"),)

        torch.save({"state_dict": Harmful()}, tmp_path / "w.pth")
        message = refusal(ModelSpec(name="test_vit", weights=str(tmp_path / "w.pth")), load_pretrained)
        assert "cannot be read" in message
        assert not (tmp_path / "executed").exists()


class TestFolders:
    def test_a_folder_is_loaded_by_name_and_as_weights(self, network: Callable[[str], str]) -> None:
        name = network("cnn")
        by_name = load_pretrained(ModelSpec(name=name))
        as_weights = load_pretrained(ModelSpec(name="test_resnet", weights=name.removeprefix("local-dir:")))
        random = load_pretrained(ModelSpec(name=name, pretrained=False))
        assert by_name.digest == as_weights.digest != random.digest

    def test_a_folder_whose_weights_are_incomplete_is_refused(
        self, network: Callable[[str], str], tmp_path: Path
    ) -> None:
        from safetensors.torch import load_file

        source = Path(network("cnn").removeprefix("local-dir:"))
        config = json.loads((source / "config.json").read_text())
        # A classifier to leave out: timm then no longer insists on every tensor.
        config["num_classes"] = config["pretrained_cfg"]["num_classes"] = 10
        (tmp_path / "config.json").write_text(json.dumps(config))
        state = load_file(source / "model.safetensors")
        removed = state.pop("conv1.0.weight")
        save_file(state, tmp_path / "model.safetensors")
        assert removed.numel() > 0
        assert refusal(ModelSpec(name=f"local-dir:{tmp_path}"), load_pretrained) == (
            f"The weights of local-dir:{tmp_path} are incomplete: missing keys (conv1.0.weight). A tensor that is not "
            "pretrained would start at random; give complete weights in model.weights."
        )

    def test_s11_a_folder_with_a_cut_file_is_refused(self, network: Callable[[str], str], tmp_path: Path) -> None:
        source = Path(network("cnn").removeprefix("local-dir:"))
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:3000])
        message = refusal(ModelSpec(name=f"local-dir:{tmp_path}"), load_pretrained)
        assert message.startswith(f"The model local-dir:{tmp_path} could not be loaded (SafetensorError: ")
        assert message.endswith("Give a folder with undamaged weights of the architecture in its config.json.")


def test_s11_weights_that_the_hub_cannot_give_or_gave_cut_are_an_error_with_a_command(tmp_path: Path) -> None:
    """Offline with an empty cache, and with a cache whose download was cut: never random weights."""
    snapshot = tmp_path / "hub" / "models--timm--test_vit2.r160_in1k"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("0" * 40)
    (snapshot / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (snapshot / "snapshots" / ("0" * 40) / "model.safetensors").write_bytes(b"\x10" + bytes(100))
    script = (
        "from trainables.models.backbone import load_pretrained\n"
        "from trainables.specs.trial_spec import ModelSpec\n"
        "for name in ('test_vit', 'test_vit2'):\n"
        "    try: print('loaded', load_pretrained(ModelSpec(name=name)))\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment,
        cwd=str(Path(__file__).parents[3]),
    )  # fmt: skip
    offline, cut = done.stdout.splitlines()
    for line, name, cause in ((offline, "test_vit", "LocalEntryNotFoundError"), (cut, "test_vit2", "SafetensorError")):
        assert line.startswith(f"The model {name} could not be loaded ({cause}: ")
        assert line.endswith(
            f"With internet run `hf download timm/{name}.r160_in1k --force-download`; for a machine without, run it "
            "elsewhere, copy the Hugging Face cache (`$HF_HOME`, by default ~/.cache/huggingface), or give "
            "model.weights."
        )
