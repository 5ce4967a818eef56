"""Cost of Luthier's training loop against a hand-written loop on the same network and tensors.

    python -m benchmarks.step --model resnet18 --strategy full --device cuda

Needs torch and timm only. Both sides use the same precision, memory format and optimiser kernel, and train the
parameters that the strategy moves; their rounds alternate, so that a busy machine slows both. Prints one JSON object:
seconds per step (median over rounds), their ratio (Luthier / by hand; with ready tensors, and with Luthier's own data
path from uint8 pixels), images per second and, on a GPU, the peak memory of either side.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from trainables import strategy_class
from trainables.data.trial_data import TrialData
from trainables.engine.contract import TrainingConfig
from trainables.engine.loop import PhaseSteps, set_training_mode, train_unit
from trainables.engine.optim import rate_factor
from trainables.engine.phase_trainer import PhaseTrainer
from trainables.models.backbone import load_pretrained
from trainables.models.precision import autocast, resolve_precision
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.tasks.classification import new_classifier
from trainables.tasks.registry import task_of

CLASSES = 10


@dataclass
class NoiseStore:
    """Random pixels under the interface of the Arrow store."""

    side: int
    count: int

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        self.pixels = generator.integers(0, 256, (self.count, self.side, self.side, 3), dtype=np.uint8)
        self.classes = [str(k) for k in range(CLASSES)]
        self.domains = ["noise"]
        self.splits = ["train", "val"]
        self.digest = f"noise-{self.side}"
        self.path = ""
        self.image_size = self.side

    def images(self, split: str) -> NDArray[np.uint8]:
        return self.pixels

    def labels(self, split: str) -> NDArray[np.int64]:
        return np.arange(self.count, dtype=np.int64) % CLASSES

    def domain_ids(self, split: str) -> NDArray[np.int64]:
        return np.zeros(self.count, dtype=np.int64)

    def names(self, split: str) -> list[str]:
        return [str(index) for index in range(len(self.labels(split)))]

    def groups(self, split: str) -> NDArray[np.int64]:
        return np.full(self.count, -1, np.int64)

    def fraction(self, split: str, f: float) -> int:
        return self.count


class ByHand:
    """Hand-written loop for one network: autocast, fused optimiser, one device read per epoch."""

    def __init__(self, training: PhaseTrainer) -> None:
        self.model: nn.Module = copy.deepcopy(training.model)
        self.config = training.config
        self.dtype = training.dtype
        self.total = training.total_steps
        names = {id(p): n for n, p in training.model.named_parameters()}
        parameters = dict(self.model.named_parameters())
        tables = [
            {"params": [parameters[names[id(p)]] for p in table["params"]], "lr": table["initial_lr"]}
            for table in training.optimizer.param_groups
        ]
        device = next(self.model.parameters()).device
        kind = torch.optim.AdamW if self.config.optimizer == "adamw" else torch.optim.SGD
        extra: dict[str, Any] = {} if kind is torch.optim.AdamW else {"momentum": self.config.momentum}
        self.optimizer = kind(tables, weight_decay=self.config.weight_decay, fused=device.type == "cuda", **extra)
        self.rates = [table["lr"] for table in tables]
        backbone = self.model.backbone
        assert isinstance(backbone, nn.Module)
        set_training_mode(self.model, backbone, self.config.bn_mode, training.head_only)

    def unit(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        total = torch.zeros((), device=batches[0][0].device)
        correct = torch.zeros((), device=batches[0][0].device)
        for step, (images, labels) in enumerate(batches):
            for table, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                table["lr"] = rate * rate_factor(step, self.total, self.config)
            with autocast(images.device, self.dtype):
                logits = self.model(images)
                loss = functional.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach()
            correct += (logits.argmax(1) == labels).sum()
        return float(total) + float(correct)


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds of one synchronised call, and its peak GPU memory in bytes (0 on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Time both sides in alternating rounds."""
    device = torch.device(args.device)
    hparams = json.loads(args.hparams)
    strategy = strategy_class(args.strategy).from_hparams(hparams)
    if not isinstance(strategy.config, TrainingConfig):
        raise SystemExit(f"A strategy that trains by gradient has steps to time, but {args.strategy!r} has none.")
    with tempfile.TemporaryDirectory() as cache:
        task = SharedTrialSettings(
            store="", model=ModelSpec(name=args.model, pretrained=False), batch_size=args.batch_size, cache=cache
        )
        backbone = load_pretrained(task.model, args.image_size)
        side = backbone.data_config.image_size
        store = NoiseStore(side, args.batch_size * args.steps)
        data = TrialData(TrialSpec(shared=task, strategy=args.strategy), store, backbone, device)
        model = new_classifier(backbone, CLASSES, device, seed=0)
        if device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        prepared = strategy.prepare(model, data).state
        phase = next(p for p in strategy.phases(1) if p.solve is None)
        dtype = resolve_precision(args.precision, device)
        training = PhaseTrainer(
            model, strategy, task_of(data), phase, data, prepared=prepared, unit_steps=args.steps, dtype=dtype
        )
        hand = ByHand(training)
        batches = list(data.batches("train", shuffle_seed=0, drop_last=True))
        sides = {
            "by_hand": lambda: hand.unit(batches),
            "luthier": lambda: ready_unit(training, batches),
            "luthier_with_data": lambda: training.unit(0, 0, 0),
        }
        return measure(sides, device, args) | {"image_size": side, "precision": str(dtype)}


def ready_unit(training: PhaseTrainer, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Run Luthier's `train_unit` on prepared tensors."""
    set_training_mode(training.model, training.model.backbone, training.config.bn_mode, training.head_only)
    steps = PhaseSteps(
        forward=training.model, optimizer=training.optimizer, config=training.config, task=training.task,
        total_steps=training.total_steps, dtype=training.dtype,
    )  # fmt: skip
    train_unit(steps, batches, 0)


def measure(
    sides: Mapping[str, Callable[[], object]], device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Time alternating rounds; the first of each side is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory = dict.fromkeys(sides, 0)
    for number in range(args.rounds + 1):
        for name, work in sides.items():
            took, peak = timed(work, device)
            if number > 0:
                seconds[name].append(took / args.steps)
                memory[name] = max(memory[name], peak)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = zip(seconds["luthier"], seconds["by_hand"], strict=True)
    with_data = zip(seconds["luthier_with_data"], seconds["by_hand"], strict=True)
    return {
        "model": args.model,
        "strategy": args.strategy,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "batch_size": args.batch_size,
        "seconds_per_step": middle,
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratio_with_data": statistics.median(a / b for a, b in with_data),
        "images_per_second": {name: args.batch_size / value for name, value in middle.items()},
        "peak_memory_bytes": memory if device.type == "cuda" else None,
    }


def main() -> None:
    """Command line; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--strategy", default="full")
    parser.add_argument("--hparams", default="{}", help="JSON object of the strategy's hyperparameters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--image-size", type=int, help="None = the network's own")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    print(json.dumps(compare(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
