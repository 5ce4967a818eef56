"""LoRA through peft against one written by hand; what moves, merging, checkpoints, targets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.conformance import StrategyConformance
from tests.support.trials import MakeTrial, finish, same_tensors
from trainables.engine.optim import rate_factor, resolved_rate
from trainables.engine.trial import Trial
from trainables.lora import LoRA, inject, merge, target_names
from trainables.specs.seeds import stream_seed
from trainables.storage.checkpoint_format import load_state, save_state

RATES = {"lr_backbone": 0.1, "lr_head": 3.0}


class TestConformance(StrategyConformance):
    strategy = "lora"
    networks = ("vit",)
    learning: ClassVar[Mapping[str, Any]] = RATES
    reports = frozenset(["lora/*"])


class TestConformanceOfAllTargets(TestConformance):
    hparams: ClassVar[Mapping[str, Any]] = {"targets": "all", "rank": 2, "clip_norm": 1.0}


@pytest.fixture
def trial(make_trial: MakeTrial) -> Callable[..., Trial]:
    return partial(make_trial, "lora", **RATES, rank=4)


class ByHand(nn.Module):
    """x → W·x + b + (α/r)·B·A·x"""

    def __init__(self, plain: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.plain = plain
        self.scale = scale
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.plain(x) + self.scale * functional.linear(functional.linear(x, self.a), self.b)
        return out


def test_training_equals_that_of_adapters_written_by_hand(trial: Callable[..., Trial]) -> None:
    peft, plain = trial(alpha=6.0), trial(alpha=6.0)
    model = plain.model
    start = {name: value.clone() for name, value in model.backbone.named_parameters() if "lora_" in name}
    names = [name.removesuffix(".lora_A.default.weight") for name in start if ".lora_A." in name]
    merge(model.backbone)
    adapters = []
    for name in names:
        parent, _, child = name.rpartition(".")
        a, b = start[f"{name}.lora_A.default.weight"], start[f"{name}.lora_B.default.weight"]
        assert not b.any()
        layer = ByHand(getattr(model.backbone.get_submodule(parent), child), a, b, 6.0 / 4)
        setattr(model.backbone.get_submodule(parent), child, layer)
        adapters += [layer.a, layer.b]
    model.requires_grad_(False)
    group = peft.strategy.param_groups(peft.model)[1]
    scale = plain.data.mean_square_norm()
    heads = [(p, resolved_rate(group, p, scale)) for p in model.head.parameters()]
    rates = [(p, RATES["lr_backbone"]) for p in adapters] + heads
    for parameter, _ in rates:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD([{"params": [p], "lr": r, "initial_lr": r} for p, r in rates], lr=0.1, momentum=0.9)
    config = peft.strategy.config
    steps = plain.data.steps_per_epoch
    model.train()
    for step in range(steps):
        batches = plain.data.batches("train", shuffle_seed=stream_seed(0, "shuffle", 0), drop_last=True, start=step)
        images, labels = next(iter(batches))
        for table in optimizer.param_groups:
            table["lr"] = table["initial_lr"] * rate_factor(step, 2 * steps, config)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    peft.step()
    images, _ = next(plain.data.batches("test"))
    with torch.no_grad():
        assert torch.allclose(peft.model.eval()(images), model.eval()(images), atol=1e-5)
    trained = dict(peft.model.backbone.named_parameters())
    for name, layer in zip(names, [m for m in model.modules() if isinstance(m, ByHand)], strict=True):
        assert torch.allclose(trained[f"{name}.lora_A.default.weight"], layer.a, atol=1e-6)
        assert torch.allclose(trained[f"{name}.lora_B.default.weight"], layer.b, atol=1e-6)
        assert layer.b.any()


@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
def test_exactly_the_adapters_of_the_targets_and_the_head_move(trial: Callable[..., Trial], targets: str) -> None:
    run = trial(targets=targets)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.step()
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".lora_" in name or name.startswith("head.")}
    wrapped = {name.partition(".lora_")[0].rpartition(".")[2] for name in moved if ".lora_" in name}
    maps = {"attention": {"qkv", "proj"}, "mlp": {"fc1", "fc2"}}
    assert wrapped == maps.get(targets, maps["attention"] | maps["mlp"])
    assert run.model.head.weight.requires_grad


def test_merging_keeps_the_function_and_gives_back_the_plain_structure(trial: Callable[..., Trial]) -> None:
    run = trial(targets="all")
    run.step()
    images, _ = next(run.data.batches("test"))
    with torch.no_grad():
        before = run.model.eval()(images)
        merge(run.model.backbone)
        assert torch.allclose(run.model(images), before, atol=1e-5)
    assert run.model.backbone.state_dict().keys() == run.data.reference.state_dict().keys()
    kinds = [type(module) for module in run.model.backbone.modules()]
    assert kinds == [type(module) for module in run.data.reference.modules()]


def test_a_finished_trial_is_a_plain_network_and_is_restored_as_one(
    trial: Callable[..., Trial], tmp_path: Path
) -> None:
    run = trial()
    finish(run)
    assert run.model.backbone.state_dict().keys() == run.data.reference.state_dict().keys()
    save_state(tmp_path / "end", run.state())
    again = trial()
    again.load_state(load_state(tmp_path / "end"))
    assert again.finished
    assert same_tensors(run.model.state_dict(), again.model.state_dict())


def test_a_checkpoint_holds_adapters_and_head_and_nothing_of_the_backbone(trial: Callable[..., Trial]) -> None:
    run = trial()
    run.step()
    names = {name.partition("/")[2] for name in run.state().tensors if name.startswith("model/")}
    assert names == {n for n in run.model.state_dict() if ".lora_" in n or n.startswith("head.")}


def test_statistics_of_batch_norm_stay_as_they_were(trial: Callable[..., Trial]) -> None:
    run = trial(kind="hybrid", targets="mlp")
    before = {name: value.clone() for name, value in run.model.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    finish(run)
    assert all(torch.equal(value, before[name]) for name, value in run.model.named_buffers())


def test_alpha_is_twice_the_rank_unless_it_is_given(trial: Callable[..., Trial]) -> None:
    for hparams, scale in (({"rank": 4}, 2.0), ({"rank": 4, "alpha": 32.0}, 8.0)):
        layers = [m for m in trial(**hparams).model.modules() if hasattr(m, "scaling")]
        assert {layer.scaling["default"] for layer in layers} == {scale}


@pytest.mark.parametrize(
    ("architecture", "attention", "mlp"),
    [
        ("vit_tiny_patch16_224", {"attn.qkv", "attn.proj"}, {"mlp.fc1", "mlp.fc2"}),
        ("beit_base_patch16_224", {"attn.qkv", "attn.proj"}, {"mlp.fc1", "mlp.fc2"}),
        ("eva02_tiny_patch14_224", {"attn.qkv", "attn.proj"}, {"mlp.fc1", "mlp.fc2"}),
        ("swin_tiny_patch4_window7_224", {"attn.qkv", "attn.proj"}, {"mlp.fc1", "mlp.fc2"}),
        ("vit_relpos_small_patch16_224", {"attn.qkv", "attn.proj"}, {"mlp.fc1", "mlp.fc2"}),
        ("swinv2_cr_tiny_224", {"attn.qkv", "attn.proj"}, {"mlp.fc1", "mlp.fc2"}),
        ("convit_tiny", {"attn.qkv", "attn.qk", "attn.v", "attn.proj"}, {"mlp.fc1", "mlp.fc2"}),
        ("xcit_nano_12_p16_224", {"attn.qkv", "attn.proj", "attn.q", "attn.k", "attn.v"}, {"mlp.fc1", "mlp.fc2"}),
    ],
)
def test_targets_in_other_families(architecture: str, attention: set[str], mlp: set[str]) -> None:
    with torch.device("meta"):
        network = timm.create_model(architecture, num_classes=0)
    for targets, ends in (("attention", attention), ("mlp", mlp)):
        names = target_names(network, targets)
        assert {".".join(name.split(".")[-2:]) for name in names} == ends


def test_maps_of_positions_alone_are_no_attention_to_adapt() -> None:
    with torch.device("meta"):
        network = timm.create_model("coatnet_rmlp_0_rw_224", num_classes=0)  # its queries are 1x1 convolutions
    with pytest.raises(ValueError) as error:
        target_names(network, "attention")
    assert str(error.value) == (
        "LoRA needs linear maps to adapt, but targets='attention' matches none in this network. Use other targets, or "
        "another strategy."
    )


def test_a_map_whose_weight_is_read_without_calling_it_is_refused(tmp_path: Path, one_thread: None) -> None:
    """BEiT multiplies by `qkv.weight` itself: an adapter around it would train without any effect."""
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 0}
    network = timm.create_model("beit_base_patch16_224", **small)
    with pytest.raises(ValueError) as error:
        inject(network, LoRA.Config(), torch.zeros(1, 3, 32, 32))
    assert str(error.value) == (
        "LoRA adapts linear maps that the network calls, but this one reads the weights of blocks.0.attn.qkv and 1 "
        "more by itself, so that an adapter would do nothing. Use targets='mlp', or another strategy."
    )
    inject(network, LoRA.Config(targets="mlp"), torch.zeros(1, 3, 32, 32))


def test_without_peft_the_message_states_how_to_get_it(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError) as error:
        trial().step()
    assert str(error.value) == 'LoRA needs peft, which is not installed. pip install "luthier[lora]"'
    assert LoRA.packages == {"peft": "lora"}


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, but got 0."),
        ({"alpha": -1.0}, "alpha must be positive, but got -1.0."),
        ({"targets": "qkv"}, "targets must be one of 'attention', 'mlp', 'all', but got 'qkv'."),
    ],
)
def test_impossible_values(trial: Callable[..., Trial], hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        trial(**hparams)
    assert str(error.value) == message


def test_a_network_without_blocks_is_refused(trial: Callable[..., Trial]) -> None:
    with pytest.raises(ValueError, match="no block of attention and feed-forward"):
        trial(kind="cnn").step()
