"""What one trial costs beside its training: Luthier against plain Ray Tune with Ray's MLflow callback.

    python -m benchmarks.overhead --trials 100 --baseline-trials 10

Both sides run one-epoch linear probes on the built-in digits (a new C per trial), one trial at a time, on one local
cluster, with MLflow on a SQLite file. Overhead per trial = (wall time of the study − time inside `step`) / trials. The
baseline is careful use of the libraries alone: the model is built in `setup`, features and probe are computed in
`step`, a fresh actor serves each trial, `MLflowLoggerCallback` logs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def luthier_side(trials: int, storage: Path) -> dict[str, float]:
    """Seconds per trial outside `step` for a Luthier study of `trials` linear probes."""
    from orchestrator import Study

    study = Study(
        name="overhead",
        data={"source": "digits"},
        model={"name": "digits_vit"},
        strategies=[{"name": "linear_probe", "preset": "grid"}],
        search={"trials": trials, "epochs": 1, "sampler": "random", "scheduler": "none"},
        confirm={"top_k": 0},
        resources={"cpus": 1, "concurrent": 1, "channels_last": False},
        storage=str(storage),
    )
    study.prepare()
    started = time.perf_counter()
    results = study.run(progress=False)
    wall = time.perf_counter() - started
    inside = sum(unit["cost/unit_seconds"] for r in results.records for unit in r.history)
    return _row(wall, inside, len(results.records))


def baseline_side(trials: int, storage: Path) -> dict[str, float]:
    """The same probes through `tune.Tuner`, a fresh actor per trial, and Ray's MLflow callback."""
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    store = _digits_store(storage)
    callback = MLflowLoggerCallback(
        tracking_uri=f"sqlite:///{storage}/baseline.db", experiment_name="baseline", save_artifact=False
    )
    tuner = tune.Tuner(
        tune.with_resources(_plain_probe(), {"cpu": 1}),
        param_space={"C": tune.loguniform(1e-7, 1e2), "store": store},
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=1, reuse_actors=False),
        run_config=tune.RunConfig(name="baseline", storage_path=str(storage), callbacks=[callback], verbose=0),
    )
    started = time.perf_counter()
    grid = tuner.fit()
    wall = time.perf_counter() - started
    if grid.errors:
        raise RuntimeError(f"The baseline's trials must all finish, but {len(grid.errors)} failed: {grid.errors[0]}")
    return _row(wall, sum(r.metrics["step_seconds"] for r in grid), trials)


def _row(wall: float, inside: float, trials: int) -> dict[str, float]:
    return {"trials": trials, "wall_s": wall, "in_step_s": inside, "overhead_s_per_trial": (wall - inside) / trials}


def _digits_store(storage: Path) -> str:
    return str(next(p.parent for p in storage.rglob("data.arrow")))


def _plain_probe() -> type[Any]:
    from ray import tune

    class PlainProbe(tune.Trainable):
        """The trial by hand: build the network, extract features, fit the probe."""

        def setup(self, config: dict[str, Any]) -> None:
            from trainables.data.store import Store
            from trainables.models.backbone import load_pretrained
            from trainables.specs.trial_spec import ModelSpec

            self.backbone = load_pretrained(ModelSpec(name="digits_vit"))
            self.store = Store(config["store"])

        def step(self) -> dict[str, Any]:
            import torch

            from trainables.data.transforms import BatchTransform
            from trainables.linear_probe import fit_linear_probe

            started = time.perf_counter()
            data = self.backbone.data_config
            transform = BatchTransform(data.mean, data.std, data.image_size, ())
            features = {}
            with torch.no_grad():
                for split in ("train", "val"):
                    images = torch.from_numpy(np.array(self.store.images(split)))
                    features[split] = self.backbone.module(transform(images)).numpy()
            weight, bias = fit_linear_probe(features["train"], self.store.labels("train"), self.config["C"])
            logits = features["val"] @ np.asarray(weight).T + np.asarray(bias)
            accuracy = float((logits.argmax(1) == self.store.labels("val")).mean())
            return {"val_acc": accuracy, "step_seconds": time.perf_counter() - started, "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """A class Trainable must be able to save at its end; there is no state."""

    return PlainProbe


def main() -> None:
    """Run both sides and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--baseline-trials", type=int, default=10)
    args = parser.parse_args()
    from orchestrator.cluster.connection import connect

    with tempfile.TemporaryDirectory() as folder, connect(cpus=1):
        ours = luthier_side(args.trials, Path(folder))
        plain = baseline_side(args.baseline_trials, Path(folder))
    ratio = plain["overhead_s_per_trial"] / ours["overhead_s_per_trial"]
    print(json.dumps({"luthier": ours, "plain_ray_tune": plain, "times_less": ratio}, indent=2))


if __name__ == "__main__":
    main()
