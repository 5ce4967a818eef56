"""An exported segmentation model in Python: logits of images, masks of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from orchestrator.export.pictures import decoded_whole, images_or_files, list_pictures, upright_picture
from orchestrator.export.predictions import refuse_unreadable
from orchestrator.ingest.source import SkippedEntry
from orchestrator.wording import listed
from trainables.data.masked_pictures import Evaluation, PictureViews
from trainables.data.store import IGNORED
from trainables.models.backbone import DataConfig
from trainables.models.device import training_device
from trainables.tasks.segmentation_metrics import Stitching

BATCH_SIZE = 16
"""Views per forward pass."""


class SegmentationModel:
    """A segmentation network with its class names and its views of a picture.

    Args:
        network: images (B, 3, S, S) float32, normalised → logits (B, K, h, w); in eval mode.
        classes: names, in the order of the logits.
        preprocessing: as in training.
        evaluation: views of a picture, as in the trial's evaluation.
        training_values: of each class, the values that it had in the training masks; None = not known.
        device: where the network computes; None = the GPU if there is one, else the CPU.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        preprocessing: DataConfig,
        evaluation: Evaluation,
        training_values: Sequence[Sequence[int | str]] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = training_device() if device is None else torch.device(device)
        self.network = network.eval().to(self.device)
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.evaluation: Evaluation = evaluation
        self.training_values = None if training_values is None else tuple(tuple(values) for values in training_values)
        self._views = PictureViews(preprocessing, evaluation, self.device)

    def __repr__(self) -> str:
        names = listed(self.classes, most=5)
        side = self.preprocessing.image_size
        return (
            f"<SegmentationModel of {len(self.classes)} classes ({names}), {self.evaluation} at {side} px, on "
            f"{self.device}>"
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K, h, w) float32 at the decoder's stride, on the CPU.

        Args:
            images: pixels (B, H, W, 3) uint8, which are normalised; or images (B, 3, H, W) float32 that are already.
        """
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            images = self._views.normalised(images.permute(0, 3, 1, 2).float() / 255)
        logits: Tensor = self.network(images)
        return logits.float().cpu()

    @torch.no_grad()
    def masks(self, pictures: Iterable[NDArray[np.uint8]], batch_size: int = BATCH_SIZE) -> Iterator[NDArray[np.uint8]]:
        """The mask (H, W) of class indices of every picture (H, W, 3), in their order.

        Views and the logits of overlapping ones are those of the trial's evaluation.

        Args:
            pictures: upright RGB.
            batch_size: views per forward pass.
        """
        stitching = Stitching()
        for images, views in self._views.batches(map(self._unlabelled, pictures), batch_size):
            for logits, _ in stitching.pictures(self.network(images), views):
                yield logits.argmax(0).to(torch.uint8).cpu().numpy()

    def predict(
        self, pictures: str | Path | Sequence[str | Path | Image.Image], batch_size: int = BATCH_SIZE
    ) -> dict[str, NDArray[np.uint8]]:
        """Path of every picture → its mask (H, W) of class indices, at the picture's own size and upright.

        Args:
            pictures: a folder, a file, or a sequence of files, folders or Pillow images; images have their position
                as path.
            batch_size: views per forward pass.

        Raises:
            DataError: nothing there, or a picture that cannot be read (`luthier predict` lists these instead).
        """
        images, files = images_or_files(pictures)
        if images:
            pixels = [np.asarray(upright_picture(image)) for image in images]
            return {str(position): mask for position, mask in enumerate(self.masks(pixels, batch_size))}
        masks: dict[str, NDArray[np.uint8]] = {}
        unreadable: list[SkippedEntry] = []
        for chunk in decoded_whole(list_pictures(files).pictures):
            masks |= zip(chunk.names, self.masks(chunk.pixels, batch_size), strict=True)
            unreadable += chunk.unreadable
        refuse_unreadable(unreadable)
        return masks

    def _unlabelled(self, picture: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """A picture on the device, and a mask without a labelled pixel."""
        # `torch.tensor` copies: the memory of a store is read-only.
        pixels = torch.tensor(picture).to(self.device)
        return pixels, torch.full(picture.shape[:2], IGNORED, dtype=torch.uint8, device=self.device)
