"""Errors of a trial, and which of them a retry can cure."""

from __future__ import annotations

import traceback

import torch

from trainables.specs.redaction import redact

_DEVICE_ERRORS = ("CUDA error", "CUDA driver error", "NCCL", "CUDNN_STATUS", "CUBLAS_STATUS")
"""Parts of a RuntimeError's message that blame the device."""


class FencedError(RuntimeError):
    """Another process has acquired the trial; this one must not write any more."""


class NonFiniteError(RuntimeError):
    """The training or validation loss became NaN or infinite: the trial diverged."""


def is_retryable(error: BaseException) -> bool:
    """Whether the same trial may succeed on another machine or later.

    Retryable: file and network errors (OSError), device errors, a lost fencing token, and what is no `Exception`
    (interrupts). Not retryable, since deterministic: a diverged loss, too little memory, an invalid value, a bug.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, OSError | torch.AcceleratorError | FencedError) or not isinstance(error, Exception):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _DEVICE_ERRORS)


def failure_text(error: BaseException, limit: int = 8000) -> str:
    """The redacted traceback; its last `limit` characters if it is longer."""
    # Redacted first: a secret that is cut in half is not recognised. The end is kept, where the exception stands.
    return redact("".join(traceback.format_exception(error)))[-limit:]
