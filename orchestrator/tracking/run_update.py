"""Additions to one tracked run, and the study's header as tags. Pure; imports no mlflow."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import PurePath
from typing import Any, Protocol

from orchestrator.record.records import TrialRecord

TAG_LIMIT = 5000
"""Characters of a tag's value that every server accepts."""
PARAM_LIMIT = 500
"""Characters of a parameter's value that every server accepts; newer ones accept more."""
KEY_LIMIT = 250
"""Characters of a metric's or parameter's name."""
UID_DIGITS = 16
"""Hexadecimal digits (64 bits) of the hashes that identify a study, a run or a server."""
MODEL = "registered model"
"""What a registered model is counted as, among the artifacts of the study's run."""
LONG_FOLDER = "long"
"""Artifacts with the full text of truncated tags and parameters."""

Render = Callable[[], bytes | Mapping[str, bytes]]
"""Contents of one artifact, rendered when it is delivered; any exception: it cannot be rendered. Of an artifact that
brings others with it, a mapping from artifact path to contents."""
Files = Mapping[str, Render]
"""Artifact path → its contents."""
Point = tuple[str, float, int, int]
"""(metric, value, time in milliseconds, step)."""


class Summary(Protocol):
    """Contents of a run that are computed from a study's results."""

    @property
    def tags(self) -> Mapping[str, str]:
        """Tag → value."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metric → value; one that is not finite is left out."""
        ...

    @property
    def files(self) -> Files:
        """Artifacts of the run."""
        ...


class StudySummary(Summary, Protocol):
    """Contents of a study's own run, and artifacts that it adds to the runs of single trials."""

    @property
    def trial_files(self) -> Mapping[int, Files]:
        """Number of a trial → further artifacts of its run."""
        ...


class Summarizer(Protocol):
    """Computes what a record means. Injected, since tracking must not depend on results."""

    def curve_files(
        self,
        header: Mapping[str, Any],
        curves: Mapping[str, Mapping[str, Any]],
        record: TrialRecord | None = None,
    ) -> Files:
        """Artifacts of the curves of one event.

        Args:
            header: fields of the `study_started` event.
            record: the trial, None for a study's curves.
        """
        ...

    def trial(self, header: Mapping[str, Any], record: TrialRecord) -> Summary:
        """Final contents of a trial that will not be resumed."""
        ...

    def study(
        self, header: Mapping[str, Any], records: Sequence[TrialRecord], measurements: Mapping[str, Mapping[str, Any]]
    ) -> StudySummary:
        """Contents of the study's run when a run of the study ends.

        Args:
            header: as `orchestrator.record.records.study_header`.
            records: the trials, by number.
            measurements: as `orchestrator.record.records.measurements`.
        """
        ...


@dataclass(frozen=True)
class Uploads:
    """Which files of a study's folder are sent beside its record."""

    predictions: bool = True
    """Predictions of confirmed trials."""
    registered_model: str | None = None
    """Name of the registered model that the chosen model becomes a version of; None = no weights are sent."""


@dataclass(frozen=True)
class KeptFile:
    """A file of a study's folder that becomes an artifact; it may be large, or gone by now."""

    path: PurePath
    """Below the study's folder."""
    sha256: str
    """As recorded, in hex."""


@dataclass(frozen=True)
class ModelRequest:
    """The chosen model of a complete study, which is to be a version of a registered model."""

    name: str
    """Of the registered model."""
    end: str
    """Identifies the end of the study that chose it."""
    run_uids: Mapping[int, str]
    """Number of a trial → `uid` of its run."""
    weights: Mapping[int, str]
    """Number of a trial → SHA-256 of its kept weights."""


@dataclass
class RunUpdate:
    """Additions to one run, which is created first if it does not exist."""

    uid: str
    """Unique tag value that identifies the run."""
    name: str
    start: int
    """Milliseconds since the epoch, as all times here."""
    parent: str | None = None
    """`uid` of the parent run; None for the study's own run."""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    dataset: tuple[str, str, str] | None = None
    """(name, digest, source)."""
    files: dict[str, Render] = field(default_factory=dict)
    kept_files: dict[str, KeptFile] = field(default_factory=dict)
    """Artifact path → file of the study's folder."""
    model: ModelRequest | None = None
    status: str | None = None
    """MLflow's run status; None = unchanged."""
    end: int | None = None

    @property
    def artifacts(self) -> set[str]:
        """Paths of the run's artifacts, and `MODEL` where there is one to register."""
        return {*self.files, *self.kept_files} | ({MODEL} if self.model is not None else set())

    def merge(self, later: RunUpdate) -> None:
        """Add a later update of the same run."""
        self.tags |= later.tags
        self.params |= later.params
        self.points += later.points
        self.files |= later.files
        self.kept_files |= later.kept_files
        self.model = later.model or self.model
        self.dataset = later.dataset or self.dataset
        if later.status is not None:
            self.status = later.status
            self.end = later.end


@dataclass(frozen=True)
class Header:
    """Description of a study in its `study_started` event."""

    study: str
    fields: Mapping[str, Any]

    def spec(self, *path: str) -> Any:
        """One value of the study file, None where it is missing."""
        value: Any = self.fields.get("spec")
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def dataset_name(self) -> str:
        """`digits`, or the last folder of the data's root."""
        if self.fields.get("dataset"):
            return str(self.fields["dataset"])
        root = self.spec("data", "root")
        return PurePath(str(root)).name if root else str(self.spec("data", "source") or "")

    def dataset(self) -> tuple[str, str, str] | None:
        """(name, digest, source) for MLflow's data lineage; None without a digest."""
        digest = self.fields.get("dataset_digest")
        source = str(self.spec("data", "root") or self.spec("data", "source") or "unknown")
        return (self.dataset_name or "data", str(digest), source) if digest else None

    def tags(self) -> dict[str, str]:
        """Tags that the study's run and all its trials share."""
        tags = {
            "study": self.study,
            "backbone": str(self.spec("model", "name") or ""),
            "dataset": self.dataset_name,
            "dataset_digest": str(self.fields.get("dataset_digest") or ""),
            "dataset_left_out": str(self.fields.get("images_left_out") or ""),
            "dataset_leaks": str(self.fields.get("images_leaked") or ""),
            "n_classes": str(self.fields.get("classes") or ""),
            "n_classes_present": self._classes_present(),
        }
        return {key: value for key, value in tags.items() if value}

    def _classes_present(self) -> str:
        """`test 10, ood/printed 9`: number of classes behind the metrics of each split."""
        present = self.fields.get("classes_present") or {}
        return ", ".join(f"{split} {count}" for split, count in present.items() if split not in ("train", "val"))


def milliseconds(seconds: float) -> int:
    """Seconds since the epoch in MLflow's unit of time."""
    return int(seconds * 1000)


def within_limits(update: RunUpdate) -> RunUpdate:
    """Truncate tags and parameters that are too long for a server; the full text becomes an artifact."""
    for texts, limit in ((update.tags, TAG_LIMIT), (update.params, PARAM_LIMIT)):
        too_long = [key for key, text in texts.items() if len(text) > limit]
        for key in too_long:
            artifact = f"{LONG_FOLDER}/{clean_key(key).replace('/', '.')}.txt"
            update.files[artifact] = texts[key].encode
            notice = f"… (whole: {artifact})"
            # The limit includes the notice: a server rejects one character too many.
            texts[key] = texts[key][: limit - len(notice)] + notice
    return update


def clean_key(key: str) -> str:
    """Metric or parameter name that every server accepts: letters, digits, `_ - . space :` between slashes.

    At most 250 characters, no `..`. A part that has to be changed gets a four-digit hash of the original, so that two
    names never become one.
    """
    cleaned = "/".join(_clean_part(part) for part in key.split("/"))
    return cleaned if len(cleaned) <= KEY_LIMIT else f"{cleaned[: KEY_LIMIT - 5]}-{_name_hash(key)}"


def _clean_part(part: str) -> str:
    allowed = re.sub(r"[^\w\-. :]", "_", part, flags=re.ASCII)
    allowed = re.sub(r"\.{2,}", ".", allowed)
    return part if part and allowed == part else f"{allowed or '_'}-{_name_hash(part)}"


def _name_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:4]


def param_text(value: Any) -> str:
    """A parameter as text; floats as plain decimals (0.00003, not 3e-05), which every view reads as numbers."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    return value if isinstance(value, str) else json.dumps(value, default=str)
