"""What has changed since a study was last run, and whether it may be continued all the same.

A study is one experiment: its finished trials are compared with those that are still to come. So a change of anything
that a number depends on (the study file, the data, the code) is refused, with the difference, until a person allows
it key by key.

Versions of everything whose change could change a number: Python, packages, and Luthier's own code.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import logging
import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

from orchestrator.errors import PreflightError, Problem
from orchestrator.record.records import study_header

PACKAGES = ("luthier", "ray", "torch", "timm", "optuna", "mlflow", "pyarrow", "numpy", "scikit-learn")
CODE = ("trainables", "search_spaces")
"""Packages that decide what a trial computes."""


def versions() -> dict[str, str]:
    """Name → version. `code` is a digest of the packages `CODE`, which a version number in development is not."""
    found = {"python": platform.python_version(), "platform": sys.platform, "code": code_digest()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@functools.cache
def code_digest() -> str:
    """Twelve hex digits over the Python files of `CODE`, names included."""
    digest = hashlib.sha256()
    for package in CODE:
        root = resources.files(package)
        with resources.as_file(root) as folder:
            for file in sorted(folder.rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


log = logging.getLogger("luthier")

HARMLESS = (
    "name", "storage", "tracking.*", "resources.*", "failures.*", "confirm.*",  # where and how much, not what
    "diagnostics.measure", "diagnostics.plasticity", "diagnostics.fsr*",  # what is looked at besides
    "data.root", "data.on_bad", "data.on_leak", "data.label",  # the data themselves are known by their digest
    "versions.ray", "versions.mlflow", "versions.pyarrow", "versions.platform",
)  # fmt: skip
"""Keys, or patterns of keys, that no number of a trial depends on. So it is with `search.trials`, as long as it is
raised, and with the last part of Python's version."""

_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """One key with another value than in the last run."""

    key: str
    """Dotted, as in the study file; `versions.<package>` and `dataset_digest` are not from there."""
    was: Any
    now: Any
    harmless: bool

    def __str__(self) -> str:
        said = " (images, classes or splits are others)" if self.key == "dataset_digest" else ""
        return f"{self.key}: {_shown(self.was)} -> {_shown(self.now)}{said}"


class ChangedStudyError(PreflightError):
    """A study that is not the one that was run last.

    Args:
        refused: the changes that were neither harmless nor allowed.
        study: the study's name.
    """

    heading = "was changed since its last run"

    def __init__(self, refused: Sequence[Change], study: object) -> None:
        super().__init__([Problem((), str(change)) for change in refused], f"The study {study!r}")
        options = " ".join(f"--allow-change {change.key}" for change in refused)
        self.args = (
            f"{self.args[0]}\nPut the old values back, or give the study another name. If its trials may differ in "
            f"this, run it with {options}",
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two `study_started` headers, in the order of the file."""
    old, new = _flat(before), _flat(now)
    found = []
    for key in [*new, *(key for key in old if key not in new)]:
        was, is_ = old.get(key, _ABSENT), new.get(key, _ABSENT)
        unknown = was is _ABSENT and key.startswith("versions.")  # an older Luthier did not say it
        entry = key.split(".")[:2]
        within = entry[0] == "strategies" and len(key.split(".")) > 2
        moved = within and (".".join(entry) in _entries(old)) != (".".join(entry) in _entries(new))
        if was != is_ and not unknown and not moved:  # a whole entry that came or went is said by `strategies`
            found.append(Change(key, _none(was), _none(is_), _harmless(key, was, is_)))
    return found


def check_changes(
    events: Sequence[Mapping[str, Any]], now: Mapping[str, Any], allowed: Collection[str] = ()
) -> list[Change]:
    """The changes since the last run, if the study may be continued with them.

    Args:
        events: the study's journal.
        now: header of the run that is about to start.
        allowed: keys that a person allowed to change; a key covers everything below it.

    Raises:
        ChangedStudyError: changes that are neither harmless nor allowed; nothing is refused before the first trial.
    """
    before = study_header(events)
    if not before:
        return []
    found = changes(before, now)
    started = any(event["kind"] == "trial_started" for event in events)
    refused = [c for c in found if not c.harmless and not any(_covers(key, c.key) for key in allowed)]
    if refused and started:
        raise ChangedStudyError(refused, now.get("study"))
    for change in found:
        log.info("Changed since the last run: %s", change)
    return found


def _flat(header: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    spec = dict(header.get("spec") or {})
    entries = spec.pop("strategies", None) or []
    _walk("", spec, flat)
    if entries:
        flat["strategies"] = [entry.get("label") for entry in entries]
    for entry in entries:
        for key, value in entry.items():
            if key != "label":
                _walk(f"strategies.{entry.get('label')}.{key}", value, flat)
    _walk("versions", header.get("versions") or {}, flat)
    if "dataset_digest" in header:
        flat["dataset_digest"] = header["dataset_digest"]
    return flat


def _walk(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            _walk(f"{prefix}.{key}" if prefix else str(key), item, into)
    else:
        into[prefix] = value


def _entries(flat: Mapping[str, Any]) -> set[str]:
    return {f"strategies.{label}" for label in flat.get("strategies") or ()}


def _harmless(key: str, was: Any, now: Any) -> bool:
    if key == "search.trials":
        return isinstance(was, int) and isinstance(now, int) and now >= was
    if key == "versions.python":
        return str(was).rpartition(".")[0] == str(now).rpartition(".")[0]
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def _covers(allowed: str, key: str) -> bool:
    return key == allowed or key.startswith(f"{allowed}.")


def _none(value: Any) -> Any:
    return None if value is _ABSENT else value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
