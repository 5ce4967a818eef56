"""Pairs of a pretrained network and a set of pictures, and the designs that are trained on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from benchmarks.landscapes import material
from benchmarks.landscapes.material import Counts, Pixels
from orchestrator import Study
from orchestrator.planning.build import make_task
from trainables.specs.trial_spec import SharedTrialSettings

CONVOLUTIONAL = ("linear_probe", "full", "daft", "lp_ft", "bitfit")
TRANSFORMER = ("linear_probe", "full", "lp_ft", "layernorm", "bitfit", "components", "lora")

FOURTEEN_PER_LETTER = Counts(546)

Pictures = Callable[[Path, int, Counts, int], dict[str, dict[str, Pixels]]]


@dataclass(frozen=True)
class Pair:
    """A network, pictures, and how much of the search spaces is trained on them."""

    model: str
    strategies: tuple[str, ...]
    configurations: int
    """Random points per strategy, the default point included."""
    repeated: int
    """Best configurations per strategy that are trained on `SEEDS` in all."""
    pictures: Pictures | None = None
    """None = the built-in digits."""
    weights: Callable[[Path], dict[str, Any]] | None = None
    """None = a built-in network."""
    counts: Counts = FOURTEEN_PER_LETTER
    side: int | None = None
    """Of the pictures and of what the network sees, in pixels; None = the network's own."""
    channels_last: bool = False
    train_fraction: float = 1.0
    batch_size: int = 32
    epochs: int = 8


SEEDS = (0, 1, 2)

EFFICIENTNET: dict[str, Any] = {
    "model": "tf_efficientnet_lite0",
    "weights": material.efficientnet_lite0,
    "side": 64,
    # The faster layout of depthwise convolutions on CPUs.
    "channels_last": True,
}
DINOV2: dict[str, Any] = {"model": "vit_small_patch14_dinov2", "weights": material.dinov2_small, "side": 56}

PAIRS: dict[str, Pair] = {
    # Dense: tables that searches of hundreds of trials can be replayed on.
    "digits_cnn-digits": Pair("digits_cnn", CONVOLUTIONAL, 60, 10, train_fraction=0.3, batch_size=64),
    "digits_vit-digits": Pair("digits_vit", TRANSFORMER, 60, 10, train_fraction=0.3, batch_size=64),
    # Real networks.
    "efficientnet-letters": Pair(
        strategies=CONVOLUTIONAL, configurations=15, repeated=5, pictures=material.letters, **EFFICIENTNET
    ),
    "dinov2-scripts": Pair(
        strategies=TRANSFORMER, configurations=15, repeated=5, pictures=material.scripts, counts=Counts(400), **DINOV2
    ),
    # Scarce: eight and ten pictures of each class.
    "efficientnet-crops": Pair(
        strategies=CONVOLUTIONAL, configurations=15, repeated=5, pictures=material.crops, counts=Counts(96),
        batch_size=16, **EFFICIENTNET,
    ),
    "dinov2-letters": Pair(
        strategies=TRANSFORMER, configurations=15, repeated=5, pictures=material.letters, counts=Counts(390), **DINOV2
    ),
}  # fmt: skip

HELD_OUT = Pair(
    strategies=CONVOLUTIONAL,
    configurations=0,
    repeated=0,
    pictures=material.scripts,
    counts=Counts(400),
    **EFFICIENTNET,
)
"""Outside all landscapes: whole real searches confirm on it what a replay decided."""

PICTURE_SEED = 0


def prepare(name: str, pair: Pair, source: Path, folder: Path) -> SharedTrialSettings:
    """Settings of the trials of a pair; its pictures and weights are written once.

    Args:
        source: what `material.fetch` wrote.
        folder: gets pictures, weights and store.
    """
    data, model = study_fields(name, pair, source, folder)
    study = Study(
        name=name,
        data=data,
        model=model,
        strategies=["full"],
        search={"epochs": pair.epochs, "batch_size": pair.batch_size},
        diagnostics={"measure": [], "plasticity": False},
        resources={"channels_last": pair.channels_last},
        storage=str(folder / "storage"),
    )
    store = study.prepare()
    task = make_task(study.spec, store)
    # Every unit: a replay stops trials wherever its scheduler does.
    return SharedTrialSettings(**{**vars(task), "evaluate_at": tuple(range(1, pair.epochs + 1))})


def study_fields(name: str, pair: Pair, source: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`data` and `model` of a study file on a pair."""
    data: dict[str, Any] = {"train_fraction": pair.train_fraction, "image_size": pair.side}
    model: dict[str, Any] = {"name": pair.model}
    if pair.pictures is None:
        data["source"] = "digits"
    else:
        domains = _write_pictures(pair, source, folder / "pictures" / name)
        data |= {"source": "npz", "root": str(folder / "pictures" / name), "id": domains[:1], "ood": domains[1:]}
    if pair.weights is not None:
        file = folder / "weights" / f"{pair.model}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in pair.weights(source).items()}, file)
        model["weights"] = str(file)
    return data, model


def _write_pictures(pair: Pair, source: Path, folder: Path) -> list[str]:
    """Write one `.npz` file per domain, once; returns the domains, the one in distribution first."""
    order = folder / "domains.txt"
    if not order.exists():
        assert pair.pictures is not None
        assert pair.side is not None
        folder.mkdir(parents=True, exist_ok=True)
        domains = pair.pictures(source, pair.side, pair.counts, PICTURE_SEED)
        for domain, arrays in domains.items():
            np.savez(folder / f"{domain}.npz", **arrays)  # type: ignore[arg-type]
        order.write_text("\n".join(domains))
    return order.read_text().split("\n")
