"""Kept weights give back the network that was tested, bit for bit, from the pretrained one alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.support.synthetic import write_shapes
from tests.support.trials import MakeTrial, finish, same_tensors
from trainables.engine.trial import Trial
from trainables.engine.tuned_network import batch_norm_buffers, tuned_network
from trainables.models.backbone import load_pretrained
from trainables.models.low_rank import merged_weight
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.kept_weights import KeptWeights, WeightsError, load_weights, save_weights

ROOT = str(Path(__file__).parents[3])
CASES: tuple[tuple[str, str, dict[str, Any], str | None], ...] = (
    ("linear_probe", "vit", {}, None),
    ("full", "cnn", {"lr_backbone": 0.02}, None),
    ("full", "vit", {"lr_backbone": 0.02, "wise": 0.3}, "alpha"),
    ("daft", "cnn", {"lr_head": 0.1}, None),
    ("layernorm", "vit", {"lr_backbone": 0.1, "lr_head": 3.0}, None),
    ("layernorm", "hybrid", {"lr_backbone": 0.1, "lr_head": 3.0, "lam": 0.5}, "lambda"),
    ("bitfit", "vit", {"lr_backbone": 0.1, "lr_head": 3.0}, None),
    ("lora", "vit", {"lr_backbone": 0.1, "lr_head": 3.0, "rank": 4, "targets": "all"}, None),
    ("lora", "hybrid", {"lr_backbone": 0.1, "lr_head": 3.0, "targets": "mlp", "bn_conversion": True}, None),
    ("lora", "vit", {"lr_backbone": 0.1, "lr_head": 3.0, "rank": 3, "wise": 0.5}, "alpha"),
    ("lora", "vit", {"lr_backbone": 0.1, "lr_head": 3.0, "rank": 3, "wise": 1.0}, None),
)
"""Strategy, network, hyperparameters and what interpolated the weights."""


def stored(trial: Trial, folder: Path) -> KeptWeights:
    save_weights(folder, trial.kept_weights(7))
    return load_weights(folder)


@pytest.mark.parametrize(("strategy", "kind", "hparams", "interpolated"), CASES)
def test_the_network_is_that_of_the_trial(
    make_trial: MakeTrial,
    strategy: str,
    kind: str,
    hparams: dict[str, Any],
    interpolated: str | None,
    tmp_path: Path,
) -> None:
    trial = make_trial(strategy, kind, **hparams)
    result = finish(trial)
    weights = stored(trial, tmp_path / "weights")
    assert weights.meta["interpolated"] == interpolated
    assert weights.meta["result"] == {k: v for k, v in result.items() if isinstance(v, float)}
    model = tuned_network(weights)
    assert same_tensors(model.state_dict(), trial.model.state_dict())
    assert not model.training
    # torch folds a product over a frozen weight in another way, to rounding: frozen alike, the logits have equal bits.
    for restored, tested in zip(model.parameters(), trial.model.parameters(), strict=True):
        restored.requires_grad_(tested.requires_grad)
    images, _ = next(trial.data.batches("test"))
    with torch.no_grad():
        assert torch.equal(model(images), trial.model.eval()(images))


def test_only_what_differs_is_kept_and_the_head_and_every_statistic(make_trial: MakeTrial) -> None:
    probe = make_trial("linear_probe", "cnn")
    finish(probe)
    kept = probe.kept_weights(0).tensors
    assert set(kept) == {"head.weight", "head.bias"} | batch_norm_buffers(probe.model)
    assert any(name.endswith("running_var") for name in kept)
    norms = make_trial("layernorm", "vit", lr_backbone=0.1, lr_head=3.0)
    finish(norms)
    assert all("norm" in name for name in norms.kept_weights(0).tensors if not name.startswith("head."))


def test_a_low_rank_update_is_kept_before_merging(make_trial: MakeTrial) -> None:
    trial = make_trial("lora", "vit", lr_backbone=0.1, lr_head=3.0, rank=4, alpha=6.0)
    finish(trial)
    weights = trial.kept_weights(0)
    targets = [f"backbone.blocks.{block}.attn.{name}" for block in range(2) for name in ("qkv", "proj")]
    assert weights.meta["adapter"] == {"kind": "lora", "r": 4, "alpha": 6.0, "scale": 1.5, "targets": targets}
    assert set(weights.adapter) == {f"{target}.lora_{part}" for target in targets for part in "AB"}
    assert weights.adapter[f"{targets[0]}.lora_A"].shape == (4, 16)
    assert set(weights.tensors) == {"head.weight", "head.bias"}


def test_an_interpolated_low_rank_update_is_kept_whole(make_trial: MakeTrial) -> None:
    trial = make_trial("lora", "vit", lr_backbone=0.1, lr_head=3.0, rank=4, wise=0.5)
    finish(trial)
    weights = trial.kept_weights(0)
    assert weights.meta["adapter"] is None
    assert not weights.adapter
    assert "backbone.blocks.0.attn.qkv.weight" in weights.tensors


def test_merging_has_the_same_bits_whatever_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((300, 200), (16, 200), (300, 16)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = merged_weight(weight, a, b, 0.7)
        torch.set_num_threads(2)
        two = merged_weight(weight, a, b, 0.7)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert torch.allclose(one.double(), weight.double() + 0.7 * b.double() @ a.double(), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_merging_has_the_same_bits_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((300, 200), (16, 200), (300, 16)))
    on_gpu = merged_weight(weight.cuda(), a.cuda(), b.cuda(), 0.7)
    assert torch.equal(on_gpu.cpu(), merged_weight(weight, a, b, 0.7))


def test_weights_of_another_pretrained_network_are_refused(make_trial: MakeTrial, tmp_path: Path) -> None:
    trial = make_trial("linear_probe", "cnn")
    finish(trial)
    other = load_pretrained(ModelSpec(name="test_resnet", pretrained=False), 16)
    with pytest.raises(WeightsError) as error:
        tuned_network(trial.kept_weights(0), other)
    assert str(error.value) == (
        "Kept weights are put on the pretrained network that they were trained from, of digest "
        f"{trial.data.backbone.digest[:12]}…, but {trial.spec.shared.model.name} has {other.digest[:12]}… here. Give "
        "the weights and the version of timm that the trial had."
    )


@pytest.mark.parametrize("change", ["no head", "foreign", "shape", "no A"])
def test_weights_that_do_not_fit_are_refused(make_trial: MakeTrial, change: str) -> None:
    trial = make_trial("lora", "vit", lr_backbone=0.1, lr_head=3.0, rank=2)
    finish(trial)
    weights = trial.kept_weights(0)
    tensors: Mapping[str, Any] = dict(weights.tensors)
    adapter: Mapping[str, Any] = dict(weights.adapter)
    if change == "no head":
        tensors = {name: value for name, value in tensors.items() if name != "head.bias"}
    elif change == "foreign":
        tensors = {**tensors, "backbone.nowhere": torch.ones(1)}
    elif change == "shape":
        tensors = {**tensors, "head.bias": torch.ones(7)}
    else:
        adapter = {name: value for name, value in adapter.items() if name != "backbone.blocks.0.attn.qkv.lora_A"}
    with pytest.raises(WeightsError, match=r"head\.bias|backbone\.nowhere|backbone\.blocks\.0\.attn\.qkv\.lora_A"):
        tuned_network(dataclasses.replace(weights, tensors=tensors, adapter=adapter))


def test_only_the_process_that_finishes_a_trial_has_its_weights(make_trial: MakeTrial) -> None:
    trial = make_trial("full", "cnn")
    trial.step()
    with pytest.raises(RuntimeError, match="Weights are kept by the process that finishes their trial"):
        trial.kept_weights(0)


FRESH = """
import sys, torch
torch.set_num_threads(1)
from trainables.data.store import Store
from trainables.data.transforms import BatchTransform
from trainables.engine.tuned_network import tuned_network
from trainables.storage.kept_weights import load_weights
weights = load_weights(sys.argv[1])
model, meta, store = tuned_network(weights), weights.meta, Store(sys.argv[2])
view = BatchTransform(tuple(meta["mean"]), tuple(meta["std"]), meta["image_size"], ())
with torch.no_grad():
    logits = model(view(torch.tensor(store.images("test")), None))
correct = logits.argmax(1) == torch.tensor(store.labels("test"))
assert correct.double().mean().item() == meta["result"]["test/acc"], (correct, meta["result"])
assert "peft" not in sys.modules and "ray" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_fresh_process_gives_the_recorded_accuracy(make_trial: MakeTrial, strategy: str, tmp_path: Path) -> None:
    trial = make_trial(strategy, "vit", lr_backbone=0.1, lr_head=3.0)
    finish(trial)
    stored(trial, tmp_path / "weights")
    write_shapes(tmp_path / "store")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "weights"), str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
