"""Code of an exported MLflow segmentation model, copied into the model's folder.

It needs numpy and onnxruntime, not Luthier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime


class OnnxModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Normalised images (B, 3, H, W) float32 → logits (B, K, h, w), by an ONNX graph on the CPU."""

    def load_context(self, context: Any) -> None:
        graph = Path(context.artifacts["model"]) / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    # Without types: MLflow would take them for a schema of single inputs, and the signature says more.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        images = np.ascontiguousarray(model_input, dtype=np.float32)
        return self.session.run(["logits"], {"images": images})[0]


mlflow.models.set_model(OnnxModel())
