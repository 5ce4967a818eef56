"""Two tasks unlike classification, to show that nothing outside `trainables/tasks` depends on what is learned.

`InkMasks` has dense features, targets that lie on the image, and no closed-form probe. The prediction of `DigitNames`
is generated, letter by letter, and its head sees the targets while it trains. Both learn on small handwritten digits.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.support.synthetic import MemoryStore
from trainables.data.square_images import ImageTransform
from trainables.data.trial_data import TrialData
from trainables.demo.digits import handwritten_digits
from trainables.models.backbone import Backbone
from trainables.models.task_model import TaskModel
from trainables.specs.metrics import Metric, TaskMetrics
from trainables.tasks.base import PLAIN, TargetSpec, Task, TaskSettings

NAMES = ("zero", "one", "two", "three")
SPLITS = {"train": 64, "val": 32, "test": 32, "ood/inverted": 32}
STEP = 2
"""Every second row and column of the 32 x 32 digits: the tiny networks take 16 x 16."""


def digits() -> MemoryStore:
    """Handwritten digits 0 to 3; the OOD domain has them light on dark."""
    pixels, labels = handwritten_digits()
    chosen = [np.flatnonzero(labels == digit) for digit in range(len(NAMES))]
    order = np.stack([rows[:40] for rows in chosen], axis=1).reshape(-1)
    images: dict[str, np.ndarray] = {}
    targets: dict[str, np.ndarray] = {}
    domains: dict[str, np.ndarray] = {}
    start = 0
    for split, count in SPLITS.items():
        rows = order[start : start + count]
        start += count
        is_ood = split.startswith("ood/")
        small = pixels[rows][:, ::STEP, ::STEP]
        images[split] = np.ascontiguousarray(255 - small if is_ood else small)
        targets[split] = labels[rows].astype(np.int64)
        domains[split] = np.full(count, int(is_ood))
    return MemoryStore(images, targets, domains, list(NAMES), ["handwritten", "inverted"], "small-digits")


IOU = Metric("iou", "intersection over union", "max", "fraction", "Ink that mask and target share, of all ink.")
BCE = Metric("bce", "cross-entropy per pixel", "min", "nats", "Mean binary cross-entropy per pixel.")


class InkMasks(Task):
    """Which pixels are ink. Outputs are logits (B, S, S), targets masks (B, S, S) of zeros and ones."""

    metrics: TaskMetrics = TaskMetrics(
        task="ink_masks", selection=IOU, tie_breaker=BCE, reported=(IOU, BCE), training=(IOU,)
    )

    def build_model(self, backbone: Backbone, seed: int) -> TaskModel:
        """A 1 x 1 convolution on the feature map, enlarged to the image."""
        side = backbone.data_config.image_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Sequential(
                nn.Conv2d(backbone.num_features, 1, 1), nn.Upsample(size=(side, side), mode="bilinear")
            )
        return DenseModel(copy.deepcopy(backbone.module), head)

    def transform(
        self, pixels: Tensor, targets: Tensor, image_transform: ImageTransform, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """The mask is made of the transformed image, so that one draw moves both. The class label is not used."""
        images = image_transform(pixels, generator)
        dark = images.mean(1) < 0
        # Ink is the rarer of the two colours, also where the digits are inverted.
        rare = dark.flatten(1).double().mean(1) < 0.5
        return images, (dark == rare[:, None, None]).float()

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Binary cross-entropy, mean over the pixels of each image."""
        per_image = pixel_losses(outputs, targets)
        return per_image.mean() if reduction == "mean" else per_image.sum()

    def training_metrics(self) -> Overlap:
        """Intersection and union of all training images."""
        return Overlap()

    def accumulator(self) -> MaskScores:
        """Overlap and loss, image by image."""
        return MaskScores()

    def feature_scale(self, data: TrialData) -> float:
        """Mean squared norm of the feature map's vectors on some training images."""
        images, _ = next(data.batches("train", batch_size=32))
        with torch.no_grad():
            features = feature_map(data.reference, images)
        return float(features.double().square().sum(1).mean())


class DenseModel(TaskModel):
    """Features are a map (B, C, h, w)."""

    pooled: ClassVar[bool] = False

    def features(self, images: Tensor) -> Tensor:
        return feature_map(self.backbone, images)

    def outputs(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(features)
        return logits.squeeze(1)


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Last feature map (B, C, h, w); the tokens of a transformer are put in their grid."""
    features: Tensor = backbone.forward_features(images)  # type: ignore[operator]
    if features.ndim == 4:
        return features
    tokens = features[:, int(backbone.num_prefix_tokens) :]  # type: ignore[arg-type]
    side = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).reshape(len(images), -1, side, side)


def pixel_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of each image (B,)."""
    losses = functional.binary_cross_entropy_with_logits(outputs.float(), targets, reduction="none")
    return losses.flatten(1).mean(1)


def overlap(outputs: Tensor, targets: Tensor) -> Tensor:
    """Intersection and union of each image, (B, 2) int64."""
    predicted = outputs > 0
    ink = targets > 0
    both = [(predicted & ink).flatten(1).sum(1), (predicted | ink).flatten(1).sum(1)]
    return torch.stack(both, 1)


class Overlap:
    """Intersection and union, summed over images."""

    def __init__(self) -> None:
        self._sums: Tensor = torch.zeros(2, dtype=torch.int64)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._sums = self._sums.to(outputs.device) + overlap(outputs, targets).sum(0)

    def merge(self, other: Overlap) -> None:
        self._sums = self._sums.to(other._sums.device) + other._sums

    def compute(self) -> dict[str, float]:
        intersection, union = self._sums.tolist()
        return {IOU.key: intersection / max(1, union)}

    def state(self) -> dict[str, Tensor]:
        return {"sums": self._sums}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self._sums = state["sums"].to(device, copy=True)


class MaskScores:
    """Overlap and loss of each image."""

    def __init__(self) -> None:
        self._overlaps: list[Tensor] = []
        self._losses: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._overlaps.append(overlap(outputs, targets))
        self._losses.append(pixel_losses(outputs, targets))

    def compute(self, keys: Collection[str] | None = None, calibration: Any = None) -> dict[str, float]:
        samples = self.per_sample()
        intersection = int(samples["intersection"].sum())
        return {
            IOU.key: intersection / max(1, int(samples["union"].sum())),
            BCE.key: float(samples["bce"].double().mean()),
        }

    def per_sample(self) -> dict[str, Tensor]:
        overlaps = torch.cat(self._overlaps).cpu()
        return {
            "intersection": overlaps[:, 0],
            "union": overlaps[:, 1],
            "bce": torch.cat(self._losses).cpu(),
        }


LETTERS = "." + "".join(sorted(set("".join(NAMES))))
"""The first one fills names up, and stands before the first letter."""
LENGTH = max(map(len, NAMES))

EXACT = Metric("exact", "exact match", "max", "fraction", "Share of images whose whole name is right.")
WRONG = Metric("wrong", "wrong letters", "min", "fraction", "Share of letters that are wrong.")


class DigitNames(Task):
    """The name of a digit, letter by letter.

    Targets are labels (B,). While training, outputs are logits (B, L, V) of each letter after the right ones before it;
    the prediction is letters (B, L), each the likeliest one after those that were generated.
    """

    metrics: TaskMetrics = TaskMetrics(
        task="digit_names", selection=EXACT, tie_breaker=WRONG, reported=(EXACT, WRONG), training=(WRONG,)
    )

    def __init__(self, targets: TargetSpec, settings: TaskSettings = PLAIN) -> None:
        super().__init__(targets, settings)
        spelled = [[LETTERS.index(letter) for letter in name.ljust(LENGTH, ".")] for name in targets.classes]
        self.names = torch.tensor(spelled)

    def build_model(self, backbone: Backbone, seed: int) -> TaskModel:
        """A head that gets the features, the place of the letter and the letter before it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = SpellingHead(backbone.num_features, self.names)
        return SpellingModel(copy.deepcopy(backbone.module), head)

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Cross-entropy, mean over the letters of each name."""
        letters = self.names[targets]
        losses = functional.cross_entropy(outputs.float().transpose(1, 2), letters, reduction="none").mean(1)
        return losses.mean() if reduction == "mean" else losses.sum()

    def predict(self, model: TaskModel, features: Tensor) -> Tensor:
        """Greedy decoding."""
        head: SpellingHead = model.head
        letters = torch.zeros(len(features), 1, dtype=torch.int64, device=features.device)
        for position in range(LENGTH):
            logits = head.next_letter(features, letters[:, -1], position)
            letters = torch.cat([letters, logits.argmax(1, keepdim=True)], 1)
        return letters[:, 1:]

    def training_metrics(self) -> WrongLetters:
        """Wrong letters after right ones."""
        return WrongLetters(self.names)

    def accumulator(self) -> NameScores:
        """Names as they were generated."""
        return NameScores(self.names)


class SpellingHead(nn.Module):
    """Logits of the next letter."""

    names: Tensor

    def __init__(self, width: int, names: Tensor) -> None:
        super().__init__()
        self.image = nn.Linear(width, 16)
        self.letter = nn.Embedding(len(LETTERS), 16)
        self.place = nn.Embedding(LENGTH, 16)
        self.logits = nn.Linear(16, len(LETTERS))
        self.register_buffer("names", names.clone())

    def next_letter(self, features: Tensor, previous: Tensor, position: int) -> Tensor:
        """Features (B, D) and the letters before (B,) → logits (B, V)."""
        hidden = self.image(features) + self.letter(previous) + self.place.weight[position]
        logits: Tensor = self.logits(torch.relu(hidden))
        return logits


class SpellingModel(TaskModel):
    """Its head needs the targets: every letter is predicted after the right ones before it."""

    def outputs(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            raise ValueError("The letters of a name are predicted after those before it, but no targets were given.")
        head: SpellingHead = self.head
        letters = head.names[targets]
        before = functional.pad(letters[:, :-1], (1, 0))
        return torch.stack([head.next_letter(features, before[:, i], i) for i in range(LENGTH)], 1)


class WrongLetters:
    """Wrong letters of training batches."""

    def __init__(self, names: Tensor) -> None:
        self._names = names
        self._wrong: Tensor | int = 0
        self._letters = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        letters = self._names.to(targets.device)[targets]
        self._wrong = self._wrong + (outputs.argmax(2) != letters).sum()
        self._letters += letters.numel()

    def merge(self, other: WrongLetters) -> None:
        self._wrong = self._wrong + other._wrong
        self._letters += other._letters

    def compute(self) -> dict[str, float]:
        return {WRONG.key: int(self._wrong) / self._letters}

    def state(self) -> dict[str, Tensor]:
        return {"wrong": torch.as_tensor(self._wrong), "letters": torch.tensor(self._letters)}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self._wrong = state["wrong"].to(device, copy=True)
        self._letters = int(state["letters"])


class NameScores:
    """Generated names of a split."""

    def __init__(self, names: Tensor) -> None:
        self._names = names
        self._wrong: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        assert outputs.dtype == torch.int64, "letters, not logits"
        self._wrong.append((outputs != self._names.to(targets.device)[targets]).double().mean(1))

    def compute(self, keys: Collection[str] | None = None, calibration: Any = None) -> dict[str, float]:
        samples = self.per_sample()
        return {EXACT.key: float(samples["exact"].double().mean()), WRONG.key: float(samples["wrong"].mean())}

    def per_sample(self) -> dict[str, Tensor]:
        wrong = torch.cat(self._wrong).cpu()
        return {"exact": wrong == 0, "wrong": wrong}


TOY_TASKS: tuple[type[Task], ...] = (InkMasks, DigitNames)
