"""`luthier prune`: remove a study's kept weights and predictions.

Its record and results stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.commands.status import find_study, read_journal
from orchestrator.record.journal import Journal
from orchestrator.record.kept_files import (
    discard_kept,
    discard_refit,
    kept_bytes,
    numbers_on_disk,
    refit_folders,
    remove_leftovers,
)
from orchestrator.record.records import TrialRecord, fold
from orchestrator.wording import bytes_text, counted

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class PrunedTrial:
    """Kept files of one trial."""

    number: int
    label: str
    """Empty = the journal has no trial of this number."""
    role: str
    bytes: int


@dataclass(frozen=True)
class PrunedRefit:
    """Weights of a configuration that was trained once more for an export."""

    name: str
    """Of the folder."""
    bytes: int


@dataclass(frozen=True)
class Pruned:
    """Outcome of a removal."""

    study: str
    folder: Path
    trials: tuple[PrunedTrial, ...]
    dry_run: bool
    """Nothing was removed."""
    refits: tuple[PrunedRefit, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of everything that was, or would be, removed."""
        return sum(trial.bytes for trial in self.trials) + sum(refit.bytes for refit in self.refits)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "study": self.study,
            "folder": str(self.folder),
            "dry_run": self.dry_run,
            "bytes": self.bytes,
            "trials": [{"number": t.number, "label": t.label, "role": t.role, "bytes": t.bytes} for t in self.trials],
            "refits": [{"name": refit.name, "bytes": refit.bytes} for refit in self.refits],
        }

    def render(self, console: Console) -> None:
        """Print a line per trial, and the sum."""
        lines = [f"  trial {t.number} {t.label} ({t.role}): {bytes_text(t.bytes)}" for t in self.trials]
        lines += [f"  {refit.name}: {bytes_text(refit.bytes)}" for refit in self.refits]
        action = "Would remove" if self.dry_run else "Removed"
        if self.trials or self.refits:
            groups = counted(len(self.trials), "trial")
            if self.refits:
                groups += f" and {counted(len(self.refits), 'refit')}"
            total = f"{groups}, {bytes_text(self.bytes)}"
            lines.append(f"{action} the weights and predictions of {total}, from {self.folder}")
        else:
            lines.append(f"No trial of {self.study} has kept weights or predictions in {self.folder}")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def prune(study: Path, dry_run: bool = False) -> Pruned:
    """Remove the kept weights and predictions of a study's ended trials.

    Args:
        study: the study file, or the folder of a study.
        dry_run: only say what would be removed.

    Raises:
        FileNotFoundError: the study has not been run.
        JournalError: the study is running, or its journal is damaged.
        OSError: a file could not be removed; those before it are gone, and the journal says so.
    """
    spec, folder = find_study(study)
    records = fold(read_journal(spec, folder))
    if dry_run:
        return Pruned(spec.name, folder, tuple(_kept(folder, records)), dry_run, _refits(folder))
    # The journal's lock: no driver runs whose trials write while these are removed.
    with Journal(folder / "journal.jsonl") as journal:
        records = fold(journal.events())
        trials = tuple(_kept(folder, records))
        by_number = {record.number: record for record in records}
        for trial in trials:
            record = by_number.get(trial.number)
            if record is not None:
                # Before the removal: a record never lists files that are gone.
                journal.append("weights_discarded", trial_id=record.trial_id, why="pruned")
            discard_kept(folder, trial.number)
        refits = _refits(folder)
        for path in refit_folders(folder):
            discard_refit(path)
        remove_leftovers(folder)
    return Pruned(spec.name, folder, trials, dry_run, refits)


def _refits(folder: Path) -> tuple[PrunedRefit, ...]:
    """Refits on the disk with their sizes."""
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in refit_folders(folder)}
    return tuple(PrunedRefit(path.name, size) for path, size in sizes.items())


def _kept(folder: Path, records: list[TrialRecord]) -> list[PrunedTrial]:
    """Kept files on the disk.

    Without those of trials that a run resumes: these report them with their result.
    """
    by_number = {record.number: record for record in records}
    trials = []
    for number in numbers_on_disk(folder):
        record = by_number.get(number)
        if record is None:
            trials.append(PrunedTrial(number, "", "unrecorded", kept_bytes(folder, number)))
        elif not record.resumable:
            trials.append(PrunedTrial(number, record.label, record.role, kept_bytes(folder, number)))
    return trials
