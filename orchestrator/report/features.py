"""Cosine similarity of each image's features before and after fine-tuning (Ha et al., 2024, Fig. 6 to 9).

The pooled features of the pretrained and of a trial's tuned network, on ID test and every OOD domain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orchestrator.record.kept_paths import similarities_file, weights_folder
from orchestrator.record.records import TrialRecord
from orchestrator.report.similarity import FeatureSimilarity
from trainables.data.store import Store
from trainables.data.transforms import BatchTransform
from trainables.diagnostics.distortion import feature_distortion
from trainables.engine.best_weights import is_pristine
from trainables.engine.loop import evaluate
from trainables.engine.process_cache import on_device
from trainables.engine.tuned_network import tuned_network
from trainables.models.backbone import load_pretrained
from trainables.models.device import training_device
from trainables.specs.metrics import TEST, ood_domain
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.atomic_files import atomic_file
from trainables.storage.checkpoint_format import save_tensors
from trainables.storage.kept_weights import KeptWeights, WeightsError, load_weights

log = logging.getLogger("luthier")

FORMAT = "1"
"""Of stored similarities."""
BATCH = 64
"""Images per forward pass."""

Progress = Callable[[str, int, int], None]
"""Called with what is computed, the images done and those in all."""


class FeatureSimilarities:
    """Measures trials of one study, each once: similarities are stored beside the trial's predictions.

    Features of the pretrained networks are computed once per instance. A file belongs to the trial's kept weights and
    the data store, by their digests; one of others, or a damaged one, is replaced.

    Args:
        study: its folder.
        store: its data.
        device: of the networks; None = the GPU if there is one, else the CPU.
        progress: called after each batch.
    """

    def __init__(
        self,
        study: Path,
        store: Store,
        device: torch.device | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._study = study
        self._store = store
        self._device = training_device() if device is None else device
        self._progress = progress
        self._pretrained: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self.splits = [split for split in store.splits if split == TEST or ood_domain(split) is not None]

    def of(self, record: TrialRecord) -> FeatureSimilarity:
        """Similarities of one trial.

        Raises:
            WeightsError: its weights are not kept, damaged, or of another trial or data store; its network has no
                pooled features.
            ValueError: its pretrained network cannot be loaded.
        """
        identity = self._identity(record)
        stored = None if identity is None else self._stored(record, identity)
        if stored is not None:
            return stored
        measured = self._measured(record)
        if identity is not None:
            self._store_similarity(record, identity, measured)
        return measured

    def _identity(self, record: TrialRecord) -> dict[str, str] | None:
        """What similarities are of; None where the record has no digest of the trial's weights."""
        if record.weights is None:
            return None
        return {"format": FORMAT, "weights": str(record.weights["sha256"]), "store": self._store.digest}

    def _stored(self, record: TrialRecord, identity: Mapping[str, str]) -> FeatureSimilarity | None:
        """Similarities of an earlier report; None where there are none of the same weights and data."""
        path = similarities_file(self._study, record.number)
        # Without the weights the reason why features cannot be compared is reported, as it is the first time.
        if not path.exists() or not weights_folder(self._study, record.number).is_dir():
            return None
        try:
            with safe_open(path, framework="numpy") as tensors:
                metadata = tensors.metadata() or {}
                splits = tensors.keys()
                cosines = {split: tensors.get_tensor(split) for split in splits}
        except (OSError, SafetensorError) as error:
            log.warning("Features are compared again: %s cannot be read (%s)", path, error)
            return None
        unchanged = metadata.pop("unchanged", "") == "true"
        lengths = {split: len(values) for split, values in cosines.items()}
        expected = {} if unchanged else {split: len(self._store.labels(split)) for split in self.splits}
        if metadata != identity or lengths != expected:
            return None
        return FeatureSimilarity({split: cosines[split] for split in expected}, unchanged)

    def _store_similarity(self, record: TrialRecord, identity: Mapping[str, str], measured: FeatureSimilarity) -> None:
        """Write similarities atomically; a disk that refuses it costs the next report's time, not this report."""
        path = similarities_file(self._study, record.number)
        tensors = {split: torch.as_tensor(values) for split, values in measured.cosines.items()}
        try:
            with atomic_file(path) as partial:
                save_tensors(tensors, partial, {**identity, "unchanged": str(measured.unchanged).lower()})
        except OSError as error:
            log.warning("Compared features are not stored, and computed again by the next report (%s)", error)

    def _measured(self, record: TrialRecord) -> FeatureSimilarity:
        kept = self._kept(record)
        meta = kept.meta
        backbone = load_pretrained(ModelSpec(**meta["model"]), meta["requested_image_size"])
        model = tuned_network(kept, backbone, self._device)
        if not model.pooled:
            raise WeightsError(f"Features are compared where they are pooled, but those of {meta['task']} are not.")
        pretrained = on_device(backbone, self._device).module
        if is_pristine(model.backbone, pretrained):
            return FeatureSimilarity({}, unchanged=True)
        transform = BatchTransform(meta["mean"], meta["std"], int(meta["image_size"]), ())
        key = (backbone.digest, transform.image_size, transform.mean, transform.std)
        if key not in self._pretrained:
            self._pretrained[key] = self._features("pretrained network", pretrained, transform)
        before = self._pretrained[key]
        after = self._features(f"trial {record.number}, {record.label}", model.backbone, transform)
        cosines = {split: feature_distortion(before[split], after[split])[0].numpy() for split in self.splits}
        return FeatureSimilarity(cosines)

    def _kept(self, record: TrialRecord) -> KeptWeights:
        folder = weights_folder(self._study, record.number)
        kept = load_weights(folder)
        meta = kept.meta
        if meta["config_hash"] != record.config_hash or meta["seed"] != record.seed:
            raise WeightsError(
                f"{folder} must hold the weights of trial {record.number}, but holds those of another one."
            )
        if meta["store_digest"] != self._store.digest:
            raise WeightsError(
                f"Features are compared on the data that a trial was tested on, of digest "
                f"{meta['store_digest'][:12]}…, but the study has {self._store.digest[:12]}… now."
            )
        return kept

    def _features(self, what: str, network: nn.Module, transform: BatchTransform) -> dict[str, Tensor]:
        """(n, D) float32 on the CPU, by split."""
        total = sum(len(self._store.labels(split)) for split in self.splits)
        done = 0
        features: dict[str, Tensor] = {}
        for split in self.splits:
            collected = _Features()
            for batch in self._batches(split, transform):
                evaluate(network, [batch], collected)
                done += len(batch[1])
                if self._progress is not None:
                    self._progress(what, done, total)
            features[split] = torch.cat(collected.parts)
        return features

    def _batches(self, split: str, transform: BatchTransform) -> Iterator[tuple[Tensor, Tensor]]:
        pixels = self._store.images(split)
        labels = self._store.labels(split)
        for start in range(0, len(labels), BATCH):
            part = slice(start, start + BATCH)
            yield transform(torch.tensor(pixels[part]).to(self._device)), torch.tensor(labels[part])


class _Features:
    """Accumulator that collects what a network puts out."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.parts.append(outputs.float().cpu())


def similarities(records: Sequence[TrialRecord], measure: FeatureSimilarities) -> dict[int, FeatureSimilarity | str]:
    """Similarities by number of the trial; the reason where one cannot be measured."""
    measured: dict[int, FeatureSimilarity | str] = {}
    for record in records:
        try:
            measured[record.number] = measure.of(record)
        except ValueError as error:
            measured[record.number] = str(error)
    return measured
