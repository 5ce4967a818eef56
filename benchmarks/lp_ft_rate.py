"""Which parametrisation of LP-FT's rate lets one range serve solved heads of different scale.

    OMP_NUM_THREADS=1 python -m benchmarks.lp_ft_rate   # table; about two CPU minutes

The demo's two networks are fine-tuned on 320 handwritten digits for three epochs (SGD, momentum 0.9, cosine, batch 64,
BatchNorm frozen, head at 0.1 / E‖φ‖²) from the linear probe's solution of three values of C, whose heads differ in
norm by a decade, at six rates. A row shows accuracy and NLL on 200 validation images, and the rate times the solved
head's curvature (`trainables.lp_ft.head_curvature`): `-` has diverged.
"""

from __future__ import annotations

import argparse
import copy
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.feature_sets import _built_in
from trainables.demo import digits
from trainables.lp_ft import head_curvature
from trainables.tasks.logistic_path import logistic_path

NETWORKS = ("digits_cnn", "digits_vit")
PATH = (0.01, 0.3, 10.0)
RATES = tuple(10.0 ** (k / 2) for k in range(-8, -2))
TRAIN = 320
VALIDATION = 200
EPOCHS = 3
BATCH = 64
HEAD_RATE = 0.1


def images() -> tuple[Tensor, NDArray[np.int64]]:
    """Handwritten digits (1797, 3, 32, 32), normalised for the demo's networks, shuffled; labels."""
    pixels, labels = digits.handwritten_digits()
    order = np.random.default_rng(0).permutation(len(labels))
    tensor = torch.from_numpy(pixels[order]).permute(0, 3, 1, 2).float() / 255
    return (tensor - 0.5) / 0.5, labels[order]


def fine_tune(network: nn.Module, head: nn.Linear, inputs: Tensor, labels: Tensor, rate: float, unit: float) -> None:
    """Train backbone and head in place; `unit` is E‖φ‖²."""
    network.eval()
    groups = [{"params": network.parameters(), "lr": rate}, {"params": head.parameters(), "lr": HEAD_RATE / unit}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    steps = EPOCHS * (TRAIN // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN, generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(head(network(inputs[batch])), labels[batch]).backward()
            optimizer.step()
            schedule.step()


def main() -> None:
    """Run and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    inputs, labels = images()
    targets = torch.from_numpy(labels)
    validation = slice(TRAIN, TRAIN + VALIDATION)
    for name in NETWORKS:
        pretrained = _built_in(name).eval()
        with torch.no_grad():
            features = pretrained(inputs[:TRAIN]).double().numpy()
        mean = features.mean()
        scale = features.std()
        unit = float(np.square(features).sum(1).mean())
        solutions = logistic_path((features - mean) / scale, labels[:TRAIN], PATH)
        for C, (rows, offsets) in zip(PATH, solutions, strict=True):
            weight = rows / scale
            bias = offsets - rows.sum(1) * mean / scale
            curvature = head_curvature(features, weight, bias)
            print(f"{name}, C = {C:g}, curvature {curvature:.3g}: rate, relative rate, accuracy, NLL")
            for rate in RATES:
                network = copy.deepcopy(pretrained)
                head = nn.Linear(weight.shape[1], weight.shape[0])
                with torch.no_grad():
                    head.weight.copy_(torch.from_numpy(weight))
                    head.bias.copy_(torch.from_numpy(bias))
                fine_tune(network, head, inputs, targets, rate, unit)
                with torch.no_grad():
                    logits = head(network(inputs[validation]))
                nll = float(cross_entropy(logits, targets[validation]))
                accuracy = float((logits.argmax(1) == targets[validation]).double().mean())
                shown = f"{accuracy:6.1%} {nll:6.2f}" if nll < math.log(10) else "-"
                print(f"  {rate:8.2g} {rate * curvature:8.2g}  {shown}", flush=True)


if __name__ == "__main__":
    main()
