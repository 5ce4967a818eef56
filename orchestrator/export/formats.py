"""Formats of exported models: what each writes, and how it is read back for the comparison."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from orchestrator.export.errors import ExportError
from orchestrator.export.proof import Runner
from orchestrator.export.timm_folder import write_config, write_weights
from trainables.models.backbone import DataConfig
from trainables.models.timm_classifier import TimmClassifier

ONNX = "model.onnx"
TORCH_EXPORT = "model.pt2"
EXAMPLE = 2
"""Pictures in the example that a network is traced with. With one, torch fixes the batch to one without a warning."""


@dataclass(frozen=True)
class Written:
    """What a format has written."""

    files: Sequence[str]
    """Names below the folder, of those with a digest in luthier.json."""
    run: Runner
    """The model as it was read back."""
    usage: str
    """Python code that reads it without Luthier."""


@dataclass(frozen=True)
class Format:
    """A kind of exported folder."""

    write: Callable[[Path, TimmClassifier, Sequence[str], DataConfig], Written]
    tolerance: float
    """Largest difference of a logit, as a share of the largest."""


class OnnxNetwork(nn.Module):
    """A network in ONNX: images (B, 3, S, S) → logits (B, K); computed by onnxruntime on the CPU.

    Raises:
        ExportError: onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        _require_onnx("onnxruntime")
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(images.cpu().numpy())
        return torch.from_numpy(self.session.run(["logits"], {"images": pixels})[0])


def write_timm(folder: Path, classifier: TimmClassifier, classes: Sequence[str], preprocessing: DataConfig) -> Written:
    """config.json and model.safetensors, read back by timm itself."""
    write_config(folder, classifier, classes, preprocessing)
    write_weights(folder, classifier.module)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return Written(("config.json", "model.safetensors"), network, _TIMM_USAGE)


def write_onnx(folder: Path, classifier: TimmClassifier, classes: Sequence[str], preprocessing: DataConfig) -> Written:
    """model.onnx with a free batch axis, class names and preprocessing in its metadata; config.json beside it.

    Raises:
        ExportError: onnx, onnxruntime or onnxscript is not installed, or the network cannot be traced.
    """
    _require_onnx("onnx", "onnxruntime", "onnxscript")
    import onnx

    write_config(folder, classifier, classes, preprocessing)
    path = folder / ONNX
    try:
        torch.onnx.export(
            classifier.module,
            (_example(preprocessing),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # tracing fails in as many ways as networks are written
        raise _untraceable("ONNX", classifier, error) from error
    proto = onnx.load(str(path))
    side = preprocessing.image_size
    metadata = {
        "class_names": json.dumps(list(classes)),
        "preprocessing": json.dumps(
            {
                "resize_shorter_side": preprocessing.stored_size,
                "center_crop": side,
                "interpolation": preprocessing.interpolation,
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
                "scale": "pixel / 255, then (x - mean) / std",
            }
        ),
    }
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))
    network = OnnxNetwork(path)
    shape = network.session.get_inputs()[0].shape
    if not isinstance(shape[0], str) or list(shape[1:]) != [3, side, side]:
        raise ExportError(
            f"An ONNX model must have a free first axis and fixed others (3, {side}, {side}), but its input is {shape}."
        )

    return Written(("config.json", ONNX), network, _ONNX_USAGE)


def write_torch_export(
    folder: Path, classifier: TimmClassifier, classes: Sequence[str], preprocessing: DataConfig
) -> Written:
    """model.pt2 with a free batch axis; config.json beside it.

    Raises:
        ExportError: the network cannot be traced with a free batch axis.
    """
    write_config(folder, classifier, classes, preprocessing)
    path = folder / TORCH_EXPORT
    try:
        program = torch.export.export(
            classifier.module,
            (_example(preprocessing),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
        torch.export.save(program, str(path), extra_files={"class_names.json": json.dumps(list(classes))})
    except Exception as error:  # tracing fails in as many ways as networks are written
        raise _untraceable("torch.export", classifier, error) from error
    module: Any = torch.export.load(str(path)).module()
    return Written(("config.json", TORCH_EXPORT), module, _TORCH_EXPORT_USAGE)


FORMATS: dict[str, Format] = {
    "timm": Format(write_timm, 1e-5),
    "onnx": Format(write_onnx, 1e-4),
    "torch_export": Format(write_torch_export, 1e-5),
}
"""Values of `luthier export --format`."""


def _example(preprocessing: DataConfig) -> Tensor:
    side = preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(EXAMPLE, 3, side, side, generator=generator)


def _require_onnx(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(
            f'The format onnx needs {", ".join(missing)}, which is not installed. pip install "luthier[onnx]"'
        )


def _untraceable(target: str, classifier: TimmClassifier, error: Exception) -> ExportError:
    reason = " ".join(str(error).split())[:300]
    return ExportError(
        f"{classifier.architecture.name} cannot be written as {target} with a free batch axis "
        f"({type(error).__name__}: {reason}). Use --format timm."
    )


_PICTURES = """
from PIL import Image, ImageOps

def rgb(path):
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
"""

_TIMM_USAGE = f"""
import timm, torch
from timm.data import create_transform, resolve_model_data_config
{_PICTURES}
model = timm.create_model("local-dir:DIR", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model))
with torch.no_grad():
    logits = model(transform(rgb("picture.jpg"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax(1)])
"""

_ONNX_USAGE = f"""
import json, onnxruntime
from timm.data import create_transform
{_PICTURES}
session = onnxruntime.InferenceSession("DIR/model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
config = json.load(open("DIR/config.json"))["pretrained_cfg"]
names = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
transform = create_transform(**{{name: config[name] for name in names}})
images = transform(rgb("picture.jpg"))[None].numpy()
print(classes[session.run(["logits"], {{"images": images}})[0].argmax()])
"""

_TORCH_EXPORT_USAGE = f"""
import json, torch
from timm.data import create_transform
{_PICTURES}
files = {{"class_names.json": ""}}
model = torch.export.load("DIR/model.pt2", extra_files=files).module()
classes = json.loads(files["class_names.json"])
config = json.load(open("DIR/config.json"))["pretrained_cfg"]
names = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
transform = create_transform(**{{name: config[name] for name in names}})
print(classes[model(transform(rgb("picture.jpg"))[None]).argmax()])
"""
