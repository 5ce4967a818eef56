"""Cost of LayerNorm tuning: a step against full fine-tuning's, a λ sweep against its trial.

    python -m benchmarks.layernorm
    python -m benchmarks.layernorm --model vit_base_patch16_224 --batch-size 64 --device cuda

Prints one JSON object.

`step`: seconds per optimiser step, medians over alternating rounds on ready tensors, and the memory of a step beyond
weights and images. On a GPU that is the allocator's peak. On a CPU it is counted in torch: tensors that the forward
pass saves for the backward pass (each storage once, parameters left out), gradients and momentum. `ratio` is against
full fine-tuning.

`sweep`: one trial on the built-in digits with `lam_choice: sweep`. Optimiser steps inside `finalize` and `curves` are
counted by a hook on every optimiser; images that went through the head there, and CPU seconds (on a GPU: wall time)
beside those of the whole trial.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.diagnostics import clock, digits_store, finish, timed
from benchmarks.step import CLASSES, NoiseStore, ready_unit
from trainables import strategy_class
from trainables.data.trial_data import TrialData
from trainables.engine.phase_trainer import PhaseTrainer
from trainables.engine.trial import Trial
from trainables.engine.weight_interpolation import LAMBDA_GRID
from trainables.models.backbone import load_pretrained
from trainables.models.precision import autocast, resolve_precision
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.tasks.classification import new_classifier
from trainables.tasks.registry import task_of

SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "layernorm": ("layernorm", {}),
    "layernorm, attention norms": ("layernorm", {"norms": "attention"}),
    "layernorm, gamma": ("layernorm", {"train": "gamma"}),
}
Batches = list[tuple[Tensor, Tensor]]


def steps(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time every side on a copy of one network, in alternating rounds."""
    with tempfile.TemporaryDirectory() as cache:
        model = ModelSpec(name=args.model, pretrained=False)
        task = SharedTrialSettings(store="", model=model, batch_size=args.batch_size, cache=cache)
        backbone = load_pretrained(task.model, None)
        store = NoiseStore(backbone.data_config.image_size, args.batch_size * args.steps)
        dtype = resolve_precision(args.precision, device)
        trainings = {}
        for side, (name, hparams) in SIDES.items():
            strategy = strategy_class(name).from_hparams({"head_init": "zeros", **hparams})
            data = TrialData(TrialSpec(shared=task, strategy=name), store, backbone, device)
            network = new_classifier(backbone, CLASSES, device, seed=0)
            prepared = strategy.prepare(network, data).state
            (phase,) = strategy.phases(1)
            trainings[side] = PhaseTrainer(
                network, strategy, task_of(data), phase, data, prepared=prepared, unit_steps=args.steps, dtype=dtype
            )
        batches = list(data.batches("train", shuffle_seed=0, drop_last=True))
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(args.rounds + 1):
        for side, training in trainings.items():
            took = timed(lambda training=training: ready_unit(training, batches), device)
            if number > 0:  # the first round warms up
                seconds[side].append(took / args.steps)
    peak = allocated if device.type == "cuda" else counted
    measured = {
        side: {
            "seconds_per_step": statistics.median(seconds[side]),
            "step_memory_bytes": peak(training, batches),
            "trained_parameters": sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        }
        for side, training in trainings.items()
    }
    keys = ("seconds_per_step", "step_memory_bytes")
    ratio = {side: {key: row[key] / measured["full"][key] for key in keys} for side, row in measured.items()}
    settings = {"model": args.model, "batch_size": args.batch_size, "precision": str(dtype)}
    return {**settings, "sides": measured, "ratio": ratio}


def allocated(training: PhaseTrainer, batches: Batches) -> int:
    """Peak GPU memory of a step beyond what was allocated before it, in bytes."""
    training.optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ready_unit(training, batches[:1])
    momentum = sum(value.nbytes for state in training.optimizer.state.values() for value in tensors_of(state))
    return torch.cuda.max_memory_allocated() - before + momentum


def counted(training: PhaseTrainer, batches: Batches) -> int:
    """Bytes of saved tensors, gradients and momentum of a step."""
    images, labels = batches[0]
    weights = {p.untyped_storage().data_ptr() for p in training.model.parameters()}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | {images.untyped_storage().data_ptr()}:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # an address is that of one storage only as long as this lives
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, autocast(images.device, training.dtype):
        loss = functional.cross_entropy(training.model(images).float(), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = sum(p.grad.nbytes for p in training.model.parameters() if p.grad is not None)
    momentum = sum(value.nbytes for state in training.optimizer.state.values() for value in tensors_of(state))
    training.optimizer.zero_grad()
    return sum(saved.values()) + gradients + momentum


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    """Tensors of one parameter's optimiser state."""
    return [value for value in state.values() if isinstance(value, Tensor)]


def sweep(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure one trial with a λ sweep: passes and seconds of `finalize` and `curves`."""
    with tempfile.TemporaryDirectory() as folder:
        store = digits_store(Path(folder))
        task = SharedTrialSettings(
            store=store, model=ModelSpec(name="digits_vit"), epochs=args.epochs, cache=folder, diagnostics=()
        )
        run = Trial(TrialSpec(shared=task, strategy="layernorm", hparams={"lam_choice": "sweep"}), device=device)
        data = run.data
        data.mean_square_norm()  # the pretrained features are no part of the trial's cost
        total = {"optimizer_steps": 0, "images": 0, "seconds": 0.0}
        inside = dict.fromkeys(("finalize", "curves"), 0.0)
        images = dict.fromkeys(inside, 0)
        stepped = dict.fromkeys(inside, 0)

        def watched(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                before = dict(total)
                began = clock(device)
                result = hook(*args)
                inside[name] += clock(device) - began
                images[name] += int(total["images"] - before["images"])
                stepped[name] += int(total["optimizer_steps"] - before["optimizer_steps"])
                return result

            return call

        for name in inside:
            setattr(run.strategy, name, watched(name, getattr(run.strategy, name)))
        run.model.head.register_forward_hook(lambda module, given, out: total.update(images=total["images"] + len(out)))
        handle = register_optimizer_step_post_hook(
            lambda *_: total.update(optimizer_steps=total["optimizer_steps"] + 1)
        )
        seconds = timed(lambda: finish(run), device)
        handle.remove()
        splits = {"val": data.size("val"), "test": data.size("test")}
        splits |= {f"ood/{domain}": data.size(f"ood/{domain}") for domain in data.ood_domains}
    return {
        "model": task.model.name,
        "epochs": args.epochs,
        "values": len(LAMBDA_GRID),
        "training_steps_of_the_trial": total["optimizer_steps"] - sum(stepped.values()),
        "training_steps_of_the_sweep": sum(stepped.values()),
        "images_of_the_splits": splits,
        "passes_over_validation": images["finalize"] / splits["val"],
        "passes_over_test_and_ood": images["curves"] / sum(n for split, n in splits.items() if split != "val"),
        "seconds": inside,
        "seconds_of_the_trial": seconds,
        "share_of_the_trial": {name: value / seconds for name, value in inside.items()},
    }


def main() -> None:
    """Command line; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1, help="of one round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=20, help="of the trial with the sweep")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "step": steps(args, device), "sweep": sweep(args, device)}, indent=2))


if __name__ == "__main__":
    main()
