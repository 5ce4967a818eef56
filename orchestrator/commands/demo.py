"""`luthier demo`: five strategies on real data, on two cores and without a download.

Classification: two studies, one on a small vision transformer and one on a small BatchNorm network, both pretrained on
digits rendered from fonts and tuned on handwritten digits; inverted, rotated, noisy, blurred and printed digits are the
OOD domains. Segmentation: one study, the BatchNorm network under a decoder, on handwritten digits in photographs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.cluster.connection import connect
from orchestrator.commands.run_summary import print_summary
from orchestrator.study import Study
from trainables.specs.metrics import CLASSIFICATION, SEGMENTATION

if TYPE_CHECKING:
    from orchestrator.results.study_results import Results

STRATEGIES: dict[str, list[object]] = {
    "digits_vit": ["linear_probe", "full", "lp_ft", {"name": "layernorm", "fixed": {"lam_choice": "sweep"}}],
    "digits_cnn": ["linear_probe", "full", "lp_ft", "daft"],
}
"""Network → strategies: LayerNorm tuning needs the transformer, DAFT needs BatchNorm."""


def demo_study(backbone: str, storage: Path, trials: int = 12, epochs: int = 4) -> dict[str, object]:
    """The fields of one of the demo's studies.

    `luthier demo` runs one for each network of `STRATEGIES`.
    """
    diagnostics: dict[str, object] = {"plasticity_source": "printed"}
    if backbone == "digits_vit":
        diagnostics |= {"fsr": ["extrapolated"], "fsr_seeds": 2}
    return {
        "name": f"demo-{backbone.removeprefix('digits_')}",
        "data": {"source": "digits"},
        "model": {"name": backbone},
        "strategies": STRATEGIES[backbone],
        "search": {"trials": trials, "epochs": epochs, "sampler": "tpe", "scheduler": "asha", "seed": 0},
        "confirm": {"top_k": 4, "seeds": 3},
        "diagnostics": diagnostics,
        "tracking": {"experiment": "luthier-demo"},
        "storage": str(storage),
    }


SCENES_BACKBONE = "digits_cnn"


def scenes_study(storage: Path, trials: int = 12, epochs: int = 8) -> dict[str, object]:
    """The fields of the demo's study of segmentation."""
    return {
        "name": "demo-scenes",
        "task": "segmentation",
        "data": {"source": "digits_scenes", "image_size": 64},
        "model": {"name": SCENES_BACKBONE},
        "strategies": ["linear_probe", "full", "lp_ft", "daft"],
        # Nine tenths of the pixels are background: cross-entropy alone predicts nothing else for the first epochs.
        "loss": {"dice": 1.0},
        "search": {"trials": trials, "epochs": epochs, "batch_size": 8, "schedule": "poly", "grace": 3},
        "confirm": {"top_k": 4, "seeds": 3},
        "diagnostics": {"measure": ["shift"], "plasticity": False},
        "tracking": {"experiment": "luthier-demo"},
        "storage": str(storage),
    }


def _demo_studies(task: str, storage: Path, trials: int) -> Iterator[tuple[Study, str]]:
    """The studies of a task, each with its heading."""
    if task == SEGMENTATION.task:
        study = Study(**scenes_study(storage, trials))
        yield study, f"{study.spec.name}: {SCENES_BACKBONE} under DeepLabv3+, handwritten digits in photographs"
        return
    for backbone in STRATEGIES:
        study = Study(**demo_study(backbone, storage, trials))
        yield study, f"{study.spec.name}: {backbone}, pretrained on printed digits, tuned on handwritten ones"


def run_demo(
    storage: Path,
    trials: int = 12,
    progress: bool = True,
    console: Console | None = None,
    task: str = CLASSIFICATION.task,
) -> list[Results]:
    """Run the demo studies of a task on one cluster and print leaderboards and the next commands.

    Args:
        storage: folder for the studies, the store and the tracking database.
        trials: search trials per study.
        progress: show the live table.
        console: None = one on stdout.
        task: classification or segmentation.
    """
    console = console or Console()
    all_results = []
    # Once for all studies, which use a connection that exists: starting a cluster takes seconds.
    with connect():
        for study, heading in _demo_studies(task, storage, trials):
            console.rule(heading)
            results = study.run(progress=progress)
            print_summary(console, study, results)
            all_results.append(results)
    return all_results
