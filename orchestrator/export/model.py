"""An exported model in Python: logits of images, predictions for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from orchestrator.export.formats import ONNX, OnnxNetwork
from orchestrator.export.pictures import images_or_files, list_pictures, upright_picture
from orchestrator.export.predictions import Predictions, predict_pictures, refuse_unreadable
from orchestrator.export.segmentation_folder import (
    is_segmentation,
    load_segmentation_network,
    read_segmentation_folder,
)
from orchestrator.export.segmentation_model import SegmentationModel
from orchestrator.export.timm_folder import CONFIG, load_network, read_folder, read_json
from orchestrator.ingest.images import square
from orchestrator.wording import listed
from trainables.data.transforms import BatchTransform
from trainables.models.backbone import DataConfig
from trainables.models.device import training_device

BATCH_SIZE = 64
"""Pictures per forward pass."""


class Model:
    """A classifier with its class names and its preprocessing.

    Args:
        network: images (B, 3, S, S) float32, normalised → logits (B, K); in eval mode.
        classes: names, in the order of the logits.
        preprocessing: as in training.
        device: where the network computes; None = the GPU if there is one, else the CPU.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        preprocessing: DataConfig,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = training_device() if device is None else torch.device(device)
        self.network = network.eval().to(self.device)
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self._transform = BatchTransform(preprocessing.mean, preprocessing.std, preprocessing.image_size, ())

    def __repr__(self) -> str:
        names = listed(self.classes, most=5)
        return f"<Model of {len(self.classes)} classes ({names}), {self.preprocessing.image_size} px, on {self.device}>"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) float32, on the CPU.

        Args:
            images: pixels (B, H, W, 3) uint8 of at least the network's side, of which the centre is cropped and
                normalised; or images (B, 3, S, S) float32 that are normalised already.
        """
        if images.dtype == torch.uint8:
            images = self._transform(images.to(self.device))
        logits: Tensor = self.network(images.to(self.device))
        return logits.float().cpu()

    def logits(self, pixels: NDArray[np.uint8], batch_size: int = BATCH_SIZE) -> NDArray[np.float32]:
        """Logits (n, K) of stored pixels (n, H, W, 3), in batches."""
        parts = [
            self(torch.tensor(pixels[start : start + batch_size])).numpy()
            for start in range(0, len(pixels), batch_size)
        ]
        empty = np.zeros((0, len(self.classes)), np.float32)
        return np.concatenate(parts) if parts else empty

    def predict(
        self, pictures: str | Path | Sequence[str | Path | Image.Image], batch_size: int = BATCH_SIZE
    ) -> pd.DataFrame:
        """One row per picture: `path`, `class`, `confidence`, and the probability of every class under its name.

        Args:
            pictures: a folder, a file, or a sequence of files, folders or Pillow images; images have their position
                as path.
            batch_size: pictures per forward pass; it changes nothing else.

        Raises:
            DataError: nothing there, or a picture that cannot be read (`luthier predict` lists these instead).
        """
        images, files = images_or_files(pictures)
        if images:
            pixels = np.stack([self.pixels(image) for image in images])
            names = [str(position) for position in range(len(images))]
            return Predictions.of(self, names, self.logits(pixels, batch_size)).to_frame()
        predictions = predict_pictures(self, list_pictures(files), batch_size)
        refuse_unreadable(predictions.unreadable)
        return predictions.to_frame()

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Pixels (H, H, 3) of one image as the training data store would hold them.

        Raises:
            ValueError: the image's mode has no declared range of values.
        """
        view = self.preprocessing
        return np.asarray(square(upright_picture(image), view.stored_size, view.interpolation, view.image_size))


def load(path: str | Path, device: torch.device | str | None = None) -> Model | SegmentationModel:
    """Load an exported model: a classifier, or a segmentation model.

    Args:
        path: folder of `luthier export` in the formats timm or onnx, or any in timm's `local-dir` layout with
            `label_names` and safetensors.
        device: see `Model`.

    Raises:
        ModelFolderError: no exported model, or a damaged one.
    """
    if is_segmentation(read_json(Path(path), CONFIG)):
        return _load_segmentation(path, device)
    folder = read_folder(path)
    graph = folder.path / ONNX
    network = OnnxNetwork(graph) if graph.exists() else load_network(folder)
    return Model(network, folder.classes, folder.preprocessing, device)


def _load_segmentation(path: str | Path, device: torch.device | str | None) -> SegmentationModel:
    folder = read_segmentation_folder(path)
    settings = folder.settings
    graph = folder.path / ONNX
    network = OnnxNetwork(graph) if graph.exists() else load_segmentation_network(folder)
    return SegmentationModel(
        network, settings.classes, settings.preprocessing, settings.evaluation, settings.training_values, device
    )
