"""Checkpoint format: changed tensors and plain data, with SHA-256 digests.

Stored are the tensors that differ from the pretrained network. A checkpoint is a folder of two files:
`tensors.safetensors`, and `manifest.json` with the format, the SHA-256 and size of the former, the trial's JSON state,
and the SHA-256 of all this. The folder is written atomically, so one that has its final name is complete; damage done
later is detected by the digests. No pickle.
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
from trainables.storage.file_identity import FileIdentity, file_digest

log = logging.getLogger("luthier")

FORMAT = 2
TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to something else."""


@dataclass(frozen=True)
class RunState:
    """State of a trial between two units or steps.

    Beside its `TrialSpec` and the pretrained weights.
    """

    tensors: Mapping[str, Tensor]
    """`model/…` and `best/…` (where they differ from the pretrained network), `optimizer/<parameter>/<key>`."""
    meta: Mapping[str, Any]
    """JSON values: unit and step, best unit, reports, digest of the pretrained weights."""


_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def changed_tensors(current: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `current` that are absent from `reference` or not bitwise equal to it."""
    return {name: value for name, value in current.items() if not bitwise_equal(value, reference.get(name))}


def bitwise_equal(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors have the same dtype, shape and bits.

    Example:
        >>> bitwise_equal(torch.tensor(float("nan")), torch.tensor(float("nan")))
        True
        >>> bitwise_equal(torch.tensor(0.0), torch.tensor(-0.0))
        False
    """
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Compared as integers: `torch.equal` calls 0.0 and -0.0 equal, and NaN unequal to itself.
    integer = _INTEGER_OF_SIZE[a.element_size()]
    return torch.equal(a.detach().view(integer), b.detach().to(a.device).view(integer))


def save_state(folder: str | Path, state: RunState) -> None:
    """Write a checkpoint folder atomically.

    Raises:
        FileExistsError: `folder` exists and is not empty.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"A checkpoint is written to a new or empty folder, but {target} holds files.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as partial:
        # The tensors before the manifest, which holds their digest.
        save_tensors(state.tensors, partial / TENSORS)
        fault_point("in_checkpoint")
        stored = FileIdentity.of(partial / TENSORS)
        manifest = {"format": FORMAT, "sha256": stored.sha256, "bytes": stored.bytes, "state": state.meta}
        write_manifest(manifest, partial / MANIFEST)


def load_state(folder: str | Path) -> RunState:
    """Read and verify a checkpoint; its tensors are on the CPU.

    Raises:
        CheckpointError: incomplete, damaged, or of another format.
    """
    source = Path(folder)
    try:
        manifest = json.loads((source / MANIFEST).read_text())
        version = manifest["format"]
        expected = manifest["sha256"]
        meta = manifest["state"]
        digest = manifest.pop("digest", None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"A checkpoint has a readable {MANIFEST}, but {source} has not: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"Checkpoints of format {FORMAT} can be read, but {source} has format {version!r}.")
    if digest != manifest_digest(manifest):
        raise CheckpointError(
            f"A checkpoint's {MANIFEST} must match its own digest, but that of {source} does not: the file is damaged. "
            "Use an earlier checkpoint."
        )
    try:
        actual = file_digest(source / TENSORS)
        if actual != expected:
            raise CheckpointError(
                f"A checkpoint's tensors must match their SHA-256 {expected[:12]}…, but those of {source} have "
                f"{actual[:12]}…: the file is damaged. Use an earlier checkpoint."
            )
        return RunState(load_file(source / TENSORS), meta)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The tensors of checkpoint {source} cannot be read: {error}") from error


def load_newest(folder: str | Path) -> RunState | None:
    """Load a checkpoint, or the newest valid one of its older siblings (`checkpoint_000002` before
    `checkpoint_000003`).

    Ray loads the same latest checkpoint on every retry, a damaged one included.

    Returns:
        The state; None = no valid checkpoint, the trial starts from the pretrained network.
    """
    source = Path(folder)
    stem, _, number = source.name.rpartition("_")
    older: list[Path] = []
    if stem and number.isdigit() and source.parent.is_dir():
        siblings = source.parent.glob(f"{stem}_*")
        # By name: Tune's numbers have leading zeros.
        older = sorted((path for path in siblings if path.name < source.name and path.is_dir()), reverse=True)
    for checkpoint in [source, *older]:
        try:
            return load_state(checkpoint)
        except CheckpointError as error:
            log.warning("Skipped a checkpoint. %s", error)
    return None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write copies of tensors, by name, as one safetensors file.

    Args:
        metadata: of the file's header; None = none.

    Raises:
        OSError: the disk refused a write.
    """
    try:
        save_file(
            {name: _portable(tensor) for name, tensor in tensors.items()},
            path,
            metadata=None if metadata is None else dict(metadata),
        )
    except SafetensorError as error:  # safetensors' own type for a full or failing disk
        raise OSError(str(error)) from error


def write_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """Write a manifest as JSON, with its own digest."""
    # Through JSON and back: tuples become lists and integer keys strings, and the digest is of what will be read.
    plain = json.loads(json.dumps(manifest))
    path.write_text(json.dumps({**plain, "digest": manifest_digest(plain)}, indent=1, sort_keys=True))


def _portable(tensor: Tensor) -> Tensor:
    # safetensors stores contiguous memory and refuses tensors that share it.
    return tensor.detach().to("cpu", copy=True).contiguous()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest, in hex."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
