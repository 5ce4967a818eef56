"""Peak memory of a whole trial, one process each: what a rung and the final evaluation cost beside training.

    python -m benchmarks.memory [--model vit_small_patch16_224] [--strategies full layernorm lora] [--batch-size 4]

Random weights, random images, CPU, two units of one step with an evaluation after each. Prints one JSON object per
strategy: the process's peak resident memory (`resource.getrusage`), and the weights' size for comparison. Small
batches, so that weights and not activations decide.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from typing import Any

MEBIBYTE = 1 << 20


def measure(model: str, strategy: str, batch_size: int) -> dict[str, Any]:
    """Run one trial in this process and return its peak."""
    import torch

    from benchmarks.step import NoiseStore
    from trainables.engine.trial import Trial
    from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        shared = SharedTrialSettings(
            store="memory",
            model=ModelSpec(name=model, pretrained=False),
            epochs=2,
            steps_per_unit=1,
            batch_size=batch_size,
            eval_batch_size=batch_size,
            evaluate_at=(1,),
            diagnostics=(),
            cache=cache,
        )
        hparams = {} if strategy == "linear_probe" else {"head_rate": "absolute", "lr_backbone": 1e-4}
        store = NoiseStore(224, batch_size)
        store.splits = ["train", "val", "test"]
        trial = Trial(TrialSpec(shared=shared, strategy=strategy, hparams=hparams), store=store, device="cpu")
        while not trial.finished:
            trial.step()
        weights = sum(value.nbytes for value in trial.model.state_dict().values())
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "model": model,
        "strategy": strategy,
        "batch_size": batch_size,
        "weights_mib": round(weights / MEBIBYTE),
        "peak_mib": round(peak / MEBIBYTE),
    }


def main() -> None:
    """Print one JSON object per strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--strategies", nargs="+", default=["full", "layernorm", "lora"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--one", action="store_true", help="measure in this process (used by the command itself)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.model, args.strategies[0], args.batch_size)), flush=True)
        return
    for strategy in args.strategies:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", "--model", args.model]
        command += ["--strategies", strategy, "--batch-size", str(args.batch_size)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
