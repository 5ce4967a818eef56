"""Code of an exported MLflow model: it is copied into the model's folder, and needs timm and torch, not Luthier."""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import timm
import torch


class TimmModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Normalised images (B, 3, S, S) float32 → logits (B, K), by a folder in timm's `local-dir` layout."""

    def load_context(self, context: Any) -> None:
        self.network = timm.create_model(f"local-dir:{context.artifacts['model']}", pretrained=True).eval()

    # Without types: MLflow would take them for a schema of single inputs, and the signature says more.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            logits = self.network(torch.from_numpy(np.ascontiguousarray(model_input, dtype=np.float32)))
        return np.asarray(logits.numpy())


mlflow.models.set_model(TimmModel())
