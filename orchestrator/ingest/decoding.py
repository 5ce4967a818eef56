"""Decoding of all samples, once and in parallel.

Each is written to its row of the store.

Encoded images are decoded in worker processes (`orchestrator.ingest.worker`), one thread of this process per worker;
pixel arrays are converted by threads.
"""

from __future__ import annotations

import base64
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

from orchestrator.ingest.images import pixels_digest, square, thumbnail, to_eight_bit
from orchestrator.ingest.masks import MaskOutcome, Translation
from orchestrator.ingest.source import ArraySource, EncodedSource, Outcome, Source
from orchestrator.ingest.worker import write_at
from trainables.specs.redaction import is_secret

SAMPLES_PER_WORKER = 256
"""Samples that justify one more process."""
REQUEST_TIMEOUT_S = 300.0
"""Time limit of one request (at most 256 images), after which its process is killed, in seconds."""

DecodingProgress = Callable[[int, int, int], None]
"""Called with (samples done, samples in all, unreadable samples)."""


@dataclass(frozen=True)
class DecodeJob:
    """Size of the decoded images, and where their pixels are written."""

    side: int | None
    """In pixels; 0 = whole pictures, None = read the size in each header, and decode no picture."""
    interpolation: str
    target: Path | None = None
    """File for the pixels; None = decode only."""
    offsets: NDArray[np.int64] | None = None
    """Byte offset in the target of each sample of the source."""
    crop: int | None = None
    """See `orchestrator.ingest.images.square`."""
    translation: Translation | None = None
    """Of masks that are written; None = masks are summarised."""
    mask_offsets: NDArray[np.int64] | None = None
    """Byte offset in the target of each sample's mask."""
    sizes: NDArray[np.int64] | None = None
    """(n, 2): height and width that the target has room for; None = those of the squares."""

    def item(self, source: EncodedSource, position: int) -> list[Any]:
        """A sample as the fields of `orchestrator.ingest.worker.Item`."""
        sample = source.samples[position]
        fields = [_within_chunk(sample.location), _entry(self.offsets, position)]
        if sample.mask is None:
            return fields
        size = None if self.sizes is None else self.sizes[position].tolist()
        return [*fields, _within_chunk(sample.mask), _entry(self.mask_offsets, position), size]


def available_cpus() -> int:
    """CPUs that this process may use."""
    # `sched_getaffinity` exists on Linux only; `os.process_cpu_count`, which does the same, since Python 3.13.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decode_all(
    source: Source,
    positions: Sequence[int],
    job: DecodeJob,
    workers: int | None = None,
    progress: DecodingProgress | None = None,
) -> dict[int, Outcome]:
    """Decode the samples at `positions` (ascending).

    Args:
        source: the scan.
        positions: in `source.samples`.
        job: size and target.
        workers: maximum number of processes; None = one per CPU of this process.
        progress: called from several threads, see `DecodingProgress`.

    Returns:
        Outcome by position, in the order of `positions`.

    Raises:
        OSError: the target could not be written.
    """
    outcomes: dict[int, Outcome] = {}
    lock = threading.Lock()
    unreadable = 0

    def collect(batch: dict[int, Outcome]) -> None:
        nonlocal unreadable
        with lock:
            outcomes.update(batch)
            unreadable += sum(outcome.reason is not None for outcome in batch.values())
            counts = (len(outcomes), len(positions), unreadable)
        if progress is not None:
            progress(*counts)

    # A process takes longer to start than to decode a few hundred images.
    count = max(1, min(workers or available_cpus(), -(-len(positions) // SAMPLES_PER_WORKER)))
    if isinstance(source, ArraySource):
        _decode_arrays(source, set(positions), job, collect, count)
    elif isinstance(source, EncodedSource):
        _decode_encoded(source, positions, job, collect, count)
    return {position: outcomes[position] for position in positions}


def image_sizes(source: Source, positions: Sequence[int]) -> list[tuple[int, int]]:
    """Width and height in pixels of those samples at `positions` (ascending) that can be read; nothing is decoded."""
    if isinstance(source, EncodedSource):
        outcomes = decode_all(source, positions, DecodeJob(None, "nearest"), workers=1)
        return [(outcome.width, outcome.height) for outcome in outcomes.values() if outcome.reason is None]
    assert isinstance(source, ArraySource)
    shapes = [shape for count, shape in source.shapes() for _ in range(count)]
    return [(shapes[position][1], shapes[position][0]) for position in positions]


def _decode_encoded(
    source: EncodedSource,
    positions: Sequence[int],
    job: DecodeJob,
    collect: Callable[[dict[int, Outcome]], None],
    count: int,
) -> None:
    chunks = source.chunks(positions)
    lock = threading.Lock()
    stopped = threading.Event()

    def serve() -> None:
        with contextlib.closing(_DecoderProcess(job)) as decoder:
            while not stopped.is_set():
                with lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                request, chunk_positions = chunk
                items = [job.item(source, i) for i in chunk_positions]
                collect(dict(zip(chunk_positions, decoder.outcomes(request, items), strict=True)))

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(serve) for _ in range(count)]
        try:
            for future in futures:
                future.result()
        finally:
            stopped.set()  # after an error of one thread the others finish their chunk only


def _within_chunk(location: Any) -> Any:
    """The part of a sample's location that differs within a chunk."""
    return location[-1] if isinstance(location, tuple) else location


def _entry(offsets: NDArray[np.int64] | None, position: int) -> int | None:
    """Byte offset of a sample; None = not written."""
    if offsets is None or offsets[position] < 0:
        return None
    return int(offsets[position])


class _DecoderProcess:
    """A worker process, restarted when it dies."""

    def __init__(self, job: DecodeJob) -> None:
        self._job = job
        self._exit_status = 0
        # A file, not a pipe: a pipe that is never read fills up and blocks the process.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._process = self._start()

    def outcomes(self, request: dict[str, Any], items: list[list[Any]]) -> Iterator[Outcome]:
        """The outcome of each item.

        An item that kills the process is quarantined, its neighbours are decoded.
        """
        reply = self._request({**request, "items": items})
        if reply is None and len(items) > 1:
            # One of them killed the process: each alone, to find out which.
            for item in items:
                yield from self.outcomes(request, [item])
            return
        if reply is None:
            yield Outcome(f"the decoder died of it (exit status {self._exit_status})", b"", b"", 0, 0, "", ())
            return
        if "error" in reply:
            raise OSError(f"The pixels could not be written to {self._job.target}: {reply['error']}")
        for reason, digest, pixels, width, height, file_format, notes, thumb, mask in reply["outcomes"]:
            yield Outcome(
                reason,
                bytes.fromhex(digest),
                bytes.fromhex(pixels),
                width,
                height,
                file_format,
                tuple(notes),
                base64.b64decode(thumb),
                None if mask is None else MaskOutcome.from_json(mask),
            )

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _request(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The reply; None = the process died, and has been replaced."""
        # A timer, because `readline` has no time limit; the kill closes the pipe and ends the read.
        watchdog = threading.Timer(REQUEST_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            line = _exchange(self._process, message)
        finally:
            watchdog.cancel()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        self._exit_status = self._process.wait()
        self._process = self._start()
        return None

    def _start(self) -> subprocess.Popen[str]:
        # A malicious image may take over the decoder process: give it no secrets.
        environment = {name: value for name, value in os.environ.items() if not is_secret(name)}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # There is a process per CPU; threads inside each would only compete.
        environment["OMP_NUM_THREADS"] = "1"
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.ingest.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        target = str(self._job.target) if self._job.target is not None else None
        job = self._job
        first_line = {
            "target": target,
            "side": job.side,
            "interpolation": job.interpolation,
            "crop": job.crop,
            "translation": None if job.translation is None else job.translation.to_json(),
        }
        if not _exchange(process, first_line):
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace")
            process.communicate()
            raise RuntimeError(f"The decoder process could not start:\n{text[-2000:]}")
        return process


def _exchange(process: subprocess.Popen[str], message: dict[str, Any]) -> str:
    """Send one line and read one; empty if the process has died."""
    assert process.stdin is not None
    assert process.stdout is not None
    # A process that has died: `readline` then returns the empty line of its closed pipe.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    return process.stdout.readline()


def _decode_arrays(
    source: ArraySource,
    positions: set[int],
    job: DecodeJob,
    collect: Callable[[dict[int, Outcome]], None],
    count: int,
) -> None:
    descriptor = os.open(job.target, os.O_WRONLY) if job.target is not None else None
    assert job.side is not None
    side = job.side

    def convert(position: int, pixels: NDArray[Any]) -> Outcome:
        notes: tuple[str, ...] = ()
        eight_bit = pixels
        if pixels.dtype == np.uint16:
            eight_bit = to_eight_bit(pixels)
            notes = ("sixteen_bit",)
        image = Image.fromarray(eight_bit).convert("RGB")
        offset = _entry(job.offsets, position)
        stored = square(image, side, job.interpolation, job.crop)
        if descriptor is not None and offset is not None:
            write_at(descriptor, stored.tobytes(), offset)
        # With type and shape: the same bytes may be another picture.
        digest = hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode() + pixels.tobytes()).digest()
        height, width = pixels.shape[:2]
        return Outcome(None, digest, pixels_digest(image), width, height, "array", notes, thumbnail(image))

    try:
        with ThreadPoolExecutor(count) as pool:
            for first, block in source.arrays():
                in_block = [i for i in range(first, first + len(block)) if i in positions]
                outcomes = pool.map(convert, in_block, (block[i - first] for i in in_block), chunksize=64)
                collect(dict(zip(in_block, outcomes, strict=True)))
    finally:
        if descriptor is not None:
            os.close(descriptor)
