"""A study file made fit to be read on another machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.cluster.auth import is_loopback


def resolved_study(path: str | Path) -> dict[str, Any]:
    """The checked fields of a study file with every relative path made absolute (from the file's own folder).

    Raises:
        StudyError: everything that is wrong with the file, at once.
    """
    from orchestrator.study_file.spec import load_study

    file = Path(path)
    fields: dict[str, Any] = load_study(file).model_dump(mode="json", exclude_unset=True)
    return absolute_paths(fields, file.resolve().parent)


def absolute_paths(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a study's fields in which data.root, model.weights, model.name (`local-dir:…`), storage and a SQLite
    tracking.uri are absolute; URLs stay.

    Storage that is not given becomes `<folder>/studies`, for the folder that a job runs in is deleted with the job.
    """
    study: dict[str, Any] = json.loads(json.dumps(fields))

    def absolute(value: str) -> str:
        return value if "://" in value else str((folder / Path(value).expanduser()).absolute())

    for section, key in (("data", "root"), ("model", "weights")):
        if isinstance(study.get(section), dict) and study[section].get(key):
            study[section][key] = absolute(study[section][key])
    for section, key, prefix in (("model", "name", "local-dir:"), ("tracking", "uri", "sqlite:///")):
        if isinstance(study.get(section), dict) and str(study[section].get(key) or "").startswith(prefix):
            study[section][key] = prefix + absolute(study[section][key].removeprefix(prefix))
    study["storage"] = absolute(study.get("storage") or "studies")
    return study


def cautions(study: Mapping[str, Any], url: str) -> list[str]:
    """What may go wrong when the cluster behind `url` is another machine, one sentence each."""
    parts = urlsplit(url)
    remote = not is_loopback(parts.hostname or "")
    found = []
    if remote and parts.scheme == "http":
        found.append(f"the token travels to {parts.netloc} unencrypted; use an SSH tunnel or https.")
    tracking = str((study.get("tracking") or {}).get("uri") or "")
    if remote and tracking.startswith("http") and is_loopback(urlsplit(tracking).hostname or ""):
        found.append(f"tracking.uri {tracking} means the cluster's head node there, not this machine.")
    if remote and "://" not in study["storage"]:
        found.append(f"storage {study['storage']} must be one folder shared by all machines of the cluster.")
    return found
