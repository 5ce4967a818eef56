"""What each strategy moves and keeps in a segmentation trial, and trials in trouble."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.support.mask_store import MaskMemoryStore, rectangles
from tests.support.trials import copies, history_of, same_numbers, same_tensors
from trainables.data.store import IGNORED
from trainables.engine.trial import Trial
from trainables.engine.tuned_network import tuned_network
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import LossSettings, ModelSpec, SharedTrialSettings, TrialSpec

MakeSegmentation = Callable[..., Trial]


@pytest.fixture
def trial(
    network: Callable[[str], str], one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> MakeSegmentation:
    """`trial("full", "cnn", store=…, model=…, hparams={…}, **settings)`: two units of four steps."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(
        strategy: str,
        kind: str = "cnn",
        *,
        store: MaskMemoryStore | None = None,
        model: ModelSpec | None = None,
        hparams: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Trial:
        shared = {"epochs": 2, "batch_size": 4, "image_size": 32, "diagnostics": (), "cache": cache, **settings}
        spec = SharedTrialSettings(
            store="memory", model=model or ModelSpec(name=network(kind)), task="segmentation", **shared
        )
        run = TrialSpec(shared=spec, strategy=strategy, hparams=hparams or {}, seed=3)
        return Trial(run, store=store or rectangles(), device="cpu")

    return make


def moved(before: Mapping[str, Tensor], run: Trial) -> set[str]:
    return {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}


def statistics(model: nn.Module, part: str) -> set[str]:
    """Names of running means and variances of a part."""
    layers = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return {f"{n}.{s}" for n in layers for s in ("running_mean", "running_var") if n.startswith(f"{part}.")}


class TestMeaning:
    """Of the strategies of Ha et al. (2024), Table 3, and of the others."""

    def test_linear_probing_trains_the_decoder_and_leaves_the_encoder_bit_for_bit(
        self, trial: MakeSegmentation
    ) -> None:
        run = trial("linear_probe")
        before = copies(run.model)
        run.step()
        changed = moved(before, run)
        assert all(name.startswith("head.") for name in changed)
        assert statistics(run.model, "head") <= changed
        assert {name for name, _ in run.model.head.named_parameters(prefix="head")} <= changed

    def test_full_fine_tuning_moves_everything_at_one_rate(self, trial: MakeSegmentation) -> None:
        run = trial("full", hparams={"lr_backbone": 0.02})
        assert {group.lr for group in run.param_groups()} == {0.02}
        before = copies(run.model)
        run.step()
        changed = moved(before, run)
        assert {name for name, _ in run.model.named_parameters()} <= changed
        assert statistics(run.model, "backbone") | statistics(run.model, "head") <= changed

    def test_lp_ft_probes_then_moves_all_but_the_encoders_statistics(self, trial: MakeSegmentation) -> None:
        run = trial("lp_ft", epochs=4, hparams={"lr_probe": 0.03, "lr_backbone": 0.002, "probe_share": 0.5})
        before = copies(run.model)
        probe = [run.step(), run.step()]
        assert all(name.startswith("head.") for name in moved(before, run))
        assert [unit["lr/backbone"] for unit in probe] == [0.0, 0.0]
        probed = copies(run.model)
        tuned = run.step()
        changed = moved(probed, run)
        assert not statistics(run.model, "backbone") & changed
        assert statistics(run.model, "head") <= changed
        assert {name for name, _ in run.model.named_parameters()} <= changed
        # A schedule of its own: the first unit of two ends half way down.
        assert tuned["lr/backbone"] == tuned["lr/head"]
        assert 0.0005 < tuned["lr/backbone"] < 0.002

    def test_lp_ft_needs_a_unit_for_each_part(self, trial: MakeSegmentation) -> None:
        with pytest.raises(ValueError, match="Probing and tuning take at least 2 units, but the trial has 1"):
            trial("lp_ft", epochs=1).step()

    def test_daft_converts_the_encoder_alone_and_keeps_the_decoders_input(self, trial: MakeSegmentation) -> None:
        """The decoder starts at random: it has several layers."""
        run = trial("daft", hparams={"lr_backbone": 0.01, "lr_head": 0.05})
        plain = run.task.build_model(run.data.backbone, stream_seed(3, "head"))
        converted = run.model
        assert {g.name: (g.lr, g.relative) for g in run.param_groups()} == {
            "backbone": (0.01, False),
            "head": (0.05, True),
        }
        changed = moved(copies(plain), run)
        assert changed
        assert all(name.startswith("backbone.") for name in changed)
        assert statistics(converted, "backbone") <= changed
        images, _ = next(run.data.batches("train", batch_size=8))
        with torch.no_grad():
            after = converted.eval().features(images)
            expected = plain.eval().features(images)
        for one, other in zip(after[1:], expected[1:], strict=True):
            assert float((one - other).abs().max()) <= 1e-4 * max(1.0, float(other.abs().max()))

    def test_rates_of_the_decoder_are_absolute(self, trial: MakeSegmentation) -> None:
        run = trial("daft", hparams={"lr_backbone": 0.01, "lr_head": 0.05, "schedule": "constant"})
        first = run.step()
        assert first["lr/head"] == 0.05
        assert first["lr/backbone"] == 0.01

    @pytest.mark.parametrize("strategy", ["layernorm", "lora", "bitfit", "components"])
    def test_others_move_a_part_of_the_encoder_and_the_whole_decoder(
        self, trial: MakeSegmentation, strategy: str
    ) -> None:
        kinds = {"kinds": "fc1"} if strategy == "components" else {}
        run = trial(strategy, "vit", hparams={"lr_head": 0.05, **kinds})
        before = copies(run.model)
        run.step()
        changed = {name for name in moved(before, run) if not name.endswith("num_batches_tracked")}
        head = {name for name, _ in run.model.head.named_parameters(prefix="head")}
        assert head <= changed
        encoder = changed - head
        assert encoder
        assert len(encoder) < len([name for name, _ in run.model.backbone.named_parameters()])

    def test_parameters_behind_the_last_map_neither_train_nor_count(self, trial: MakeSegmentation) -> None:
        run = trial("full", model=ModelSpec(name="test_efficientnet", pretrained=False), hparams={"weight_decay": 0.1})
        before = copies(run.model)
        first = run.step()
        unused = {"backbone.conv_head.weight", "backbone.bn2.weight", "backbone.bn2.bias"}
        assert run.model.unused == unused
        behind = {name for name in before if name.startswith(("backbone.conv_head", "backbone.bn2"))}
        assert not behind & moved(before, run)
        total = sum(p.numel() for name, p in run.model.named_parameters() if name not in unused)
        assert first["cost/parameters"] == first["cost/trainable_parameters"] == total

    def test_conversion_leaves_layers_behind_the_last_map(self, trial: MakeSegmentation) -> None:
        run = trial("daft", model=ModelSpec(name="test_efficientnet", pretrained=False), hparams={"lr_head": 0.05})
        pristine = run.data.reference.state_dict()
        converted = run.model.backbone.state_dict()
        assert torch.equal(converted["bn2.running_mean"], pristine["bn2.running_mean"])
        assert not torch.equal(converted["bn1.running_mean"], pristine["bn1.running_mean"])


class TestSchedule:
    def test_poly_is_followed(self, trial: MakeSegmentation) -> None:
        run = trial("full", schedule="poly", hparams={"lr_backbone": 0.01})
        rates = [unit["lr/backbone"] for unit in history_of(run)]
        # The last of four steps in each of two units: steps 4 and 8 of 8, counted from 0.
        assert rates == pytest.approx([0.01 * (1 - 3 / 8) ** 0.9, 0.01 * (1 - 7 / 8) ** 0.9])

    def test_a_schedule_is_set_once(self, trial: MakeSegmentation) -> None:
        with pytest.raises(ValueError) as error:
            trial("full", schedule="poly", hparams={"schedule": "constant"})
        assert str(error.value) == (
            "The schedule is set once, but full has schedule 'constant' and the study search.schedule 'poly'. Leave "
            "one of the two out."
        )

    def test_the_last_unit_is_tested_where_the_study_says_so(self, trial: MakeSegmentation) -> None:
        """At a rate that destroys what the first unit has learned."""
        hparams = {"lr_backbone": 0.02, "schedule": "constant"}
        store = rectangles()
        last = history_of(trial("full", store=store, epochs=3, evaluate_model="final", hparams=hparams))
        best = history_of(trial("full", store=store, epochs=3, hparams=hparams))
        values = [unit["val/miou"] for unit in last]
        assert values == [unit["val/miou"] for unit in best]
        assert last[-1]["best/epoch"] == 3
        assert last[-1]["best/val/miou"] == values[-1]
        assert best[-1]["best/val/miou"] == max(values)


class TestTrouble:
    def void(self, store: MaskMemoryStore, pictures: slice) -> MaskMemoryStore:
        """The store with masks of training pictures all ignored."""
        masks = {split: list(values) for split, values in store.split_masks.items()}
        masks["train"][pictures] = [np.full_like(mask, IGNORED) for mask in masks["train"][pictures]]
        return MaskMemoryStore(store.split_pictures, masks)

    @pytest.mark.parametrize("decoder", ["deeplabv3plus", "unet", "fpn", "linear"])
    def test_batches_of_one_picture_train_void_ones_too(self, trial: MakeSegmentation, decoder: str) -> None:
        store = self.void(rectangles(), slice(0, 4))
        run = trial("full", store=store, batch_size=1, image_size=64, decoder=decoder, epochs=1)
        (unit,) = history_of(run)
        assert all(np.isfinite(unit[name]) for name in ("train/loss", "val/miou", "val/nll", "test/miou", "train/miou"))
        assert all(bool(value.isfinite().all()) for value in run.model.state_dict().values())

    def test_a_batch_without_labels_moves_no_weight(self, trial: MakeSegmentation) -> None:
        store = self.void(rectangles(), slice(None))
        run = trial("linear_probe", "vit", store=store)
        before = copies(run.model)
        unit = run.step()
        assert unit["train/loss"] == 0
        assert moved(before, run) == set()

    def test_a_halved_batch_has_the_whole_batchs_gradient(
        self, trial: MakeSegmentation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pictures of different shares of labelled pixels, one of them void; no BatchNorm that would see the pieces."""
        store = self.void(rectangles(), slice(0, 1))
        whole = trial("full", "vit", store=store, hparams={"lr_backbone": 0.05})
        whole.step()
        halved = trial("full", "vit", store=store, hparams={"lr_backbone": 0.05})
        model = halved.model
        plain = type(model).features

        def limited(self: Any, images: Tensor) -> Any:
            if self.training and len(images) > 2:
                raise torch.OutOfMemoryError("planted")
            return plain(self, images)

        monkeypatch.setattr(type(model), "features", limited)
        unit = halved.step()
        assert unit["cost/micro_batch"] == 2
        for name, value in halved.model.state_dict().items():
            assert torch.allclose(value, whole.model.state_dict()[name], atol=1e-5), name

    def test_micro_batches_of_one_picture_train(self, trial: MakeSegmentation, monkeypatch: pytest.MonkeyPatch) -> None:
        run = trial("full", image_size=64, epochs=1)
        plain = type(run.model).features

        def limited(self: Any, images: Tensor) -> Any:
            if self.training and len(images) > 1:
                raise torch.OutOfMemoryError("planted")
            return plain(self, images)

        monkeypatch.setattr(type(run.model), "features", limited)
        unit = run.step()
        assert unit["cost/micro_batch"] == 1
        assert np.isfinite(unit["val/nll"])

    def test_scores_do_not_depend_on_the_evaluations_batches(self, trial: MakeSegmentation) -> None:
        runs = [trial("linear_probe", store=rectangles(), eval_batch_size=size) for size in (1, 4, 256)]
        scores = [history_of(run)[-1] for run in runs]
        for name in ("test/miou", "test/pixel_acc", "test/miou_classes", "ood/dark/miou"):
            assert len({one[name] for one in scores}) == 1

    @pytest.mark.parametrize("evaluation", ["resize", "slide"])
    @pytest.mark.parametrize("side", [32, 40])
    def test_every_labelled_pixel_is_counted_whatever_the_views(
        self, trial: MakeSegmentation, evaluation: str, side: int
    ) -> None:
        store = rectangles()
        run = trial("linear_probe", store=store, image_size=side, evaluation=evaluation, epochs=1)
        run.step()
        assert run.result is not None
        table = run.result["curves"]["pixel_confusion"]["columns"]
        counted = sum(n for n, split in zip(table["pixels"], table["split"], strict=True) if split == "ood/dark")
        assert counted == sum(int((mask != IGNORED).sum()) for mask in store.masks("ood/dark"))


class TestSettings:
    def test_dice_and_focal_train(self, trial: MakeSegmentation) -> None:
        plain = history_of(trial("linear_probe", "vit"))
        for loss in (LossSettings(dice=1.0), LossSettings(focal_gamma=2.0), LossSettings(label_smoothing=0.1)):
            history = history_of(trial("linear_probe", "vit", loss=loss))
            assert history[-1]["train/loss"] < history[0]["train/loss"]
            assert history[0]["train/loss"] != plain[0]["train/loss"]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"loss": LossSettings(class_weights="balanced")},
                "loss.class_weights needs a task whose loss has it, but 'segmentation' has not, and got 'balanced'. "
                "Leave it out.",
            ),
            (
                {"decoder": "pspnet"},
                "model.decoder is one of deeplabv3plus, unet, fpn, linear for the task 'segmentation', but got "
                "'pspnet'.",
            ),
            (
                {"task": "classification", "decoder": "unet"},
                "model.decoder needs a task with decoders, but 'classification' has none, and got 'unet'. Leave it "
                "out.",
            ),
            (
                {"task": "classification", "loss": LossSettings(dice=1.0)},
                "loss.dice needs a task whose loss has it, but 'classification' has not, and got 1.0. Leave it out.",
            ),
        ],
    )
    def test_settings_without_meaning_are_refused_before_anything_is_loaded(
        self, settings: Mapping[str, Any], message: str
    ) -> None:
        shared = SharedTrialSettings(
            store="nowhere", model=ModelSpec(name="test_resnet"), **{"task": "segmentation", **settings}
        )
        with pytest.raises(ValueError) as error:
            Trial(TrialSpec(shared=shared, strategy="full"))
        assert str(error.value) == message

    def test_linear_probing_has_no_rate_for_the_encoder(self, trial: MakeSegmentation) -> None:
        with pytest.raises(ValueError, match=r"leaves the backbone as it is, but got lr_backbone 0\.1"):
            trial("linear_probe", hparams={"lr_backbone": 0.1})

    def test_a_solved_head_is_refused(self, trial: MakeSegmentation) -> None:
        with pytest.raises(ValueError, match="head_init='linear_probe' solves the head in closed form"):
            trial("full", hparams={"head_init": "linear_probe"})

    def test_augmented_training_is_the_same_again(self, trial: MakeSegmentation) -> None:
        augment = ("scale", "crop", "flip", "jitter")
        runs = [trial("linear_probe", "vit", augment=augment) for _ in range(2)]
        first, second = (history_of(run) for run in runs)
        assert same_numbers(first, second)
        assert same_tensors(runs[0].model.state_dict(), runs[1].model.state_dict())


class TestResult:
    @pytest.mark.parametrize(("kind", "decoder"), [("cnn", None), ("cnn", "unet"), ("vit", None)])
    def test_kept_weights_give_the_tested_network(
        self, trial: MakeSegmentation, kind: str, decoder: str | None
    ) -> None:
        run = trial("full", kind, decoder=decoder)
        history_of(run)
        network = tuned_network(run.kept_weights(0), run.data.backbone)
        assert same_tensors(network.state_dict(), run.model.state_dict())
        images, _ = next(run.data.batches("test", batch_size=2))
        with torch.no_grad():
            assert torch.equal(network(images), run.model.eval()(images))

    def test_cka_of_an_untouched_encoder_is_one(self, trial: MakeSegmentation) -> None:
        """The pretrained network that it is compared with is dilated, too."""
        last = history_of(trial("linear_probe", diagnostics=("cka",)))[-1]
        assert last["cka/mean"] == pytest.approx(1.0)

    def test_a_sample_has_its_intersection_and_union(self, trial: MakeSegmentation) -> None:
        run = trial("linear_probe", "vit")
        run.keeps_predictions = True
        last = history_of(run)[-1]
        kept = run.predictions["ood/dark"].statistics
        assert kept["intersection"].shape == kept["union"].shape == (6, 3)
        shares = kept["intersection"].sum(0) / kept["union"].sum(0)
        assert last["ood/dark/miou"] == pytest.approx(shares.mean())
