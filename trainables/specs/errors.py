"""Which failures of a trial are its own, so that trying again would waste the same time once more."""

from __future__ import annotations

import traceback

import torch

from trainables.specs.redaction import redact

_MACHINE = ("CUDA error", "CUDA driver error", "NCCL", "CUDNN_STATUS", "CUBLAS_STATUS")


def is_retryable(error: BaseException) -> bool:
    """Whether the same trial may well go right elsewhere or later: files and network (OSError), a GPU in a bad state,
    and whatever is no error of the program at all. Everything else is a matter of the configuration, the data or the
    code, and would happen again: a diverged loss, too little memory, an impossible value."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, OSError | torch.AcceleratorError) or not isinstance(error, Exception):
        return True

    if isinstance(error, FencedError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MACHINE)


def failure_text(error: BaseException, limit: int = 8000) -> str:
    """The traceback without secrets, its end if it is long."""
    return redact("".join(traceback.format_exception(error)))[-limit:]


class FencedError(RuntimeError):
    """Another process has taken the trial over; this one must not write any more."""


class NonFiniteError(RuntimeError):
    """Training or validation loss became NaN or infinite: the trial failed and its numbers mean nothing."""
