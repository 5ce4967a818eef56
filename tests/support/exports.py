"""Tuned networks and finished studies for tests of exports, and processes that have never heard of Luthier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from orchestrator.export.card import CardFacts
from orchestrator.export.export import TunedModel
from orchestrator.planning.build import make_task
from orchestrator.record.journal import Journal
from orchestrator.record.kept_paths import predictions_file, weights_folder
from orchestrator.record.records import declared_metrics
from orchestrator.study import Study
from trainables.engine.trial import Trial
from trainables.models.backbone import load_pretrained
from trainables.specs.trial_spec import ModelSpec, TrialSpec
from trainables.storage.kept_predictions import save_predictions
from trainables.storage.kept_weights import save_weights
from trainables.tasks.classification import new_classifier

BLOCKED = ("luthier", "orchestrator", "trainables", "search_spaces", "tests", "benchmarks")
"""Packages that a fresh process cannot import."""

_BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
"""

CONFIRMED = (
    {"strategy": "full", "hparams": {"lr_backbone": 0.01}, "seed": 1},
    {"strategy": "full", "hparams": {"lr_backbone": 0.01}, "seed": 2, "role": "confirm"},
    {"strategy": "linear_probe", "seed": 3},
)
"""Trials of `confirmed_study`: a search trial, its confirmation, and a search trial of another entry."""

COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200), (200, 60, 200))


def fresh(code: str, folder: Path, **values: Any) -> Any:
    """Run code in another process and folder, without Luthier on the import path.

    Args:
        code: has `values` as variables, and assigns JSON values to `result`.
        folder: the working folder.

    Returns:
        `result`.
    """
    output = folder / "fresh-result.json"
    script = "\n".join(
        [
            _BLOCK,
            "import json",
            f"globals().update(json.loads({json.dumps(json.dumps(values))}))",
            textwrap.dedent(code),
            f"open({str(output)!r}, 'w').write(json.dumps(result))",
        ]
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=110
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(output.read_text())


def pictures(root: Path, classes: Sequence[str], count: int = 12, suffix: str = ".jpg", first: int = 0) -> Path:
    """`root/<class>/*`: pictures of 48 x 36, 36 x 48 and odd sizes, in the class's colour with noise and a stripe."""
    sizes = ((48, 36), (36, 48), (47, 33), (33, 50), (36, 36))
    for kind, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            width, height = sizes[number % len(sizes)]
            rng = np.random.default_rng(1000 * kind + number)
            noise = rng.integers(-30, 31, (height, width, 3))
            values = np.array(COLOURS[kind % len(COLOURS)]) + noise
            values[number % 20 : number % 20 + 4] = 255 - np.array(COLOURS[kind % len(COLOURS)])
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}{suffix}", quality=95)
    return root


def tuned(
    name: str,
    classes: Sequence[str] = ("cat", "dog", "fox"),
    image_size: int = 32,
    seed: int = 0,
    pixels: np.ndarray | None = None,
) -> TunedModel:
    """A network of timm with random weights, as if it had been tuned: every tensor is moved, BatchNorm buffers too."""
    spec = ModelSpec(name=name, pretrained=False)
    backbone = load_pretrained(spec, image_size)
    network = new_classifier(backbone, len(classes), "cpu", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand(tensor.shape, generator=generator))
    side = backbone.data_config.stored_size
    if pixels is None:
        pixels = np.random.default_rng(seed).integers(0, 256, (9, side, side, 3), dtype=np.uint8)
    return TunedModel(
        network=network.eval(),
        spec=spec,
        preprocessing=backbone.data_config,
        classes=list(classes),
        facts=CardFacts(study="pets", trial=7, label="full", strategy="full", choice="Chosen for the test."),
        pictures=pixels,
    )


def confirmed_study(folder: Path, network: str = "test_resnet", count: int = 20, epochs: int = 1) -> Study:
    """`finished_study` of the trials `CONFIRMED`, on pictures of four classes whose names sort otherwise as numbers.

    Args:
        count: pictures of each class.
        epochs: see `finished_study`.
    """
    root = pictures(folder / "pictures", ["1", "2", "10", "11"], count=count)
    return finished_study(folder / "studies", root, {"name": network, "pretrained": False}, CONFIRMED, epochs=epochs)


def finished_study(
    folder: Path,
    root: Path,
    model: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]] = ({"strategy": "full"},),
    image_size: int | None = 32,
    epochs: int = 1,
    data: Mapping[str, Any] | None = None,
    task: str = "classification",
) -> Study:
    """A study whose trials were trained in this process: store, journal and kept weights, without a cluster.

    Args:
        folder: of all studies.
        root: pictures.
        trials: fields of each trial's `TrialSpec`.
        epochs: of each trial that trains by gradient.
        data: further keys of the section.
        task: of the study.
    """
    labels = list(dict.fromkeys(str(trial["strategy"]) for trial in trials))
    study = Study(
        name="pets",
        task=task,
        data={"root": str(root), **({} if image_size is None else {"image_size": image_size}), **(data or {})},
        model=dict(model),
        strategies=labels,
        search={"trials": len(labels), "epochs": epochs, "batch_size": 16},
        confirm={"top_k": 1, "seeds": 1},
        diagnostics={"measure": [], "plasticity": False},
        storage=str(folder),
    )
    store = study.prepare()
    shared = make_task(study.spec, store)
    study.folder.mkdir(parents=True)
    (study.folder / "study.yaml").write_text(json.dumps(study.spec.model_dump(mode="json")))
    with Journal(study.folder / "journal.jsonl") as journal:
        journal.append("study_started", study="pets", spec=study.spec.model_dump(mode="json"))
        for number, fields in enumerate(trials):
            spec = TrialSpec(shared=shared, **fields)
            trial = Trial(spec, device="cpu")
            trial.keeps_predictions = True
            while not trial.finished:
                metrics = trial.step()
            kept = save_weights(weights_folder(study.folder, number), trial.kept_weights(number))
            meta = {"number": number, "classes": store.classes}
            predictions = save_predictions(predictions_file(study.folder, number), trial.predictions, meta)
            trial_id = f"t{number}"
            journal.append(
                "trial_suggested",
                trial_id=trial_id,
                number=number,
                strategy=spec.strategy,
                label=spec.label or spec.strategy,
                hparams=dict(spec.hparams),
                seed=spec.seed,
                role=spec.role,
                sample=spec.sample,
                config_hash=spec.config_hash,
            )
            journal.append("trial_started", trial_id=trial_id)
            numbers = {**(trial.result or {}), **metrics}
            journal.append(
                "result",
                trial_id=trial_id,
                unit=trial.unit,
                metrics=declared_metrics(numbers),
                weights={"sha256": kept.sha256, "bytes": kept.bytes},
                predictions={"sha256": predictions.sha256, "bytes": predictions.bytes},
            )
            journal.append("trial_finished", trial_id=trial_id, state="complete")
        journal.append("study_finished", state="complete")
    return study
