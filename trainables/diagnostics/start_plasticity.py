"""Plasticity on the data of a trial: of the pretrained network, measured once and kept, and of a tuned one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from trainables.core.cache import made_once
from trainables.core.durable import write_text
from trainables.diagnostics.plasticity import PlasticityReport, measure_pairs

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData

log = logging.getLogger("luthier")

FORMAT = 2
"""Raised when what is measured changes, so that older files are not read."""
BATCH = 64
"""Pairs at a time."""


def plasticity_of(data: TrialData) -> PlasticityReport:
    """Plasticity of the pretrained network on the trial's images, as its task asks (probe, source, pairs).

    Measured once per weights, data and these settings, and kept in `data.solution_folder`.

    Raises:
        ValueError: the components are not defined for this network, the source is no OOD domain, or there are not
            enough images for a pair.
    """
    task = data.spec.task
    settings = [FORMAT, task.plasticity_probe, task.plasticity_source, task.plasticity_pairs, data.device.type]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    file = data.solution_folder / f"plasticity-{name}.json"
    return made_once(file, _load, lambda: plasticity_after(data.reference, data), _save)


def plasticity_after(model: nn.Module, data: TrialData) -> PlasticityReport:
    """Plasticity of any network on the trial's pairs of images, such as the tuned one; nothing is kept.

    Raises:
        ValueError: as `plasticity_of`.
    """
    return measure_pairs(model, image_pairs(data), data.spec.task.plasticity_probe)


def image_pairs(data: TrialData) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (x, y) of at most `BATCH` pairs of images (B, 3, H, W), `task.plasticity_pairs` in all, or as many as
    there are images for; made as they are needed.

    y are training images of the trial. x are images of the domain `task.plasticity_source`, which should be like those
    of the pretraining, or else other training images: no image is in two pairs.

    Raises:
        ValueError: the source is no OOD domain, or there are not enough images for a pair.
    """
    task = data.spec.task
    source, wanted = task.plasticity_source, task.plasticity_pairs
    if source is not None and source not in data.ood_domains:
        known = ", ".join(data.ood_domains) or "none"
        raise ValueError(f"plasticity_source must be one of the OOD domains ({known}), but got {source!r}.")
    available = data.train_size // 2 if source is None else min(data.train_size, data.size(f"ood/{source}"))
    if available == 0:
        raise ValueError(f"Plasticity needs two different images for a pair, but there are {data.train_size} to train.")
    return _batches(data, source, min(wanted, available))


def _batches(data: TrialData, source: str | None, wanted: int) -> Iterator[tuple[Tensor, Tensor]]:
    if source is None:
        # The training split is stored in nested stratified order, so that neighbours are of different classes.
        neighbours = (images for images, _ in data.batches("train", batch_size=2 * BATCH))
        pairs = ((images[0::2], images[1::2]) for images in neighbours)
    else:
        sides = data.batches(f"ood/{source}", batch_size=BATCH), data.batches("train", batch_size=BATCH)
        pairs = ((x, y) for (x, _), (y, _) in zip(*sides, strict=False))
    left = wanted
    for x, y in pairs:
        count = min(left, len(x), len(y))
        yield x[:count], y[:count]
        left -= count
        if left == 0:
            return


def _load(file: Path) -> PlasticityReport | None:
    try:
        return PlasticityReport(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("The stored plasticity %s is damaged (%s) and is measured again.", file, error)
        return None


def _save(report: PlasticityReport, file: Path) -> None:
    write_text(file, json.dumps(report.to_dict()))
