"""The loss of segmentation, its decoders, and what they read of an encoder."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.data.store import IGNORED
from trainables.models.dense_features import FeatureMap
from trainables.specs.trial_spec import DECODERS, LossSettings
from trainables.tasks.base import TargetSpec, TaskSettings
from trainables.tasks.decoders import PooledBatchNorm
from trainables.tasks.segmentation import Segmentation, chosen_maps, dice_loss, new_head, reading_of, scaled

CLASSES = ("ground", "red", "blue")
PYRAMID = (FeatureMap(0, 2, 4), FeatureMap(1, 4, 6), FeatureMap(2, 8, 8), FeatureMap(3, 16, 8), FeatureMap(4, 32, 12))


def task(**loss: Any) -> Segmentation:
    return Segmentation(TargetSpec(CLASSES), TaskSettings(loss=LossSettings(**loss)))


def batch(seed: int = 0, count: int = 4, stride: int = 4) -> tuple[Tensor, Tensor]:
    """Logits (B, 3, 16/stride, 16/stride) and masks (B, 16, 16), the first picture all void."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, len(CLASSES), 16 // stride, 16 // stride, generator=generator)
    masks = torch.randint(0, len(CLASSES), (count, 16, 16), generator=generator).to(torch.uint8)
    masks[torch.rand(masks.shape, generator=generator) < 0.3] = IGNORED
    masks[0] = IGNORED
    return logits, masks


class TestLoss:
    def test_it_is_the_mean_over_labelled_pixels_of_the_batch(self) -> None:
        logits, masks = batch()
        large = functional.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
        expected = functional.cross_entropy(large, masks.long(), ignore_index=IGNORED)
        assert torch.allclose(task().loss(logits, masks), expected)
        assert int(task().loss_weight(masks)) == int((masks != IGNORED).sum())
        total = task().loss(logits, masks, reduction="sum")
        assert torch.allclose(total, expected * task().loss_weight(masks))

    @pytest.mark.parametrize("settings", [{}, {"dice": 1.0}, {"focal_gamma": 2.0}])
    def test_a_batch_without_a_labelled_pixel_has_loss_and_gradient_zero(self, settings: dict[str, float]) -> None:
        logits, masks = batch()
        logits.requires_grad_()
        loss = task(**settings).loss(logits, torch.full_like(masks, IGNORED))
        loss.backward()
        assert float(loss.detach()) == 0
        assert logits.grad is not None
        assert not bool(logits.grad.any())

    @pytest.mark.parametrize("settings", [{}, {"dice": 0.5}, {"focal_gamma": 2.0}])
    def test_ignored_pixels_have_no_gradient(self, settings: dict[str, float]) -> None:
        logits, masks = batch(stride=1)
        logits.requires_grad_()
        task(**settings).loss(logits, masks).backward()
        assert logits.grad is not None
        ignored = (masks == IGNORED)[:, None].expand_as(logits)
        assert not bool(logits.grad[ignored].any())
        assert bool(logits.grad[~ignored].all())

    @pytest.mark.parametrize("settings", [{}, {"focal_gamma": 2.0}])
    def test_weighted_pieces_of_a_batch_sum_to_its_loss(self, settings: dict[str, float]) -> None:
        logits, masks = batch()
        one = task(**settings)
        pieces = [slice(0, 1), slice(1, 2), slice(2, 4)]  # the first is void
        weights = [one.loss_weight(masks[piece]) / one.loss_weight(masks) for piece in pieces]
        parts = [w * one.loss(logits[p], masks[p]) for w, p in zip(weights, pieces, strict=True)]
        assert torch.allclose(torch.stack(parts).sum(), one.loss(logits, masks))

    def test_dice_is_added_with_its_weight(self) -> None:
        logits, masks = batch()
        dice = dice_loss(scaled(logits, (16, 16)), masks.long())
        assert torch.allclose(task(dice=0.5).loss(logits, masks), task().loss(logits, masks) + 0.5 * dice)

    def test_dice_by_hand(self) -> None:
        """Two pixels of class 0, one of class 1, one ignored; the prediction is certain, and wrong at one pixel."""
        labels = torch.tensor([[[0, 0, 1, IGNORED]]])
        logits = 100 * functional.one_hot(torch.tensor([[[0, 1, 1, 2]]]), 3).permute(0, 3, 1, 2).float()
        # Class 0: 2·1 / (1 + 2); class 1: 2·1 / (2 + 1). Class 2 occurs on an ignored pixel alone.
        assert float(dice_loss(logits, labels)) == pytest.approx(1 - 2 / 3)

    def test_a_focal_loss_weights_pixels(self) -> None:
        logits, masks = batch(stride=1)
        log_p = functional.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="none")
        expected = ((1 - (-log_p).exp()) ** 2 * log_p).sum() / (masks != IGNORED).sum()
        assert torch.allclose(task(focal_gamma=2.0).loss(logits, masks), expected, rtol=1e-4)


class TestDecoders:
    @pytest.mark.parametrize("side", [32, 33, 50])
    @pytest.mark.parametrize("name", DECODERS)
    def test_logits_at_any_side(self, name: str, side: int) -> None:
        """Of maps as an encoder gives them: rounded up where the side is no multiple of a stride."""
        chosen = chosen_maps(name, PYRAMID)
        head = new_head(name, chosen, 3, seed=0).eval()
        sizes = [-(-side // one.stride) for one in chosen]
        if name == "deeplabv3plus":
            sizes[-1] = -(-side // 16)
        maps = [torch.randn(2, one.channels, size, size) for one, size in zip(chosen, sizes, strict=True)]
        logits = head([torch.empty(2, 0, side, side), *maps])
        expected = {"deeplabv3plus": -(-side // 4), "fpn": -(-side // 4), "unet": side, "linear": -(-side // 32)}[name]
        assert logits.shape == (2, 3, expected, expected)

    @pytest.mark.parametrize("name", DECODERS)
    def test_a_batch_of_one_picture_trains(self, name: str) -> None:
        chosen = chosen_maps(name, PYRAMID)
        head = new_head(name, chosen, 3, seed=0).train()
        maps = [torch.randn(1, one.channels, 64 // one.stride, 64 // one.stride) for one in chosen]
        head([torch.empty(1, 0, 64, 64), *maps]).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())

    @pytest.mark.parametrize("name", DECODERS)
    def test_the_seed_alone_decides_the_start(self, name: str) -> None:
        chosen = chosen_maps(name, PYRAMID)
        before = torch.random.get_rng_state()
        first, again, other = (new_head(name, chosen, 3, seed=seed).state_dict() for seed in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert all(torch.equal(value, again[key]) for key, value in first.items())
        assert not torch.equal(first["classifier.weight"], other["classifier.weight"])

    def test_an_encoder_without_a_fine_map_has_a_u_net(self) -> None:
        """As ConvNeXt and Swin, whose first stride is 4."""
        chosen = chosen_maps("unet", PYRAMID[1:])
        head = new_head("unet", chosen, 3, seed=0).eval()
        maps = [torch.randn(1, one.channels, 64 // one.stride, 64 // one.stride) for one in chosen]
        assert head([torch.empty(1, 0, 64, 64), *maps]).shape == (1, 3, 64, 64)

    def test_maps_of_one_stride_are_for_the_linear_head_alone(self) -> None:
        plain = [FeatureMap(index, 14, 8) for index in range(3)]
        assert chosen_maps("linear", plain) == plain[2:]
        with pytest.raises(ValueError) as error:
            chosen_maps("unet", plain)
        assert str(error.value) == (
            "The decoder unet needs an encoder with maps of several strides, but all of this one have stride 14, as "
            "plain transformers do. Choose model.decoder: linear."
        )

    def test_missing_strides_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"fpn reads maps of the strides 4, 8, 16, 32.* has 2, 4, 8, 16\."):
            chosen_maps("fpn", PYRAMID[:4])

    def test_pooled_batch_norm_is_batch_norm_but_for_one_element(self) -> None:
        pooled, plain = PooledBatchNorm(3).train(), nn.BatchNorm2d(3).train()
        values = torch.randn(4, 3, 1, 1)
        assert torch.equal(pooled(values), plain(values))
        statistics = {name: value.clone() for name, value in pooled.state_dict().items()}
        one = pooled(values[:1])
        assert all(torch.equal(value, statistics[name]) for name, value in pooled.state_dict().items())
        assert torch.equal(one, pooled.eval()(values[:1]))


@pytest.mark.parametrize(
    ("name", "side", "decoder"),
    [("test_resnet", 64, "deeplabv3plus"), ("test_vit", 160, "linear"), ("resnetblur18", 64, "fpn")],
)
def test_the_default_decoder_follows_the_encoder(name: str, side: int, decoder: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False, num_classes=0)
    assert reading_of(network, side).decoder == decoder
