"""That a store still is what was written: its digest is compared before a run, and not only its size."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from trainables.core.cache import cache_root
from trainables.core.durable import write_text
from trainables.data.store import DATA, Store

log = logging.getLogger("luthier")

SMALL = 2**30
"""Bytes that are compared before every run: a second or two. What is larger is compared once on each machine for each
state of the file (size and time of modification): a disk that changes bits later is then found by
`luthier run --check` alone."""


def check_intact(store: Store) -> None:
    """Compare the store's SHA-256 with the manifest's, unless it is large and was compared before.

    Raises:
        StoreError: the file has changed since it was written; the message says what to do.
    """
    note, state = _note(store), _state(store)
    if store.manifest["bytes"] > SMALL:
        if note.exists() and note.read_text(encoding="utf-8") == state:
            return
        log.info("Comparing the digest of %s (%.1f GiB), once", store.path, store.manifest["bytes"] / 2**30)
    store.verify()
    remember_intact(store)


def remember_intact(store: Store) -> None:
    """Take note of a large store whose digest is known to be right, such as one that was just written."""
    if store.manifest["bytes"] > SMALL:
        note = _note(store)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, _state(store))


def _note(store: Store) -> Path:
    return cache_root() / "intact" / f"{hashlib.sha256(str(store.path).encode()).hexdigest()[:24]}.json"


def _state(store: Store) -> str:
    stat = (store.path / DATA).stat()
    return json.dumps([str(store.path), stat.st_size, stat.st_mtime_ns, store.digest])
