"""Export of a study's chosen model for MLflow's registry: `luthier export --format mlflow`, in a process of its own.

The tracking process loads neither torch nor timm, and an export that is killed or runs out of memory costs the delivery
nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import redact
from orchestrator.tracking.client import CREDENTIAL_VARIABLES

EXPORT_TIMEOUT_S = 600.0
"""Longest export; on a CPU most of it is the comparison on the test pictures."""
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class ModelExportError(RuntimeError):
    """The chosen model cannot be exported; the message is free of secrets."""


@dataclass(frozen=True)
class ExportedModel:
    """The exported model of one trial."""

    folder: Path
    """In the layout that `mlflow.pyfunc.load_model` reads; temporary, see `remove`."""
    trial: int
    """Its number in the study."""
    label: str
    reason: str
    """Why this trial and no other, in a sentence."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Hyperparameters."""

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


Exporter = Callable[[Path, str], ExportedModel]
"""(folder of a study, identity of the server) → its chosen model (ModelExportError: there is none)."""


def export_chosen_model(study: Path, target: str) -> ExportedModel:
    """Export the model that `luthier export` chooses, beside the study's other files.

    Args:
        study: its folder.
        target: identifies the server: deliveries to two of them do not share a folder.

    Raises:
        ModelExportError: the weights are not kept, a comparison failed, the disk is full, …
    """
    temporary = study / f".mlflow-model-{target}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a delivery that was killed
    folder = temporary / "model"
    command = [sys.executable, "-P", "-m", "luthier", "--json", "export", str(study), "--format", "mlflow"]
    path = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if name not in CREDENTIAL_VARIABLES}
    environment |= {"PYTHONPATH": os.pathsep.join(path), "MLFLOW_TRACKING_URI": f"sqlite:///{temporary}/mlflow.db"}
    try:
        temporary.mkdir()
        ended = subprocess.run(
            [*command, "--to", str(folder)], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            cwd=temporary, env=environment, timeout=EXPORT_TIMEOUT_S, check=False,
        )  # fmt: skip
        result = _result(ended)
        card = json.loads((folder / "luthier.json").read_text(encoding="utf-8"))["card"]
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, subprocess.TimeoutExpired):
            raise ModelExportError(f"its export has not ended within {EXPORT_TIMEOUT_S:.0f} s") from error
        if isinstance(error, OSError | ValueError | KeyError | TypeError):
            raise ModelExportError(redact(f"{type(error).__name__}: {error}")) from error
        raise
    params = {name: str(value) for name, value in card["hparams"].items()}
    return ExportedModel(folder, int(result["trial"]), str(result["label"]), str(result["reason"]), params)


def _result(ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The command's result (ModelExportError: it failed)."""
    try:
        result: dict[str, Any] = json.loads(ended.stdout)
    except ValueError:
        result = {}
    if ended.returncode == 0 and "trial" in result:
        return result
    message = (result.get("error") or {}).get("message") or ended.stderr.strip().rpartition("\n")[2]
    reason = f"exit code {ended.returncode}" if not message else str(message)
    raise ModelExportError(redact(reason)[:500])
