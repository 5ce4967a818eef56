"""Decoders of segmentation: from an encoder's feature maps to logits.

DeepLabv3+ (Chen et al., 2018), U-Net (Ronneberger et al., 2015) and the feature pyramid (Kirillov et al., 2019) are
those of segmentation-models-pytorch, whose fixed factors of enlargement are replaced by the size of the finer map, so
that sides need not be multiples of the stride. A linear head reads the last map alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP, DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder, SegmentationBlock
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import Tensor, nn
from torch.nn import functional

from trainables.models.dense_features import OUTPUT_STRIDE, FeatureMap

WIDTH = 256
"""Channels of DeepLabv3+ and of the feature pyramid."""
FINE_WIDTH = 128
"""Channels of the feature pyramid's segmentation branch."""
U_NET_WIDTHS = (256, 128, 64, 32, 16)
"""Channels of U-Net's blocks, from coarse to fine."""
ATROUS_RATES = (6, 12, 18)
"""Dilations of the pyramid pooling at output stride 16 (Chen et al., 2017, "Rethinking Atrous Convolution for Semantic
Image Segmentation", section 3.3)."""


class DenseHead(nn.Module):
    """An empty tensor of the image's size (B, 0, H, W) and feature maps (B, C, h, w) → logits (B, K, h, w)."""

    several_layers: ClassVar[bool] = True
    """Whether there are layers before the classifier, which then cannot start from zero all together."""

    classifier: nn.Conv2d

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError


class LinearHead(DenseHead):
    """One linear map on the vectors of the last feature map."""

    several_layers: ClassVar[bool] = False

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        logits: Tensor = self.classifier(maps[-1])
        return logits


class DeepLabV3Plus(DenseHead):
    """Atrous spatial pyramid pooling on the last map, refined by the map of stride 4 (Chen et al., 2018, Fig. 2)."""

    def __init__(self, maps: Sequence[FeatureMap], classes: int) -> None:
        super().__init__()
        fine, last = maps
        self.decoder = DeepLabV3PlusDecoder(
            # Of these four it reads the third and the last.
            encoder_channels=(0, 0, fine.channels, last.channels),
            encoder_depth=3,
            out_channels=WIDTH,
            atrous_rates=ATROUS_RATES,
            output_stride=OUTPUT_STRIDE,
            aspp_separable=True,
            aspp_dropout=0.5,
        )
        pooled = _pyramid_pooling(self.decoder).convs[-1]
        # The branch that averages over the picture has one element per channel and picture.
        pooled[2] = PooledBatchNorm(WIDTH)
        self.classifier = nn.Conv2d(WIDTH, classes, 1)
        _initialise(self.decoder, self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        _, fine, last = maps
        context = _resized(self.decoder.aspp(last), fine)
        merged = torch.cat([context, self.decoder.block1(fine)], dim=1)
        logits: Tensor = self.classifier(self.decoder.block2(merged))
        return logits


class UNet(DenseHead):
    """Enlarged from map to map, each joined by the encoder's own (Ronneberger et al., 2015, Fig. 1)."""

    def __init__(self, maps: Sequence[FeatureMap], classes: int) -> None:
        super().__init__()
        self._strides = [2]
        while self._strides[-1] < maps[-1].stride:
            self._strides.append(2 * self._strides[-1])
        self._given = [one.stride for one in maps]
        channels = {one.stride: one.channels for one in maps}
        depth = len(self._strides)
        self.decoder = UnetDecoder(
            encoder_channels=[3, *(channels.get(stride, 0) for stride in self._strides)],
            decoder_channels=U_NET_WIDTHS[-depth:],
            n_blocks=depth,
        )
        self.classifier = nn.Conv2d(U_NET_WIDTHS[-1], classes, 3, padding=1)
        _initialise(self.decoder, self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        image, *given = maps
        by_stride = dict(zip(self._given, given, strict=True))
        pyramid = [by_stride.get(stride, _empty(image, stride)) for stride in self._strides]
        logits: Tensor = self.classifier(self.decoder([image, *pyramid]))
        return logits


class FeaturePyramid(DenseHead):
    """Sum over the levels of a feature pyramid, at stride 4 (Kirillov et al., 2019, Fig. 3)."""

    def __init__(self, maps: Sequence[FeatureMap], classes: int) -> None:
        super().__init__()
        self.decoder = FPNDecoder(
            encoder_channels=[one.channels for one in maps],
            encoder_depth=len(maps),
            pyramid_channels=WIDTH,
            segmentation_channels=FINE_WIDTH,
        )
        self.classifier = nn.Conv2d(FINE_WIDTH, classes, 1)
        _initialise(self.decoder, self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        decoder = self.decoder
        _, *maps = maps
        level = decoder.p5(maps[-1])
        levels = [level]
        for block, finer in zip((decoder.p4, decoder.p3, decoder.p2), maps[-2::-1], strict=True):
            level = functional.interpolate(level, size=finer.shape[-2:], mode="nearest") + block.skip_conv(finer)
            levels.append(level)
        parts = [
            _enlarged(branch, level, levels[number + 1 :])
            for number, (branch, level) in enumerate(zip(decoder.seg_blocks, levels, strict=True))
        ]
        logits: Tensor = self.classifier(decoder.dropout(decoder.merge(parts)))
        return logits


class PooledBatchNorm(nn.BatchNorm2d):
    """BatchNorm of maps of one pixel, which also takes a training batch of one picture.

    One element per channel has no variance: it is normalised by the running statistics, which it leaves as they are.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or inputs.numel() > inputs.shape[1]:
            normalised: Tensor = super().forward(inputs)
            return normalised
        return functional.batch_norm(
            inputs, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def _pyramid_pooling(decoder: nn.Module) -> ASPP:
    return next(module for module in decoder.modules() if isinstance(module, ASPP))


def _resized(values: Tensor, like: Tensor) -> Tensor:
    """Bilinearly, to the rows and columns of another map."""
    if values.shape[-2:] == like.shape[-2:]:
        return values
    return functional.interpolate(values, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _enlarged(branch: SegmentationBlock, level: Tensor, finer: Sequence[Tensor]) -> Tensor:
    """A level of the pyramid through its convolutions, enlarged to the next finer level after each."""
    for number, layer in enumerate(branch.block):
        level = layer.block(level)
        if number < len(finer):
            level = _resized(level, finer[number])
    return level


def _empty(image: Tensor, stride: int) -> Tensor:
    """Where an encoder has no map: no channels."""
    height, width = (-(-size // stride) for size in image.shape[-2:])
    # Not `len`: a trace would fix the batch to that of its example.
    return image.new_empty(image.shape[0], 0, height, width)


def _initialise(decoder: nn.Module, classifier: nn.Module) -> None:
    initialize_decoder(decoder)
    initialize_head(classifier)
