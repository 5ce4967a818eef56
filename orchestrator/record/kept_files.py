"""Weights and predictions of a study's trials, seen from the driver: locations, retention, removal.

    <study>/weights/trial-0007/              see `trainables.storage.kept_weights`
    <study>/predictions/trial-0007.arrow     see `trainables.storage.kept_predictions`
    <study>/predictions/trial-0007.features.safetensors   see `orchestrator.report.features`
    <study>/weights/refit-<config>-<seed>/   see `orchestrator.running.refit`

A trial writes them before its last result is reported. Which of them are retained follows from the records alone, so
that a driver that was killed before it removed some removes them when it is started again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.record.kept_paths import predictions_file, similarities_file, weights_folder
from orchestrator.record.records import TrialRecord
from trainables.specs.metrics import VAL, TaskMetrics, best_or_last
from trainables.storage.checkpoint_format import TENSORS
from trainables.storage.file_identity import file_digest
from trainables.storage.kept_weights import WeightsError, discard_weights, load_weights

Keep = Literal["best", "confirmed", "all"]
"""Whose files are retained, see `StudySpec.keep`."""

_ROLES: Mapping[str, frozenset[str]] = {
    "best": frozenset({"search", "confirm"}),
    "confirmed": frozenset({"confirm"}),
    "all": frozenset({"search", "fold", "confirm", "reference"}),
}
"""Roles of the trials that write files."""


def refit_folder(study: Path, config_hash: str, seed: int) -> Path:
    """Folder of the weights of a configuration that was trained once more on training and validation images."""
    return study / "weights" / f"refit-{config_hash}-{seed}"


def refit_folders(study: Path) -> list[Path]:
    """Folders of all refits on the disk, by name."""
    return sorted(path for path in (study / "weights").glob("refit-*") if path.is_dir())


def discard_refit(folder: Path) -> None:
    """Remove the weights of a refit and its lock.

    Raises:
        OSError: the disk refused it.
    """
    discard_weights(folder)
    folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


def kept_bytes(study: Path, number: int) -> int:
    """Size of a trial's weights, predictions and compared features on the disk."""
    files = [*weights_folder(study, number).glob("*"), predictions_file(study, number)]
    files.append(similarities_file(study, number))
    return sum(file.stat().st_size for file in files if file.is_file())


def discard_kept(study: Path, number: int) -> None:
    """Remove a trial's weights, predictions and compared features, where there are any.

    Raises:
        OSError: the disk refused it.
    """
    discard_weights(weights_folder(study, number))
    similarities_file(study, number).unlink(missing_ok=True)
    predictions_file(study, number).unlink(missing_ok=True)


def remove_leftovers(study: Path) -> None:
    """Remove files without their final name, of processes that were killed while they wrote or removed them."""
    for leftover in (study / "weights").glob(".trial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in (study / "predictions").glob(".trial-*"):
        leftover.unlink(missing_ok=True)


def numbers_on_disk(study: Path) -> list[int]:
    """Numbers of the trials that have weights, predictions or compared features on the disk, ascending."""
    named = [*(study / "weights").glob("trial-*"), *(study / "predictions").glob("trial-*")]
    digits = {path.name.removeprefix("trial-").partition(".")[0] for path in named}
    return sorted(int(text) for text in digits if text.isdecimal())


def kept_problems(study: Path, record: TrialRecord) -> list[str]:
    """Problems of the files that a record lists as kept.

    They are missing, damaged, or others than those recorded.
    """
    problems = []
    if record.weights is not None:
        try:
            load_weights(weights_folder(study, record.number))
        except WeightsError as error:
            problems.append(f"Trial {record.number} {record.label}: {error}")
    files = (
        (record.weights, weights_folder(study, record.number) / TENSORS),
        (record.predictions, predictions_file(study, record.number)),
    )
    for recorded, path in files:
        if recorded is None or (problems and path.name == TENSORS):
            continue
        digest = file_digest(path) if path.is_file() else None
        if digest != recorded["sha256"]:
            state = "is missing" if digest is None else f"has the SHA-256 {digest[:12]}…"
            problems.append(
                f"Trial {record.number} {record.label} has kept a file of SHA-256 {recorded['sha256'][:12]}…, but "
                f"{path} {state}. Restore it from a copy, or let go of it: luthier prune."
            )
    return problems


@dataclass(frozen=True)
class Retention:
    """Which trials of a study retain their weights and predictions."""

    keep: Keep
    objective: str
    """Recorded name of the metric that the search compares trials by."""
    metrics: TaskMetrics
    runners_up: int = 0
    """Best search trials that are retained beside the best of each entry: those that leave-one-domain-out will choose
    from, which it can do after their folds only."""

    def paths(self, study: Path, record: TrialRecord) -> dict[str, str]:
        """Keys of a trial's config for what it keeps (`trainables.engine.tune_trainable`); empty = nothing."""
        if record.role not in _ROLES[self.keep]:
            return {}
        return {
            "_weights": str(weights_folder(study, record.number)),
            "_predictions": str(predictions_file(study, record.number)),
        }

    def superseded(self, records: Iterable[TrialRecord]) -> list[TrialRecord]:
        """Ended trials whose files are not retained, in the given order.

        Files of trials that a run resumes stay.
        """
        records = list(records)
        retained = self._retained(records)
        return [record for record in records if not record.resumable and record.number not in retained]

    def _retained(self, records: Iterable[TrialRecord]) -> set[int]:
        """Numbers of the complete trials that retain their files."""
        complete = [r for r in records if r.state == "complete" and r.role in _ROLES[self.keep]]
        if self.keep != "best":
            return {record.number for record in complete}
        ranked = sorted((r for r in complete if r.role == "search"), key=self._order, reverse=True)
        best: dict[str, int] = {}
        for record in ranked:
            best.setdefault(record.label, record.number)
        confirmed = {record.number for record in complete if record.role == "confirm"}
        return {*best.values(), *(record.number for record in ranked[: self.runners_up]), *confirmed}

    def _order(self, record: TrialRecord) -> tuple[float, float, int]:
        """Sort key: the larger is the better trial; of equals the earlier one."""
        value = best_or_last(record.metrics, self.objective)
        tie = record.metrics.get(self.metrics.tie_breaker.on(VAL))
        return (
            _score(value, self.metrics.selection.score),
            _score(tie, self.metrics.tie_breaker.score),
            -record.number,
        )


def _score(value: float | None, score: Callable[[float], float]) -> float:
    return score(value) if value is not None and math.isfinite(value) else -math.inf


def tidy_kept(study: Path, records: Iterable[TrialRecord], retention: Retention) -> list[TrialRecord]:
    """Remove what a killed driver or trial left behind: superseded and half-written files.

    Returns:
        The trials whose recorded files were removed.
    """
    on_disk = set(numbers_on_disk(study))
    removed = []
    for record in retention.superseded(records):
        if record.number in on_disk:
            discard_kept(study, record.number)
        if record.weights is not None or record.predictions is not None:
            removed.append(record)
    remove_leftovers(study)
    return removed
