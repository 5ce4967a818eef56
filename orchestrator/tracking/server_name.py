"""One name for one tracking server, however its URI is spelled."""

from __future__ import annotations

from urllib.parse import urlsplit

from orchestrator.tracking.client import sqlite_file

PORTS = {"http": 80, "https": 443}
THIS_MACHINE = ("127.0.0.1", "::1", "0.0.0.0")


def server_name(uri: str) -> str:
    """The URI without what makes no other server of it: capitals, the default port, a slash at the end, who asks, names
    of this machine; of a SQLite file, the absolute path without links. Two names may still be one server (an alias, a
    server of that SQLite file): then the runs and points are found again, which takes time and adds nothing.
    """
    file = sqlite_file(uri)
    if file is not None:
        return f"sqlite:///{file.resolve()}"
    try:
        parts = urlsplit(uri)
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return uri
    if parts.scheme not in PORTS:
        return uri
    host = (parts.hostname or "").rstrip(".")
    return f"{parts.scheme}://{'localhost' if host in THIS_MACHINE else host}:{port}{parts.path.rstrip('/')}"
