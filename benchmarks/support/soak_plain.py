"""Baseline of the soak: the same study in plain Ray Tune, following Ray's documentation.

Same network, data, units, trials and places of faults as Luthier's study. A checkpoint with every report, network and
optimiser and the order of the images included, so that a resumed epoch is the same epoch; the two newest are kept;
`max_failures` retries a trial; after the driver died, the same command restores the experiment and resumes what
was unfinished or failed; `MLflowLoggerCallback` records.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RETRIES = 3
NAME = "plain"
SETTINGS = "plain.json"
"""`store`, `uri`, `trials`, `units`, `steps` in the folder of the study."""
FINAL = "final.json"
"""Number of a trial → its last result; written at the end of the study."""
METRICS = ("val/acc", "train/loss")


def train(config: dict[str, Any]) -> None:
    """Train one trial, from its newest checkpoint if it has one."""
    import torch
    from ray import tune

    from trainables.specs.fault_injection import fault_context, fault_point

    torch.set_num_threads(1)
    study = Study(config)
    first = study.restore(tune.get_checkpoint())
    for epoch in range(first, config["units"] + 1):
        with fault_context(trial=config["number"], unit=epoch):
            fault_point("before_unit")
            loss = study.epoch(epoch)
            metrics = {"val/acc": study.accuracy(), "train/loss": loss, "epoch": epoch}
            fault_point("before_checkpoint")
            with tempfile.TemporaryDirectory() as folder:
                study.save(Path(folder), epoch)
                fault_point("in_checkpoint")
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
            fault_point("after_checkpoint")


class Study:
    """Network, optimiser and data of one trial."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch

        from trainables.data.store import Store
        from trainables.data.transforms import BatchTransform
        from trainables.models.backbone import load_pretrained
        from trainables.specs.trial_spec import ModelSpec
        from trainables.tasks.classification import new_classifier

        self.config = config
        store = Store(config["store"])
        backbone = load_pretrained(ModelSpec(name="digits_cnn"))
        data = backbone.data_config
        self.transform = BatchTransform(data.mean, data.std, data.image_size, ())
        self.images = {split: torch.from_numpy(np.array(store.images(split))) for split in ("train", "val")}
        self.labels = {split: torch.from_numpy(np.array(store.labels(split))) for split in ("train", "val")}
        self.model = new_classifier(backbone, len(store.classes), "cpu", seed=config["number"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config["lr"])

    def epoch(self, number: int, batch: int = 64) -> float:
        """Train the steps of one unit and return the mean loss; the batches depend on the epoch's number alone."""
        import torch
        from torch.nn import functional

        from trainables.specs.fault_injection import fault_point

        generator = torch.Generator().manual_seed(number)
        self.model.train()
        total = 0.0
        for step in range(1, self.config["steps"] + 1):
            chosen = torch.randint(len(self.labels["train"]), (batch,), generator=generator)
            logits = self.model(self.transform(self.images["train"][chosen]))
            loss = functional.cross_entropy(logits, self.labels["train"][chosen])
            fault_point("step", step=step)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            total += float(loss.detach())
        return total / self.config["steps"]

    def accuracy(self) -> float:
        """Accuracy on the validation images."""
        import torch

        self.model.eval()
        with torch.no_grad():
            predicted = self.model(self.transform(self.images["val"])).argmax(1)
        return float((predicted == self.labels["val"]).double().mean())

    def save(self, folder: Path, epoch: int) -> None:
        """Write everything that the next epoch depends on."""
        from safetensors.torch import save_file

        tensors = {f"model/{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{k}": v.contiguous() for k, v in state.items()}
        save_file(tensors, folder / "state.safetensors", {"epoch": str(epoch)})

    def restore(self, checkpoint: Any) -> int:
        """Restore a checkpoint; returns the number of the next epoch."""
        from safetensors import safe_open

        if checkpoint is None:
            return 1
        with checkpoint.as_directory() as folder, safe_open(f"{folder}/state.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            epoch = int(file.metadata()["epoch"])
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model/")})
        optimizer = self.optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                optimizer["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        return epoch + 1


def run(folder: Path) -> int:
    """Run or restore the study; returns the exit code: 0, or 3 where trials failed."""
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    settings = json.loads((folder / SETTINGS).read_text())
    ray.init(log_to_driver=False)
    trainable = tune.with_resources(train, {"cpu": 1})
    path = str(folder / NAME)
    space = {
        "number": tune.grid_search(list(range(settings["trials"]))),
        "lr": tune.sample_from(lambda config: 10 ** (-4.0 + config["number"] / settings["trials"])),
        **{name: settings[name] for name in ("store", "units", "steps")},
    }
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable, resume_errored=True, param_space=space)
    else:
        callback = MLflowLoggerCallback(tracking_uri=settings["uri"], experiment_name=NAME, save_artifact=False)
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(max_concurrent_trials=2),
            run_config=tune.RunConfig(
                name=NAME,
                storage_path=str(folder),
                callbacks=[callback],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
                verbose=0,
            ),
        )
    grid = tuner.fit()
    results = [r for r in grid if r.metrics and "epoch" in r.metrics]
    final = {r.config["number"]: {name: r.metrics[name] for name in ("epoch", *METRICS)} for r in results}
    (folder / FINAL).write_text(json.dumps(final))
    return 3 if grid.errors else 0
