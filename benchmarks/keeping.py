"""Size and time of keeping a trial's weights and predictions, beside the trial itself.

    python -m benchmarks.keeping [--model vit_small_patch16_224] [--strategies layernorm lora full] [--images 64]

Random weights, random images, one thread, CPU; one unit over the training images, then the end of a trial with and
without keeping, on the same network. Prints one JSON object per strategy: bytes on the disk, seconds of writing
(synced) and of reading, the unit with and without collecting predictions (an additional pass over validation), and
the share of the writing in a trial of 20 such units.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

UNITS = 20
"""Units of the trial that the writing is compared with: the default of `search.epochs`."""


def measure(model: str, strategy: str, images: int) -> dict[str, Any]:
    """Train one unit, keep its result, and compare."""
    import torch

    from benchmarks.step import NoiseStore
    from trainables.engine.trial import Trial
    from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
    from trainables.storage.kept_predictions import save_predictions
    from trainables.storage.kept_weights import load_weights, save_weights

    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shared = SharedTrialSettings(
            store="memory",
            model=ModelSpec(name=model, pretrained=False),
            epochs=1,
            batch_size=16,
            diagnostics=(),
            cache=folder,
        )
        hparams = {} if strategy == "linear_probe" else {"head_rate": "absolute", "lr_backbone": 1e-4}
        spec = TrialSpec(shared=shared, strategy=strategy, hparams=hparams)
        for keeps in (False, True):
            store = NoiseStore(224, images)
            store.splits = ["train", "val", "test"]
            trial = Trial(spec, store=store, device="cpu")
            trial.keeps_predictions = keeps
            began = time.perf_counter()
            trial.step()
            seconds["with" if keeps else "without"] = time.perf_counter() - began
        began = time.perf_counter()
        weights = save_weights(root / "weights", trial.kept_weights(0))
        seconds["weights"] = time.perf_counter() - began
        began = time.perf_counter()
        predictions = save_predictions(root / "predictions.arrow", trial.predictions, {"number": 0})
        seconds["predictions"] = time.perf_counter() - began
        began = time.perf_counter()
        load_weights(root / "weights")
        seconds["load"] = time.perf_counter() - began
    written = seconds["weights"] + seconds["predictions"]
    return {
        "model": model,
        "strategy": strategy,
        "images": images,
        "weights_bytes": weights.bytes,
        "predictions_bytes": predictions.bytes,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "writing_share_of_trial": round(written / (UNITS * seconds["without"]), 5),
    }


def main() -> None:
    """Print one JSON object per strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--strategies", nargs="+", default=["layernorm", "lora", "full"])
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    for strategy in args.strategies:
        print(json.dumps(measure(args.model, strategy, args.images)), flush=True)


if __name__ == "__main__":
    main()
