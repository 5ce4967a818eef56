"""Kept weights of a finished trial: what differs from the pretrained network, with digests.

    <study>/weights/trial-0007/tensors.safetensors   tensors `tensors/<name>` and `adapter/<name>`
                               manifest.json         format, SHA-256 and size of the former, `meta`, own digest

The folder is written atomically, so one that has its final name is complete; damage done later is detected by the
digests. No pickle. `trainables.engine.tuned_network` takes these out of a network and puts them back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainables.specs.fault_injection import fault_point
from trainables.storage.atomic_files import atomic_folder
from trainables.storage.checkpoint_format import (
    MANIFEST,
    TENSORS,
    manifest_digest,
    save_tensors,
    write_manifest,
)
from trainables.storage.file_identity import FileIdentity

FORMAT = 1
PARTS = ("tensors", "adapter")
"""First parts of the stored names."""


class WeightsError(ValueError):
    """Kept weights are missing, damaged, of another format, or of another network."""


@dataclass(frozen=True)
class KeptWeights:
    """Weights of one finished trial, without the pretrained network that they belong to."""

    tensors: Mapping[str, Tensor]
    """By state-dict name of the trial's model (`backbone.…`, `head.…`): everything that differs from the pretrained
    network, the whole head and every buffer of BatchNorm. Weights that merging `adapter` gives are left out."""
    adapter: Mapping[str, Tensor]
    """Low-rank updates before merging, by module path: `<path>.lora_A` (r, in) and `<path>.lora_B` (out, r). Empty
    where `tensors` holds everything."""
    meta: Mapping[str, Any]
    """JSON values: the trial, its network, its preprocessing and its result; see
    `trainables.engine.trial.Trial.kept_weights`."""


def save_weights(folder: str | Path, weights: KeptWeights) -> FileIdentity:
    """Write weights atomically, in place of those of an earlier attempt.

    Returns the identity of the tensors.

    Raises:
        OSError: the disk refused a write.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}-*"):  # of an attempt whose process was killed
        shutil.rmtree(leftover, ignore_errors=True)
    parts = dict(zip(PARTS, (weights.tensors, weights.adapter), strict=True))
    stored = {f"{part}/{name}": value for part, group in parts.items() for name, value in group.items()}
    with atomic_folder(target) as partial:
        save_tensors(stored, partial / TENSORS)
        fault_point("in_weights")
        file = FileIdentity.of(partial / TENSORS)
        manifest = {"format": FORMAT, "sha256": file.sha256, "bytes": file.bytes, "meta": weights.meta}
        write_manifest(manifest, partial / MANIFEST)
        # Last, right before the rename, which replaces an empty folder only.
        discard_weights(target)
    return file


def load_weights(folder: str | Path) -> KeptWeights:
    """Read and verify weights; the tensors are on the CPU.

    Raises:
        WeightsError: missing, damaged, or of another format.
    """
    source = Path(folder)
    manifest = _read_manifest(source)
    try:
        actual = FileIdentity.of(source / TENSORS)
        expected = FileIdentity(manifest["sha256"], manifest["bytes"])
        if actual != expected:
            raise WeightsError(
                f"Kept weights must match their SHA-256 {str(expected.sha256)[:12]}… and size {expected.bytes}, but "
                f"{source / TENSORS} has {actual.sha256[:12]}… and {actual.bytes} bytes: the file is damaged. Restore "
                "it from a copy, or train the configuration again."
            )
        stored = load_file(source / TENSORS)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"Kept weights have a readable {TENSORS}, but {source} has none ({error}).") from error
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in stored.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise WeightsError(f"Kept tensors belong to {' or '.join(PARTS)}, but {source} has one named {name!r}.")
        parts[part][rest] = tensor
    return KeptWeights(parts["tensors"], parts["adapter"], manifest["meta"])


def discard_weights(folder: str | Path) -> None:
    """Remove weights, if there are any.

    In one step, so that no half of them is left under their name.
    """
    target = Path(folder)
    hidden = target.with_name(f".{target.name}-discarded-{os.getpid()}")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        os.rename(target, hidden)
    except FileNotFoundError:
        return
    fault_point("in_discard")
    shutil.rmtree(hidden, ignore_errors=True)


def _read_manifest(source: Path) -> dict[str, Any]:
    """The verified manifest without its digest."""
    path = source / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
        digest = manifest.pop("digest", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"Kept weights are a folder with {TENSORS} and {MANIFEST}, but {source} is none "
            f"({type(error).__name__}: {error})."
        ) from error
    if version != FORMAT:
        raise WeightsError(
            f"Kept weights of format {FORMAT} can be read, but {source} has format {version!r}. Use the Luthier that "
            "wrote them."
        )
    if digest != manifest_digest(manifest) or not isinstance(manifest.get("meta"), dict):
        raise WeightsError(
            f"{path} must match its own digest, but it does not: the file is damaged. Restore it from a copy, or train "
            "the configuration again."
        )
    return manifest
