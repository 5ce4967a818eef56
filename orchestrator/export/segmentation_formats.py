"""Formats of exported segmentation models: what each writes, and how it is read back for the comparison."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.export.errors import ExportError, RefusedExportError
from orchestrator.export.formats import (
    EXAMPLE,
    ONNX,
    PICTURES,
    TORCH_EXPORT,
    Format,
    OnnxNetwork,
    Written,
    read_program,
    read_pyfunc,
    require_onnx,
)
from orchestrator.export.proof import Runner, resized
from orchestrator.export.segmentation_folder import (
    DECODER,
    SegmentationSettings,
    load_segmentation_network,
    read_segmentation_folder,
    write_segmentation_config,
    write_segmentation_weights,
)
from orchestrator.export.timm_folder import CONFIG, WEIGHTS
from trainables.tasks.segmentation import DenseModel

CODE = "mlflow_segmentation_code.py"
AGREEMENT = 1e-4
"""Largest difference of a logit, as a share of the largest, at which a traced network takes images of any size."""


@dataclass(frozen=True)
class SegmentationMaterial:
    """What formats are made of."""

    network: DenseModel
    """The tuned network, adapters merged; on the CPU, in eval mode."""
    encoder: nn.Module
    """Its encoder as timm builds it, without classifier."""
    settings: SegmentationSettings


def other_sizes(side: int) -> list[tuple[int, int]]:
    """Heights and widths beside a network's own, at which a free size is compared: no multiples of a stride."""
    return [(side + 13, side + 37), (2 * side + 1, side)]


@torch.no_grad()
def takes_any_size(network: nn.Module, side: int) -> bool:
    """Whether a network takes images of other sizes than its own."""
    parameter = next(network.parameters())
    try:
        for height, width in other_sizes(side):
            network(parameter.new_zeros(1, 3, height, width))
    except (RuntimeError, AssertionError, ValueError):  # timm refuses a size by `assert`
        return False
    return True


def write_timm(folder: Path, material: SegmentationMaterial) -> Written:
    """config.json, model.safetensors (encoder) and decoder.safetensors, read back from the folder alone."""
    write_segmentation_config(folder, material.encoder, material.settings)
    write_segmentation_weights(folder, material.encoder, material.network.head)
    network = load_segmentation_network(read_segmentation_folder(folder))
    return Written((CONFIG, WEIGHTS, DECODER), network, _TIMM_USAGE, _free(takes_any_size(network, _side(material))))


def write_onnx(folder: Path, material: SegmentationMaterial) -> Written:
    """model.onnx with a free batch axis and, where the encoder allows, free height and width; config.json beside it.

    Raises:
        ExportError: onnx, onnxruntime or onnxscript is not installed, or the network cannot be traced.
    """
    write_segmentation_config(folder, material.encoder, material.settings)
    run, free = _write_graph(folder / ONNX, material)
    return Written((CONFIG, ONNX), run, _ONNX_USAGE + _usage(material), _free(free))


def write_torch_export(folder: Path, material: SegmentationMaterial) -> Written:
    """model.pt2 with a free batch axis and, where the encoder allows, free height and width; config.json beside it.

    Raises:
        ExportError: the network cannot be traced with a free batch axis.
    """
    write_segmentation_config(folder, material.encoder, material.settings)
    path = folder / TORCH_EXPORT
    names = {"class_names.json": json.dumps(list(material.settings.classes))}

    def trace(shapes: Mapping[int, Any]) -> Runner:
        program = torch.export.export(
            material.network,
            (_example(material),),
            dynamic_shapes=(shapes,),
            # Sizes of maps are compared at run time: as guards they would fix the images' size.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        torch.export.save(program, str(path), extra_files=dict(names))
        return read_program(path)

    run, free = _traced("torch.export", material, trace)
    return Written((CONFIG, TORCH_EXPORT), run, _TORCH_EXPORT_USAGE + _usage(material), _free(free))


def write_mlflow(folder: Path, material: SegmentationMaterial) -> Written:
    """A model of MLflow whose code is text and whose network is the ONNX graph: nothing of it is pickled.

    Raises:
        ExportError: onnx, onnxruntime or onnxscript is not installed, or the network cannot be traced.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    floats = np.dtype(np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        write_segmentation_config(model, material.encoder, material.settings)
        _, free = _write_graph(model / ONNX, material)
        side = -1 if free else _side(material)
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name(CODE)),
            artifacts={"model": str(model)},
            signature=ModelSignature(
                inputs=Schema([TensorSpec(floats, (-1, 3, side, side))]),
                outputs=Schema([TensorSpec(floats, (-1, len(material.settings.classes), -1, -1))]),
            ),
            input_example=_example(material).numpy(),
            pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "numpy", "onnxruntime")],
        )
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return Written(files, read_pyfunc(folder), _MLFLOW_USAGE + _usage(material), _free(free))


SEGMENTATION_FORMATS: dict[str, Format[SegmentationMaterial]] = {
    "timm": Format(write_timm, 1e-5),
    "onnx": Format(write_onnx, 1e-4),
    "torch_export": Format(write_torch_export, 1e-5),
    "mlflow": Format(write_mlflow, 1e-4),
}
"""Values of `luthier export --format` for segmentation."""


def check_segmentation_format(name: str) -> None:
    """Refuse a format that holds classifiers alone.

    Raises:
        RefusedExportError: segmentation has no such format.
    """
    if name not in SEGMENTATION_FORMATS:
        raise RefusedExportError(
            f"A segmentation model is exported as one of {', '.join(SEGMENTATION_FORMATS)}, but got {name!r}: a peft "
            "adapter fits on one base network, and a segmentation model is an encoder under a decoder. Adapters are "
            "merged in the other formats."
        )


def _write_graph(path: Path, material: SegmentationMaterial) -> tuple[Runner, bool]:
    """Write an ONNX graph with class names and preprocessing in its metadata; see `_traced`."""
    require_onnx("onnx", "onnxruntime", "onnxscript")
    import onnx

    settings = material.settings
    side = _side(material)

    def trace(shapes: Mapping[int, Any]) -> Runner:
        torch.onnx.export(
            material.network,
            (_example(material),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(shapes,),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        proto = onnx.load(str(path))
        preprocessing = {
            "view": settings.evaluation,
            "side": side,
            "sides": "any" if len(shapes) > 1 else [side, side],
            "mean": list(settings.preprocessing.mean),
            "std": list(settings.preprocessing.std),
            "scale": "pixel / 255, then (x - mean) / std, then zeros below and to the right",
        }
        metadata = {"class_names": json.dumps(list(settings.classes)), "preprocessing": json.dumps(preprocessing)}
        onnx.helper.set_model_props(proto, metadata)
        onnx.checker.check_model(proto)
        onnx.save(proto, str(path))
        network = OnnxNetwork(path)
        shape = network.session.get_inputs()[0].shape
        free = [axis for axis, size in enumerate(shape) if isinstance(size, str)]
        if free != sorted(shapes):
            raise ExportError(f"Axes {sorted(shapes)} of an ONNX model must be free, but its input is {shape}.")
        return network

    return _traced("ONNX", material, trace)


@torch.no_grad()
def _traced(
    target: str, material: SegmentationMaterial, trace: Callable[[Mapping[int, Any]], Runner]
) -> tuple[Runner, bool]:
    """A traced network, and whether it takes images of any size.

    Free height and width are tried first; where they fail or change the logits, the network's own side is fixed.

    Args:
        target: name of the format.
        material: its network is traced.
        trace: free axes of the images → the network as it was read back.

    Raises:
        ExportError: it cannot be traced with a free batch axis.
    """
    network = material.network
    side = _side(material)
    batch = {0: torch.export.Dim("batch", min=1)}
    if takes_any_size(network, side):
        smallest = side // 2 + 1
        free = {**batch, 2: torch.export.Dim("height", min=smallest), 3: torch.export.Dim("width", min=smallest)}
        try:
            run = trace(free)
            if all(_agrees(run, network, resized(_example(material), *size)) for size in other_sizes(side)):
                return run, True
        except Exception:  # tracing fails in as many ways as networks are written; the fixed side is the way out
            pass
    try:
        return trace(batch), False
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"{material.settings.architecture.name} under {material.settings.reading.decoder} cannot be written as "
            f"{target} with a free batch axis ({type(error).__name__}: {reason}). Use --format timm."
        ) from error


def _agrees(run: Runner, network: nn.Module, images: Tensor) -> bool:
    reference = network(images)
    logits = run(images)
    if logits.shape != reference.shape:
        return False
    return float((logits - reference).abs().max()) <= AGREEMENT * float(reference.abs().max())


def _side(material: SegmentationMaterial) -> int:
    return material.settings.preprocessing.image_size


def _example(material: SegmentationMaterial) -> Tensor:
    side = _side(material)
    return torch.randn(EXAMPLE, 3, side, side, generator=torch.Generator().manual_seed(0))


def _free(free: bool) -> dict[str, Any]:
    return {"any_size": free}


def _usage(material: SegmentationMaterial) -> str:
    """Code from a function `run` to the class indices of a picture, for the model's view."""
    settings = material.settings
    values = (
        f"side, mean, std = {_side(material)}, {list(settings.preprocessing.mean)}, {list(settings.preprocessing.std)}"
    )
    return f"{_SHARED_USAGE.replace('VALUES', values)}{_VIEW_USAGE[settings.evaluation]}"


_TIMM_USAGE = """
import luthier, timm

model = luthier.load("DIR")
masks = model.predict("pictures")  # path → class index of every pixel, (H, W) uint8
print(model.classes)

# The encoder alone needs no Luthier:
encoder = timm.create_model("local-dir:DIR", pretrained=True).eval()
"""

_ONNX_USAGE = """
import json, numpy, onnxruntime, torch

session = onnxruntime.InferenceSession("DIR/model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
run = lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
"""

_TORCH_EXPORT_USAGE = """
import json, numpy, torch

files = {"class_names.json": ""}
run = torch.export.load("DIR/model.pt2", extra_files=files).module()
classes = json.loads(files["class_names.json"])
"""

_MLFLOW_USAGE = """
import glob, json, mlflow, numpy, torch

model = mlflow.pyfunc.load_model("DIR")
classes = json.load(open(glob.glob("DIR/artifacts/*/config.json")[0]))["label_names"]
run = lambda images: torch.from_numpy(model.predict(images.numpy()))
"""

_SHARED_USAGE = f"""
from torch.nn import functional as F
{PICTURES}
VALUES
mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
picture = torch.from_numpy(numpy.array(rgb("picture.jpg"))).permute(2, 0, 1)[None].float()
height, width = picture.shape[2:]

def logits_of(part, rows, columns):  # part: 0…255, at most side x side; rows x columns pixels of the picture
    h, w = part.shape[2:]
    logits = run(F.pad((part / 255 - mean) / std, (0, side - w, 0, side - h))).detach()
    y = 2 * (torch.arange(rows) + 0.5) * h / rows / side - 1
    x = 2 * (torch.arange(columns) + 0.5) * w / columns / side - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    return F.grid_sample(logits, grid, mode="bilinear", padding_mode="border", align_corners=False)
"""

_VIEW_USAGE = {
    "resize": """
size = [max(1, round(length * side / max(height, width))) for length in (height, width)]
small = F.interpolate(picture, size, mode="bilinear", antialias=True)
mask = logits_of(small, height, width).argmax(1)[0]  # (height, width), indices into classes
""",
    "slide": """
def starts(length):
    steps = -(-max(0, length - side) // max(1, side - side // 3))
    return [(length - side) * step // steps for step in range(steps + 1)] if steps else [0]

total = torch.zeros(1, len(classes), height, width)
views = torch.zeros(height, width)
for top in starts(height):
    for left in starts(width):
        part = picture[:, :, top : top + side, left : left + side]
        box = (slice(top, top + part.shape[2]), slice(left, left + part.shape[3]))
        total[:, :, *box] += logits_of(part, *part.shape[2:])
        views[box] += 1
mask = (total / views).argmax(1)[0]  # (height, width), indices into classes
""",
}
