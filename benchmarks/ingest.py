"""Ingest rate, and images per second of the mapped store against timm's `ImageDataset` and torch's `DataLoader`.

Writes a folder of 4 domains x 1,600 images of 8 classes, 64 px (letters rendered from matplotlib's fonts: as printed,
inverted, noisy, blurred; JPEG), reads it into a store, and then draws shuffled, normalised batches from both, in turns,
in this one process: with the same crop and normalisation, then with random flips too. torch uses one thread.

    python -m benchmarks.ingest [--rounds 3] [--batch-size 64] [--images 1600] [--keep FOLDER]

Prints one JSON object: rates in images per second, and ratios store / timm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from orchestrator.ingest.check import check
from orchestrator.ingest.decoding import available_cpus
from orchestrator.ingest.pipeline import IngestRequest, ingest
from trainables.data.square_images import gather_images, to_device
from trainables.data.store import Store
from trainables.data.transforms import BatchTransform
from trainables.demo.digits import SHIFTS, render, shift
from trainables.specs.seeds import stream_seed

CLASSES = "ABCDEFGH"
SIDE = 64
DOMAINS = ("printed", "inverted", "noisy", "blurred")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def make_folder(root: Path, per_domain: int, seed: int = 0) -> int:
    """Write `root/<domain>/<class>/<number>.jpg`; returns the number of images."""
    for domain in DOMAINS:
        images, labels = render(CLASSES, per_domain // len(CLASSES), stream_seed(seed, domain), SIDE)
        if domain in SHIFTS:
            images = shift(images, domain, stream_seed(seed, domain, "shift"))
        for name in CLASSES:
            (root / domain / name).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(root / domain / CLASSES[label] / f"{number:05d}.jpg", quality=92)
    return len(DOMAINS) * len(labels)


def store_batches(store: Store, batch_size: int, augment: tuple[str, ...]) -> Iterator[torch.Tensor]:
    """One pass over all splits, shuffled, the way a trial does it."""
    transform = BatchTransform(MEAN, STD, SIDE, augment)
    generator = torch.Generator().manual_seed(0) if augment else None
    cpu = torch.device("cpu")
    for split in store.splits:
        order = np.random.default_rng(0).permutation(len(store.labels(split)))
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            to_device(store.labels(split)[indices], cpu)
            yield transform(gather_images(store, split, indices, cpu), generator)


def timm_batches(root: Path, batch_size: int, augment: bool, workers: int) -> Iterator[torch.Tensor]:
    """The usual loader on the same folder: decode, resize, crop, (flip,) normalise, in each epoch."""
    from timm.data import ImageDataset, create_transform
    from torchvision import transforms

    transform = create_transform(SIDE, is_training=False, mean=MEAN, std=STD, interpolation="bicubic", crop_pct=1.0)
    if augment:
        transform = transforms.Compose(
            [*transform.transforms[:-2], transforms.RandomHorizontalFlip(), *transform.transforms[-2:]]
        )
    loader = torch.utils.data.DataLoader(
        ImageDataset(str(root), transform=transform), batch_size=batch_size, shuffle=True, num_workers=workers
    )
    for images, _ in loader:
        yield images


def rate(batches: Iterator[torch.Tensor]) -> float:
    """Images per second of a pass, the start of workers included, as every epoch has it."""
    started = time.perf_counter()
    count = sum(len(batch) for batch in batches)
    return count / (time.perf_counter() - started)


def compare(root: Path, store: Store, batch_size: int, rounds: int) -> dict[str, Any]:
    """Median rates of `rounds` passes of each kind, which take turns."""
    kinds: dict[str, Callable[[], Iterator[torch.Tensor]]] = {}
    for name, augment in (("plain", ()), ("flip", ("flip",))):
        kinds[f"store_{name}"] = lambda augment=augment: store_batches(store, batch_size, augment)
        for workers in (0, 2):
            kinds[f"timm_{name}_{workers}_workers"] = lambda augment=augment, workers=workers: timm_batches(
                root, batch_size, bool(augment), workers
            )
    rates_by_kind: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, batches in kinds.items():
            rates_by_kind[name].append(rate(batches()))
    rates = {name: round(statistics.median(values)) for name, values in rates_by_kind.items()}
    ratios = {
        name.replace("timm", "store_over_timm"): round(rates[f"store_{name.split('_')[1]}"] / value, 1)
        for name, value in rates.items()
        if name.startswith("timm")
    }
    return {"images_per_second": rates, "ratios": ratios}


def main() -> None:
    """Make the folder, ingest it, compare, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=1600, help="per domain")
    parser.add_argument("--keep", type=Path, help="write the images and the store to this folder and keep them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        root = folder / "letters"
        images = make_folder(root, args.images)
        request = IngestRequest(
            source="folder", root=str(root), id=("printed",), ood=DOMAINS[1:], image_size=SIDE, interpolation="bicubic"
        )
        started = time.perf_counter()
        store = ingest(request, folder / "stores")
        ingest_seconds = time.perf_counter() - started
        started = time.perf_counter()
        ingest(request, folder / "stores")
        again_seconds = time.perf_counter() - started
        started = time.perf_counter()
        check(root)
        check_seconds = time.perf_counter() - started
        result = {
            "images": images,
            "cpus": available_cpus(),
            "ingest": {
                "seconds": round(ingest_seconds, 2),
                "images_per_second": round(images / ingest_seconds),
                "again_seconds": round(again_seconds, 3),
                "check_images_per_second": round(images / check_seconds),
            },
            **compare(root, store, args.batch_size, args.rounds),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
