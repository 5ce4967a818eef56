"""`luthier demo`: the whole promise on two cores, with nothing but this package – real data, four strategies.

Two studies, one on a small vision transformer and one on a small BatchNorm network, both pretrained on digits rendered
from fonts and tuned on handwritten digits; inverted, rotated, noisy, blurred and printed digits are the OOD domains.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from orchestrator.results import Results

BACKBONES = ("digits_vit", "digits_cnn")


def demo_study(backbone: str, storage: Path, trials: int = 12, epochs: int = 4) -> dict[str, object]:
    """The fields of one of the demo's studies; `luthier demo` runs one for each of `BACKBONES`."""
    return {
        "name": f"demo-{backbone.removeprefix('digits_')}",
        "data": {"source": "digits"},
        "model": {"name": backbone},
        "strategies": ["linear_probe", "full", "lp_ft", "daft"],
        "search": {"trials": trials, "epochs": epochs, "sampler": "tpe", "scheduler": "asha", "seed": 0},
        "confirm": {"top_k": 4, "seeds": 2},
        "tracking": {"experiment": "luthier-demo"},
        "storage": str(storage),
    }


def run_demo(storage: Path, trials: int = 12, progress: bool = True) -> list[Results]:
    """Run both demo studies on one cluster and print leaderboards and the next commands to stderr.

    Args:
        storage: folder for the studies, the store and the tracking database.
        trials: search trials per study.
        progress: show the live table.
    """
    from orchestrator.cluster import connect
    from orchestrator.study import Study

    console = Console(stderr=True)
    outcomes = []
    with connect():
        for backbone in BACKBONES:
            study = Study(**demo_study(backbone, storage, trials))
            console.rule(f"{study.spec.name}: {backbone} on handwritten digits")
            results = study.run(progress=progress)
            results.render(console)
            console.print(f"Study folder: {study.folder}")
            outcomes.append(results)
    database = storage.absolute() / "mlflow.db"
    console.print("\nCompare the runs in MLflow (http://127.0.0.1:5000):")
    uri = shlex.quote(f"sqlite:///{database}")
    console.print(f"  mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri {uri}", soft_wrap=True)
    return outcomes
