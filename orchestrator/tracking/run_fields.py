"""The parts of a tracked run: the update record, and what a study's header and summary look like as tags, notes and
artifacts. Pure; nothing here imports mlflow."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import PurePath
from typing import Any

from orchestrator.record.records import TrialRecord
from orchestrator.results.curves import Drawn

TAG_LIMIT, PARAM_LIMIT, KEY_LIMIT = 5000, 500, 250
"""Characters that every server takes; newer ones take more."""
LONG_FOLDER = "long"
"""Artifacts with the whole text of what was too long."""

logger = logging.getLogger("luthier")


@dataclass
class RunUpdate:
    """What to add to one run; the run is made first if it does not exist yet."""

    uid: str
    """Unique tag value that the run is found again by."""
    name: str
    start: int
    """Milliseconds since the epoch, as all times here."""
    parent: str | None = None
    """`uid` of the parent run; None for the study's own run."""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    points: list[tuple[str, float, int, int]] = field(default_factory=list)
    """(metric, value, time, step)."""
    dataset: tuple[str, str, str] | None = None
    """(name, digest, source)."""
    texts: dict[str, str] = field(default_factory=dict)
    """Artifacts, by file name."""
    drawn: dict[str, Drawn] = field(default_factory=dict)
    """Artifacts that are made when they are delivered, by file name."""
    status: str | None = None
    end: int | None = None

    def absorb(self, later: RunUpdate) -> None:
        """Add a later update of the same run."""
        self.tags |= later.tags
        self.params |= later.params
        self.points += later.points
        self.texts |= later.texts
        self.drawn |= later.drawn
        self.dataset = later.dataset or self.dataset
        if later.status is not None:
            self.status, self.end = later.status, later.end


@dataclass(frozen=True)
class Header:
    """The study as its `study_started` event describes it."""

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
        root = self.spec("data", "root")
        return str(
            self.fields.get("dataset") or (PurePath(str(root)).name if root else self.spec("data", "source") or "")
        )

    def dataset(self) -> tuple[str, str, str] | None:
        """(name, digest, source) for MLflow's data lineage; None without a digest."""
        digest = self.fields.get("dataset_digest")
        source = str(self.spec("data", "root") or self.spec("data", "source") or "unknown")
        return (self.dataset_name or "data", str(digest), source) if digest else None

    def tags(self) -> dict[str, str]:
        """Tags that the study's run and all its trials share."""
        found = {
            "study": self.study,
            "backbone": str(self.spec("model", "name") or ""),
            "dataset": self.dataset_name,
            "dataset_digest": str(self.fields.get("dataset_digest") or ""),
            "dataset_left_out": str(self.fields.get("images_left_out") or ""),
            "dataset_leaks": str(self.fields.get("images_leaked") or ""),
            "n_classes": str(self.fields.get("classes") or ""),
            "n_classes_present": self._classes_present(),
        }
        return {key: value for key, value in found.items() if value}

    def _classes_present(self) -> str:
        """`test 10, ood/printed 9`: over how many classes the numbers of each split are; fewer than `n_classes` where
        a domain has no image of a class."""
        present = self.fields.get("classes_present") or {}
        return ", ".join(f"{split} {count}" for split, count in present.items() if split not in ("train", "val"))


def summary(
    records: Sequence[TrialRecord], header: Header, measurements: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[dict[str, str], dict[str, str], dict[str, float]]:
    """Tags, artifacts and metrics of a finished study's own run: the leaderboard and the findings as the run's note, as
    Markdown and as CSV, the chosen configuration's numbers. A study without a complete trial has a note that
    says so."""
    from orchestrator.results.study_results import Results

    results = Results(records, {**(header.spec() or {}), "name": header.study}, measurements=measurements)
    metrics = {
        f"trials/{state}": float(sum(r.state == state for r in records)) for state in ("complete", "pruned", "failed")
    }
    tags, texts = {}, {}
    try:
        note = results.markdown()
        table = results.leaderboard()
        best = results.best(results.rule)
        texts = {"leaderboard.md": note, "leaderboard.csv": table.to_csv(index=False)}
        tags = {"best.label": best.record.label, "best.config_hash": best.record.config_hash, "best.rule": best.rule}
        row = table.to_dict("records")[0]
        for name in ("val/acc", "test/acc", "ood/mean/acc", "ood/worst/acc", "calib/ece", "gain", "gain/ood"):
            if row.get(name, math.nan) == row.get(name):  # there, and not NaN
                metrics[name] = float(row[name])
        metrics["selection/regret"] = results.regret().value
    except ValueError as error:
        note = (
            "\n".join([f"# {header.study}", "", str(error), "", *(f"- {s}" for s in results.findings())]).rstrip()
            + "\n"
        )
    except Exception as error:  # a summary that cannot be made must not hold back the record
        logger.exception("The summary of the study could not be made")
        note = f"# {header.study}\n\nThe summary could not be made: {type(error).__name__}: {error}\n"
    return {**tags, "mlflow.note.content": note}, texts, metrics


def digest(parts: Any) -> str:
    """Sixteen hex digits that name a list of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def milliseconds(seconds: float) -> int:
    """Seconds since the epoch as MLflow counts time."""
    return int(seconds * 1000)


def within_limits(update: RunUpdate) -> RunUpdate:
    """The update, its tags and parameters cut where they are too long for a server. What was cut says so at its end,
    and is an artifact as a whole."""
    for texts, limit in ((update.tags, TAG_LIMIT), (update.params, PARAM_LIMIT)):
        for key in [key for key, text in texts.items() if len(text) > limit]:
            place = f"{LONG_FOLDER}/{clean_key(key).replace('/', '.')}.txt"
            update.texts[place], sign = texts[key], f"… (whole: {place})"
            texts[key] = texts[key][: limit - len(sign)] + sign
    return update


def clean_key(key: str) -> str:
    """A metric or parameter name that every server takes: letters, digits, `_ - . space :` between slashes, at most
    250, no `..`. What has to be changed gets four hex digits of its own, so that two names never become one."""
    parts = [
        (part, re.sub(r"\.{2,}", ".", re.sub(r"[^\w\-. :]", "_", part, flags=re.ASCII))) for part in key.split("/")
    ]
    kept = "/".join(fit if fit and fit == part else f"{fit or '_'}-{_mark(part)}" for part, fit in parts)
    return kept if len(kept) <= KEY_LIMIT else f"{kept[: KEY_LIMIT - 5]}-{_mark(key)}"


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:4]


def param_text(value: Any) -> str:
    """A parameter as text; numbers as plain decimals (0.00003, not 3e-05), so that every view reads them as numbers."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    return value if isinstance(value, str) else json.dumps(value, default=str)
