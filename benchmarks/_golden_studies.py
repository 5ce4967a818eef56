"""The three studies of the golden record: small, one trial at a time, on the CPU alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

ALL = ["shift", "distortion", "cka", "plasticity", "gradients"]
SHIFTED = ["inverted", "noisy", "blurred"]

STUDIES: dict[str, dict[str, Any]] = {
    "vit": {
        "model": {"name": "digits_vit"},
        "data": {"source": "digits", "ood": SHIFTED, "train_fraction": 0.4},
        "strategies": [
            "linear_probe",
            {"name": "full", "fixed": {"wise": "sweep"}},
            {
                "name": "full",
                "label": "full_adamw",
                "fixed": {
                    "optimizer": "adamw", "weight_decay": 0.05, "warmup": 0.2, "label_smoothing": 0.1,
                    "clip_norm": 1.0, "schedule": "constant", "lr_head": 1e-3, "head_rate": "absolute", "wise": 0.5,
                },
            },
            "lp_ft",
            {"name": "layernorm", "fixed": {"lam_choice": "sweep"}},
            {
                "name": "layernorm",
                "label": "layernorm_cycles",
                "fixed": {"cycles": 1, "lam_choice": "learned", "lam_scope": "layer", "rescale": "both"},
            },
            {"name": "lora", "fixed": {"rank": 4}},
            "bitfit",
            "components",
        ],
        "search": {"trials": 14, "epochs": 3, "reduction": 2, "seed": 5},
        "confirm": {"top_k": 9, "seeds": 1},
        "diagnostics": {"measure": ALL, "plasticity_pairs": 16},
    },
    "cnn": {
        "model": {"name": "digits_cnn"},
        "data": {"source": "digits", "ood": SHIFTED, "train_fraction": 0.3, "augment": ["flip", "crop"], "seed": 1},
        "strategies": [
            "linear_probe",
            {"name": "full", "fixed": {"bn_mode": "eval", "bn_conversion": True}},
            "lp_ft",
            {"name": "lp_ft", "label": "lp_ft_paper", "preset": "paper"},
            "daft",
            {"name": "daft", "label": "daft_unconverted", "fixed": {"bn_conversion": False}},
            "bitfit",
        ],
        "search": {
            "trials": 17, "epochs": 2, "reduction": 2, "seed": 6, "batch_size": 32, "sampler": "gp",
            "objective": "val_domain:inverted",
        },
        "confirm": {"top_k": 2, "seeds": 3},
        "diagnostics": {"measure": ["shift", "distortion", "cka", "gradients"]},
    },
    "folds": {
        "model": {"name": "digits_vit"},
        "data": {"id": ["bright", "dim", "pale"], "ood": ["inverted", "striped"], "train_fraction": 0.7},
        "strategies": ["layernorm", "full"],
        "search": {
            "trials": 4, "epochs": 2, "steps_per_unit": 6, "seed": 7, "sampler": "random", "scheduler": "none",
            "objective": "leave_one_domain_out",
        },
        "confirm": {"top_k": 2, "seeds": 2},
        "diagnostics": {
            "measure": ["shift"], "plasticity_probe": "in_situ", "plasticity_source": "inverted",
            "plasticity_pairs": 16, "fsr": ["full", "extrapolated", "oracle"], "fsr_seeds": 2,
        },
    },
}  # fmt: skip
"""Name → fields of a study. `vit`: seven strategies, every diagnostic, TPE, rungs. `cnn`: BatchNorm and its conversion,
augmentation, a published sweep, the Gaussian process, a validation domain. `folds`: leave-one-domain-out, FSR."""

Pixels = NDArray[np.float64]
DOMAINS: dict[str, Callable[[Pixels], Pixels]] = {
    "bright": lambda ink: 255 - 15 * ink,
    "dim": lambda ink: 120 - 7 * ink,
    "pale": lambda ink: 250 - 4 * ink,
    "inverted": lambda ink: 15 * ink,
    "striped": lambda ink: (255 - 15 * ink) * (1 - 0.5 * (np.arange(8) % 2)),
}
"""Name → ink (0 to 16) to grey values: the domains of the study `folds`, which needs several to train on."""
PER_DOMAIN = 240


def write_images(folder: Path) -> Path:
    """Write digits as `folder/<domain>/<class>/*.png`, different ones per domain; returns `folder`."""
    digits = load_digits()
    for index, (domain, shade) in enumerate(DOMAINS.items()):
        for number in range(index * PER_DOMAIN, (index + 1) * PER_DOMAIN):
            file = folder / domain / str(digits.target[number]) / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(shade(digits.images[number]).astype(np.uint8))
            image.resize((32, 32), Image.Resampling.NEAREST).save(file)
    return folder


def fields(name: str, storage: Path, images: Path) -> dict[str, Any]:
    """Fields of one of `STUDIES`, with its storage and data folder."""
    study = {"name": name, **STUDIES[name], "storage": str(storage)}
    study["resources"] = {"cpus": 1, "gpus": 0, "concurrent": 1, "channels_last": False}
    if "source" in study["data"]:
        return study
    return study | {"data": {**study["data"], "root": str(images)}}
