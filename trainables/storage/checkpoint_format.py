"""Checkpoints of a trial: only what differs from the pretrained network, verified on reading, without pickle.

A checkpoint is a folder of two files: `tensors.safetensors` and `manifest.json` (format, SHA-256 and size of the
former, the trial's plain-data state, and the SHA-256 of all this). It is written under a temporary name, synced and
renamed, so that a folder of the final name is complete; what was damaged later is found by its digests.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainables.specs.fault_injection import fault_point
from trainables.storage.atomic_files import atomic_folder

log = logging.getLogger("luthier")

FORMAT = 2
TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to something else."""


@dataclass(frozen=True)
class RunState:
    """Everything that the next unit of a trial depends on beside its `TrialSpec` and the pretrained weights."""

    tensors: Mapping[str, Tensor]
    """By name: `model/…` and `best/…` (differences from the pretrained network), `optimizer/<parameter>/<key>`."""
    meta: Mapping[str, Any]
    """JSON values: position, best unit, reports, digest of the pretrained weights."""


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def changed_tensors(current: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `current` that `reference` does not hold bit for bit."""
    return {name: value for name, value in current.items() if not bitwise_equal(value, reference.get(name))}


def bitwise_equal(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors have the same type, shape and bits (`torch.equal` would take 0.0 for -0.0, and no NaN for
    itself)."""
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.detach().view(bits), b.detach().to(a.device).view(bits))


def save_state(folder: str | Path, state: RunState) -> None:
    """Write `state` as the folder `folder`, whole or not at all.

    Raises:
        FileExistsError: `folder` exists and is not empty.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"A checkpoint is written to a new or empty folder, but {target} holds files.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as partial:
        save_file({k: _portable(v) for k, v in state.tensors.items()}, partial / TENSORS)
        fault_point("in_checkpoint")
        manifest = {
            "format": FORMAT,
            "sha256": _digest(partial / TENSORS),
            "bytes": (partial / TENSORS).stat().st_size,
            "state": state.meta,
        }
        plain = json.loads(json.dumps(manifest))  # as it will be read
        text = json.dumps({**plain, "digest": _digest_of(plain)}, indent=1, sort_keys=True)
        (partial / MANIFEST).write_text(text)


def load_state(folder: str | Path) -> RunState:
    """Read and verify a checkpoint; tensors come on the CPU.

    Raises:
        CheckpointError: incomplete, damaged, or of another format.
    """
    source = Path(folder)
    try:
        manifest = json.loads((source / MANIFEST).read_text())
        version, digest, meta = manifest["format"], manifest["sha256"], manifest["state"]
        own = manifest.pop("digest", None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"A checkpoint has a readable {MANIFEST}, but {source} has not: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"Checkpoints of format {FORMAT} can be read, but {source} has format {version!r}.")
    if own != _digest_of(manifest):
        raise CheckpointError(
            f"A checkpoint's {MANIFEST} must match its own digest, but that of {source} does not: the file is damaged. "
            "Use an earlier checkpoint."
        )
    try:
        found = _digest(source / TENSORS)
        if found != digest:
            raise CheckpointError(
                f"A checkpoint's tensors must match their SHA-256 {digest[:12]}…, but those of {source} have "
                f"{found[:12]}…: the file is damaged. Use an earlier checkpoint."
            )
        return RunState(load_file(source / TENSORS), meta)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The tensors of checkpoint {source} cannot be read: {error}") from error


def load_newest(folder: str | Path) -> RunState | None:
    """The state in `folder`, or of the newest intact sibling that is older (`checkpoint_000002` before
    `checkpoint_000003`), or None when there is none: the trial then starts over.

    Why: Ray loads the same latest checkpoint on every retry, a damaged one included.
    """
    source = Path(folder)
    stem, _, number = source.name.rpartition("_")
    older: list[Path] = []
    if stem and number.isdigit() and source.parent.is_dir():
        older = sorted(
            (p for p in source.parent.glob(f"{stem}_*") if p.name < source.name and p.is_dir()), reverse=True
        )
    for candidate in [source, *older]:
        try:
            return load_state(candidate)
        except CheckpointError as error:
            log.warning("Skipped a checkpoint. %s", error)
    return None


def _portable(value: Tensor) -> Tensor:
    # safetensors stores contiguous memory and refuses tensors that share it.
    return value.detach().to("cpu", copy=True).contiguous()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
