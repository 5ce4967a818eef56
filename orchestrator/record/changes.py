"""Changes of a study since its last run.

They decide whether it may be continued. A study is one experiment: its finished trials are compared with the remaining
ones. A change of anything that a number depends on (the study file, the data, packages, Luthier's own code) is
therefore refused, with the difference, until it is allowed key by key.
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
"""Packages of Luthier that determine what a trial computes."""


def versions() -> dict[str, str]:
    """Versions that a trial's numbers may depend on: Python, platform, packages, and Luthier's code.

    `code` is a digest of the packages `CODE`: during development, code changes while the version number does not.
    """
    names = {"python": platform.python_version(), "platform": sys.platform, "code": code_digest()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            names[package] = metadata.version(package)
    return names


@functools.cache
def code_digest() -> str:
    """First twelve hexadecimal digits of SHA-256 over the Python files of `CODE` and their names."""
    digest = hashlib.sha256()
    for package in CODE:
        root = resources.files(package)
        with resources.as_file(root) as folder:
            for file in sorted(folder.rglob("*.py")):
                # Names too: a file that moves, or is renamed into a strategy, changes what trials compute.
                digest.update(f"{package}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


log = logging.getLogger("luthier")

HARMLESS = (
    "name", "storage", "keep", "tracking.*", "resources.*", "failures.*", "confirm.*",  # where and how much, not what
    "diagnostics.measure", "diagnostics.plasticity", "diagnostics.fsr*",  # additional measurements
    "search.evaluate_at_rungs", "evaluate", "evaluate.*",
    # Images, labels and masks themselves are covered by their digest.
    "data.root", "data.on_bad", "data.on_leak", "data.label", "data.labels*", "data.ignore", "data.mask",
    "versions.ray", "versions.mlflow", "versions.pyarrow", "versions.platform",
)  # fmt: skip
"""Keys, or patterns of keys, that no number of a trial depends on. `_harmless` adds raising `search.trials`, and the
patch level of Python, and takes out `LAYOUT`."""
LAYOUT = "resources.channels_last"
"""Key of the memory layout: the one of `resources` that the bits of a trial depend on."""
BEFORE = {"task": "classification"}
"""Keys that the journals of earlier versions lack → the value that they stand for."""
NOTES = {
    "dataset_digest": "images, classes or splits differ",
    "versions.code": "Luthier's own code differs, as after an update",
}
"""Key → explanation of a change whose values are digests."""

_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """One key whose value differs from the last run's."""

    key: str
    """Dotted key of the study file, `versions.<package>` or `dataset_digest`."""
    was: Any
    now: Any
    harmless: bool

    def __str__(self) -> str:
        note = f" ({NOTES[self.key]})" if self.key in NOTES else ""
        return f"{self.key}: {_text(self.was)} -> {_text(self.now)}{note}"


class ChangedStudyError(PreflightError):
    """A study that differs from its last run.

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
    """Differences between two `study_started` headers, in the order of the study file."""
    old = {**BEFORE, **_flat(before)}
    new = {**BEFORE, **_flat(now)}
    differences = []
    for key in dict.fromkeys([*new, *old]):
        old_value = old.get(key, _ABSENT)
        new_value = new.get(key, _ABSENT)
        if old_value == new_value:
            continue
        if old_value is _ABSENT and key.startswith("versions."):  # journals of earlier versions lack it
            continue
        if _none(old_value) is None and _none(new_value) is None:  # a key that one of the versions lacks, and no value
            continue
        if _of_added_or_removed_entry(key, old, new):  # reported once, as a change of `strategies`
            continue
        differences.append(Change(key, _none(old_value), _none(new_value), _harmless(key, old_value, new_value)))
    return differences


def check_changes(
    events: Sequence[Mapping[str, Any]], now: Mapping[str, Any], allowed: Collection[str] = ()
) -> list[Change]:
    """The changes since the last run, if the study may be continued with them.

    Nothing is refused before the first trial.

    Args:
        events: the study's journal.
        now: header of the run that is about to start.
        allowed: keys that may change; a key covers everything below it.

    Raises:
        ChangedStudyError: changes that are neither harmless nor allowed.
    """
    before = study_header(events)
    if not before:
        return []
    differences = changes(before, now)
    # Before the first trial there is no number that a change could make incomparable.
    started = any(event["kind"] == "trial_started" for event in events)
    refused = [c for c in differences if not c.harmless and not any(_covers(key, c.key) for key in allowed)]
    if refused and started:
        raise ChangedStudyError(refused, now.get("study"))
    for change in differences:
        log.info("Changed since the last run: %s", change)
    return differences


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


def _of_added_or_removed_entry(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    parts = key.split(".")
    if parts[0] != "strategies" or len(parts) < 3:
        return False
    entry = ".".join(parts[:2])
    return (entry in _entries(old)) != (entry in _entries(new))


def _entries(flat: Mapping[str, Any]) -> set[str]:
    return {f"strategies.{label}" for label in flat.get("strategies") or ()}


def _harmless(key: str, was: Any, now: Any) -> bool:
    if key == "search.trials":
        return isinstance(was, int) and isinstance(now, int) and now >= was
    if key == LAYOUT:
        # A study from before the key had its device's layout, which `auto` keeps where trials have run.
        return was is _ABSENT and now == "auto"
    if key == "versions.python":
        return str(was).rpartition(".")[0] == str(now).rpartition(".")[0]
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def _covers(allowed: str, key: str) -> bool:
    return key == allowed or key.startswith(f"{allowed}.")


def _none(value: Any) -> Any:
    return None if value is _ABSENT else value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
