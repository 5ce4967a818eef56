"""Which samples a trial sees, and in which order: pure functions of its spec and a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trainables.core.task import TrialSpec

if TYPE_CHECKING:
    from trainables.data.store_like import Indices, StoreLike

HELD_OUT = "held_out"
"""Name of the split that a `fold` trial is judged by: the training and validation images of the domain left out."""


def batch_positions(count: int, size: int, seed: int | None, drop_last: bool) -> list[Indices]:
    """Positions 0…count-1 in batches of `size`, shuffled by `seed` (None = in order).

    With `drop_last` a last, smaller batch is left out unless it is the only one: BatchNorm statistics of a remainder of
    a few images are noise, but a split smaller than a batch must still train.
    """
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    end = count - count % size if drop_last and count > size else count
    return [order[i : i + size].astype(np.int64) for i in range(0, end, size)]


def select_samples(spec: TrialSpec, store: StoreLike) -> dict[str, list[tuple[str, Indices]]]:
    """Split → parts, each a split of the store and positions (ascending) in it.

    `train` is the fraction of the task, or all of the domain of `task.train_on`; a held-out domain leaves `train` and
    `val` and makes the split `held_out`.

    Raises:
        ValueError: the held-out domain is not an ID domain, or no other is left; `train_on` is not an OOD domain.
    """
    parts = {split: [(split, np.arange(len(store.labels(split)), dtype=np.int64))] for split in store.splits}
    if spec.task.train_on is not None:
        return _oracle(spec.task.train_on, parts)
    used = store.fraction("train", spec.task.train_fraction)
    parts["train"] = [("train", np.arange(used, dtype=np.int64))]
    if spec.held_out is None:
        return parts
    domains = [store.domains[i] for i in np.unique(store.domain_ids("train"))]
    if spec.held_out not in domains:
        raise ValueError(f"A held-out domain is one of the ID domains {', '.join(domains)}, but got {spec.held_out!r}.")
    wanted = store.domains.index(spec.held_out)
    parts[HELD_OUT] = [(s, np.flatnonzero(store.domain_ids(s) == wanted)) for s in ("train", "val")]
    for split in ("train", "val"):
        source, indices = parts[split][0]
        parts[split] = [(source, indices[store.domain_ids(source)[indices] != wanted])]
        if len(parts[split][0][1]) == 0:
            raise ValueError(
                f"Without the held-out domain {spec.held_out!r} the {split} split must keep images, but it keeps none. "
                f"The ID domains are {', '.join(domains)}."
            )
    return parts


def _oracle(domain: str, parts: dict[str, list[tuple[str, Indices]]]) -> dict[str, list[tuple[str, Indices]]]:
    """`train` replaced by a whole OOD domain; validation stays that of the ID domains."""
    if f"ood/{domain}" not in parts:
        known = ", ".join(split.removeprefix("ood/") for split in parts if split.startswith("ood/"))
        raise ValueError(f"An oracle reference trains on an OOD domain ({known or 'none'}), but got {domain!r}.")
    return {**parts, "train": parts[f"ood/{domain}"]}
