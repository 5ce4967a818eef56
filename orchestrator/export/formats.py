"""Formats of exported models: what each writes, and how it is read back for the comparison."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import timm
import torch
from torch import Tensor, nn

from orchestrator.export.errors import ExportError, RefusedExportError
from orchestrator.export.proof import Runner
from orchestrator.export.timm_folder import write_config, write_weights
from trainables.models.backbone import DataConfig
from trainables.models.low_rank import LowRankUpdate
from trainables.models.timm_classifier import TimmClassifier
from trainables.storage.checkpoint_format import save_tensors

ONNX = "model.onnx"
TORCH_EXPORT = "model.pt2"
ADAPTER = "adapter_model.safetensors"
BACKBONE = "backbone."
"""Beginning of the names of a task model's backbone."""
PEFT = "base_model.model."
"""Beginning of the names in an adapter file."""
EXAMPLE = 2
"""Pictures in the example that a network is traced with. With one, torch fixes the batch to one without a warning."""


@dataclass(frozen=True)
class AdapterMaterial:
    """Low-rank updates before they were merged, and the network that they belong to."""

    update: LowRankUpdate
    base: TimmClassifier
    """The pretrained network under an untrained classifier."""


@dataclass(frozen=True)
class Material:
    """What formats are made of."""

    classifier: TimmClassifier
    """The tuned network; adapters merged."""
    classes: Sequence[str]
    """Names, in the order of the logits."""
    preprocessing: DataConfig
    adapter: AdapterMaterial | None = None
    """None = the network was not tuned by low-rank updates alone."""


@dataclass(frozen=True)
class Written:
    """What a format has written."""

    files: Sequence[str]
    """Names below the folder, of those with a digest in luthier.json."""
    run: Runner
    """The model as it was read back."""
    usage: str
    """Python code that reads it without Luthier."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For luthier.json, as JSON values."""


MaterialType = TypeVar("MaterialType")


@dataclass(frozen=True)
class Format(Generic[MaterialType]):
    """A kind of exported folder."""

    write: Callable[[Path, MaterialType], Written]
    tolerance: float
    """Largest difference of a logit, as a share of the largest."""


class OnnxNetwork(nn.Module):
    """A network in ONNX: images (B, 3, S, S) → logits (B, K); computed by onnxruntime on the CPU.

    Raises:
        ExportError: onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        require_onnx("onnxruntime")
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        pixels = np.ascontiguousarray(images.cpu().numpy())
        return torch.from_numpy(self.session.run(["logits"], {"images": pixels})[0])


def write_timm(folder: Path, material: Material) -> Written:
    """config.json and model.safetensors, read back by timm itself."""
    write_config(folder, material.classifier, material.classes, material.preprocessing)
    write_weights(folder, material.classifier.module)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return Written(("config.json", "model.safetensors"), network, _TIMM_USAGE)


def write_onnx(folder: Path, material: Material) -> Written:
    """model.onnx with a free batch axis, class names and preprocessing in its metadata; config.json beside it.

    Raises:
        ExportError: onnx, onnxruntime or onnxscript is not installed, or the network cannot be traced.
    """
    require_onnx("onnx", "onnxruntime", "onnxscript")
    import onnx

    write_config(folder, material.classifier, material.classes, material.preprocessing)
    path = folder / ONNX
    try:
        torch.onnx.export(
            material.classifier.module,
            (_example(material.preprocessing),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # tracing fails in as many ways as networks are written
        raise _untraceable("ONNX", material.classifier, error) from error
    proto = onnx.load(str(path))
    preprocessing = material.preprocessing
    side = preprocessing.image_size
    metadata = {
        "class_names": json.dumps(list(material.classes)),
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


def write_torch_export(folder: Path, material: Material) -> Written:
    """model.pt2 with a free batch axis; config.json beside it.

    Raises:
        ExportError: the network cannot be traced with a free batch axis.
    """
    write_config(folder, material.classifier, material.classes, material.preprocessing)
    path = folder / TORCH_EXPORT
    try:
        program = torch.export.export(
            material.classifier.module,
            (_example(material.preprocessing),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
        torch.export.save(program, str(path), extra_files={"class_names.json": json.dumps(list(material.classes))})
    except Exception as error:  # tracing fails in as many ways as networks are written
        raise _untraceable("torch.export", material.classifier, error) from error
    return Written(("config.json", TORCH_EXPORT), read_program(path), _TORCH_EXPORT_USAGE)


def read_program(path: Path) -> Runner:
    """A program of torch.export that this process has just written: its file may hold code."""
    module: Runner = torch.export.load(str(path)).module()
    return module


def read_pyfunc(folder: Path) -> Runner:
    """A model of MLflow that this process has just written: its folder holds code."""
    import mlflow

    loaded = mlflow.pyfunc.load_model(str(folder))
    return lambda images: torch.from_numpy(np.asarray(loaded.predict(images.numpy())))


def write_peft(folder: Path, material: Material) -> Written:
    """An adapter folder of peft: A and B of every tuned map, and the head; config.json beside it.

    Raises:
        ExportError: peft is not installed.
        RefusedExportError: the network was not tuned by low-rank updates.
    """
    adapter = material.adapter
    if adapter is None:
        raise RefusedExportError(
            "The format peft holds low-rank updates, but this trial has none that give its weights. Use --format timm."
        )
    if importlib.util.find_spec("peft") is None:
        raise ExportError('The format peft needs peft, which is not installed. pip install "luthier[lora]"')
    import peft

    update = adapter.update
    paths = {target: target.removeprefix(BACKBONE) for target in update.targets}
    heads = material.classifier.heads
    config = peft.LoraConfig(
        r=update.rank,
        lora_alpha=int(update.alpha) if float(update.alpha).is_integer() else update.alpha,
        target_modules=list(paths.values()),
        modules_to_save=list(heads),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    state: dict[str, Tensor] = {}
    for target, path in paths.items():
        for part in ("lora_A", "lora_B"):
            state[f"{PEFT}{path}.{part}.weight"] = update.tensors[f"{target}.{part}"]
    for head in heads:
        for name, value in material.classifier.module.get_submodule(head).state_dict().items():
            state[f"{PEFT}{head}.{name}"] = value
    write_config(folder, material.classifier, material.classes, material.preprocessing)
    config.save_pretrained(str(folder))
    save_tensors(state, folder / ADAPTER, metadata={"format": "pt"})
    base = copy.deepcopy(adapter.base.module)
    network = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    digest = backbone_digest(adapter.base)
    architecture = adapter.base.architecture
    facts = {"base_model": {"architecture": architecture.name, "model_args": architecture.model_args, "sha256": digest}}
    arguments = "".join(f", {name}={value!r}" for name, value in architecture.model_args.items())
    usage = (
        _PEFT_USAGE.replace("ARCHITECTURE", architecture.name)
        .replace("CLASSES", str(len(material.classes)))
        .replace("ARGUMENTS", arguments)
        .replace("HEADS", repr(heads))
        .replace("DIGEST", digest)
    )
    return Written(("config.json", "adapter_config.json", ADAPTER), network, usage, facts)


def write_mlflow(folder: Path, material: Material) -> Written:
    """A model of MLflow whose code is text and whose weights are safetensors: nothing of it is pickled."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    side = material.preprocessing.image_size
    floats = np.dtype(np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(floats, (-1, 3, side, side))]),
        outputs=Schema([TensorSpec(floats, (-1, len(material.classes)))]),
    )
    with tempfile.TemporaryDirectory() as temporary:
        network = Path(temporary) / "model"
        network.mkdir()
        write_config(network, material.classifier, material.classes, material.preprocessing)
        write_weights(network, material.classifier.module)
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("mlflow_code.py")),
            artifacts={"model": str(network)},
            signature=signature,
            input_example=_example(material.preprocessing).numpy(),
            pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "timm", "torch")],
        )
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return Written(files, read_pyfunc(folder), _MLFLOW_USAGE)


def backbone_digest(classifier: TimmClassifier) -> str:
    """SHA-256 over the names and bytes of all tensors but the classifier's, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(classifier.module.state_dict().items()):
        if not name.startswith(tuple(f"{head}." for head in classifier.heads)):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


FORMATS: dict[str, Format[Material]] = {
    "timm": Format(write_timm, 1e-5),
    "onnx": Format(write_onnx, 1e-4),
    "torch_export": Format(write_torch_export, 1e-5),
    "mlflow": Format(write_mlflow, 1e-5),
    "peft": Format(write_peft, 1e-5),
}
"""Values of `luthier export --format`."""


def _example(preprocessing: DataConfig) -> Tensor:
    side = preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(EXAMPLE, 3, side, side, generator=generator)


def require_onnx(*packages: str) -> None:
    """Refuse a format whose libraries are not installed.

    Raises:
        ExportError: one of the packages is missing.
    """
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


PICTURES = """
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
{PICTURES}
model = timm.create_model("local-dir:DIR", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model))
with torch.no_grad():
    logits = model(transform(rgb("picture.jpg"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax(1)])
"""

_PEFT_USAGE = """
import hashlib, json, timm
from peft import PeftModel

# The base must be the network that was tuned, with its pretrained weights: compare the digest.
base = timm.create_model("ARCHITECTURE", num_classes=CLASSESARGUMENTS)  # and load the pretrained weights
digest = hashlib.sha256()
for name, tensor in sorted(base.state_dict().items()):
    if not name.startswith(tuple(f"{head}." for head in HEADS)):
        digest.update(name.encode() + tensor.numpy().tobytes())
assert digest.hexdigest() == "DIGEST", "another base network"
model = PeftModel.from_pretrained(base, "DIR").eval()  # the adapter brings the head; .merge_and_unload() merges it
classes = json.load(open("DIR/config.json"))["label_names"]
"""

_MLFLOW_USAGE = f"""
import glob, json, mlflow
from timm.data import create_transform
{PICTURES}
model = mlflow.pyfunc.load_model("DIR")
config = json.load(open(glob.glob("DIR/artifacts/*/config.json")[0]))
names = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
transform = create_transform(**{{name: config["pretrained_cfg"][name] for name in names}})
logits = model.predict(transform(rgb("picture.jpg"))[None].numpy())
print(config["label_names"][logits.argmax(1)[0]])
"""

_ONNX_USAGE = f"""
import json, onnxruntime
from timm.data import create_transform
{PICTURES}
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
{PICTURES}
files = {{"class_names.json": ""}}
model = torch.export.load("DIR/model.pt2", extra_files=files).module()
classes = json.loads(files["class_names.json"])
config = json.load(open("DIR/config.json"))["pretrained_cfg"]
names = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
transform = create_transform(**{{name: config[name] for name in names}})
print(classes[model(transform(rgb("picture.jpg"))[None]).argmax()])
"""
