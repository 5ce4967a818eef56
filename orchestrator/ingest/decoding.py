"""All samples of a source, decoded once and in parallel, each written where its row of the store is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orchestrator.ingest.images import pixels_digest, square, to_eight_bit
from orchestrator.ingest.source import ArraySource, EncodedSource, Outcome, Source
from orchestrator.ingest.worker import write_at
from trainables.specs.redaction import is_secret

PER_WORKER = 256
"""Samples that are worth the start of one more process."""
PATIENCE = 300.0
"""Seconds for one request (at most 256 pictures) before its process is taken for hung and killed."""

DecodingProgress = Callable[[int, int, int], None]
"""Called with (samples done, samples in all, samples done that cannot be read)."""


@dataclass(frozen=True)
class Job:
    """What is to become of the samples."""

    side: int
    interpolation: str
    target: Path | None = None
    """File for the pixels; None = only look."""
    offsets: NDArray[np.int64] | None = None
    """Byte offset in the target of each sample of the source."""

    def offset(self, position: int) -> int | None:
        """Where the pixels of a sample go."""
        return None if self.offsets is None else int(self.offsets[position])


def decode_all(
    source: Source,
    wanted: Sequence[int],
    job: Job,
    workers: int | None = None,
    progress: DecodingProgress | None = None,
) -> dict[int, Outcome]:
    """Decode the samples at the positions `wanted` (rising).

    Args:
        workers: processes at most; None = one per CPU of this process.
        progress: called from several threads, see `DecodingProgress`.

    Returns:
        Outcome by position, in the order of `wanted`.

    Raises:
        OSError: the target could not be written.
    """
    found: dict[int, Outcome] = {}
    lock, unreadable = threading.Lock(), 0

    def done(outcomes: dict[int, Outcome]) -> None:
        nonlocal unreadable
        with lock:
            found.update(outcomes)
            unreadable += sum(outcome.reason is not None for outcome in outcomes.values())
            counts = len(found), len(wanted), unreadable
        if progress is not None:
            progress(*counts)

    count = max(1, min(workers or len(os.sched_getaffinity(0)), -(-len(wanted) // PER_WORKER)))
    if isinstance(source, ArraySource):
        _decode_arrays(source, set(wanted), job, done, count)
    elif isinstance(source, EncodedSource):
        _decode_encoded(source, wanted, job, done, count)
    return {position: found[position] for position in wanted}


def _decode_encoded(
    source: EncodedSource, wanted: Sequence[int], job: Job, done: Callable[[dict[int, Outcome]], None], count: int
) -> None:
    chunks, lock = source.chunks(wanted), threading.Lock()
    stopped = threading.Event()

    def serve() -> None:
        with contextlib.closing(_Decoder(job)) as decoder:
            while not stopped.is_set():
                with lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                request, positions = chunk
                items = [[_item(source, p), job.offset(p)] for p in positions]
                done(dict(zip(positions, decoder.outcomes(request, items), strict=True)))

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(serve) for _ in range(count)]
        try:
            for future in futures:
                future.result()
        finally:
            stopped.set()


def _item(source: EncodedSource, position: int) -> Any:
    where = source.samples[position].where
    return where[-1] if isinstance(where, tuple) else where


class _Decoder:
    """A worker process, started again when it dies."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._status = 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = self._start()

    def outcomes(self, request: dict[str, Any], items: list[list[Any]]) -> Iterator[Outcome]:
        """The outcome of each item; one that kills the process is quarantined for it, its neighbours are not."""
        reply = self._ask({**request, "items": items})
        if reply is None and len(items) > 1:
            for item in items:
                yield from self.outcomes(request, [item])
            return
        if reply is None:
            yield Outcome(f"the decoder died of it (exit status {self._status})", b"", b"", 0, 0, "", ())
            return
        if "error" in reply:
            raise OSError(f"The pixels could not be written to {self._job.target}: {reply['error']}")
        for reason, digest, pixels, width, height, kind, notes in reply["outcomes"]:
            yield Outcome(reason, bytes.fromhex(digest), bytes.fromhex(pixels), width, height, kind, tuple(notes))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The reply, or None if the process died (it has been replaced then)."""
        watchdog = threading.Timer(PATIENCE, self._process.kill)
        watchdog.start()
        try:
            line = _exchange(self._process, message)
        finally:
            watchdog.cancel()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        self._status = self._process.wait()
        self._process = self._start()
        return None

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.ingest.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **{name: value for name, value in os.environ.items() if not is_secret(name)},  # a picture may win
                "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                "OMP_NUM_THREADS": "1",
            },
        )
        target = str(self._job.target) if self._job.target is not None else None
        if not _exchange(process, {"target": target, "side": self._job.side, "interpolation": self._job.interpolation}):
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace")
            process.communicate()
            raise RuntimeError(f"The decoder process could not start:\n{text[-2000:]}")
        return process


def _exchange(process: subprocess.Popen[str], message: dict[str, Any]) -> str:
    """Send one line and wait for one; empty if the process has died."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    return process.stdout.readline()


def _decode_arrays(
    source: ArraySource, wanted: set[int], job: Job, done: Callable[[dict[int, Outcome]], None], count: int
) -> None:
    descriptor = os.open(job.target, os.O_WRONLY) if job.target is not None else None

    def one(position: int, pixels: NDArray[Any]) -> Outcome:
        eight = to_eight_bit(pixels) if pixels.dtype == np.uint16 else pixels
        whole = Image.fromarray(eight).convert("RGB")
        image = square(whole, job.side, job.interpolation)
        offset = job.offset(position)
        if descriptor is not None and offset is not None:
            write_at(descriptor, image.tobytes(), offset)
        digest = hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode() + pixels.tobytes()).digest()
        notes = ("sixteen_bit",) if pixels.dtype == np.uint16 else ()
        return Outcome(None, digest, pixels_digest(whole), pixels.shape[1], pixels.shape[0], "array", notes)

    try:
        with ThreadPoolExecutor(count) as pool:
            for first, run in source.arrays():
                positions = [p for p in range(first, first + len(run)) if p in wanted]
                outcomes = pool.map(one, positions, (run[p - first] for p in positions), chunksize=64)
                done(dict(zip(positions, outcomes, strict=True)))
    finally:
        if descriptor is not None:
            os.close(descriptor)
