"""Reading of the earlier studies of `warm_start`, once: what a study took over is in its own journal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import PreflightError, Problem, did_you_mean
from orchestrator.planning.build import entries_of
from orchestrator.planning.objectives import metric_of
from orchestrator.record.journal import Journal, JournalError
from orchestrator.record.records import WARM_START, TrialRecord, fold, metrics_of, study_header
from orchestrator.search.paper_sweep import preset_of
from orchestrator.search.warm_start import WarmStart, learns_from_trials, take_over
from orchestrator.wording import listed

if TYPE_CHECKING:
    from orchestrator.record.journal import Event
    from orchestrator.search.stages import Entry
    from orchestrator.study_file.schema import StudySpec

KEY = "warm_start"


def warm_start_of(spec: StudySpec, events: Sequence[Event] = ()) -> WarmStart:
    """What a study takes over from the studies of its `warm_start`.

    As its journal has it; the other studies are read only for entries that the journal has nothing of, so that a
    continued study does not depend on them.

    Args:
        spec: of the study.
        events: its journal.

    Raises:
        PreflightError: see `warm_start_problems`.
    """
    if spec.warm_start is None:
        return WarmStart()
    recorded = _recorded(spec, events)
    missing = _missing(spec, recorded)
    if not missing:
        return recorded
    studies, problems = _read(spec, missing)
    if problems:
        raise PreflightError(problems, f"The study {spec.name!r}")
    metrics = metrics_of(spec)
    maximise = metrics.selection.direction == "max"
    taken = {entry.label: take_over(studies, entry, metric_of(spec), maximise) for entry in missing}
    return WarmStart(tuple(spec.warm_start), {**recorded.entries, **taken})


def warm_start_problems(spec: StudySpec) -> Iterator[Problem]:
    """Reasons why a study cannot take over what `warm_start` names.

    An unknown or unreadable study, one that selects by another metric or has another task, one of other strategies
    only; and no entry that is searched.
    """
    if spec.warm_start is None:
        return
    if not _searched(spec):
        rule = "warm_start needs an entry that the sampler searches, but every entry follows a preset or has one"
        yield Problem((KEY,), f"{rule} configuration. Leave the key out.")
        return
    try:
        events = own_events(spec)
    except JournalError:  # reported by the run itself
        return
    missing = _missing(spec, _recorded(spec, events))
    if missing:
        yield from _read(spec, missing)[1]


def own_events(spec: StudySpec) -> list[Event]:
    """The journal of the study itself; empty before its first run."""
    journal = Path(spec.storage).absolute() / spec.name / "journal.jsonl"
    return Journal.read(journal) if journal.exists() else []


def learns(spec: StudySpec) -> bool:
    """Whether the samplers of a study see earlier trials."""
    return learns_from_trials(spec.search.sampler, spec.search.allocation, spec.search.costs)


def _recorded(spec: StudySpec, events: Sequence[Event]) -> WarmStart:
    """The newest warm start of the journal; empty where it is from other studies."""
    for event in reversed(events):
        if event["kind"] == WARM_START and event["studies"] == spec.warm_start:
            return WarmStart.from_fields(event)
    return WarmStart()


def _searched(spec: StudySpec) -> list[Entry]:
    return [entry for entry in entries_of(spec) if preset_of(entry, spec.search.sampler) is None]


def _missing(spec: StudySpec, recorded: WarmStart) -> list[Entry]:
    return [entry for entry in _searched(spec) if entry.label not in recorded.entries]


def _read(spec: StudySpec, entries: Sequence[Entry]) -> tuple[dict[str, list[TrialRecord]], list[Problem]]:
    """Name → trials of the earlier studies, and what is wrong with them."""
    studies: dict[str, list[TrialRecord]] = {}
    problems = []
    for index, name in enumerate(spec.warm_start or ()):
        try:
            studies[name] = _trials(spec, name, {entry.strategy for entry in entries})
        except (_UnusableStudyError, JournalError) as error:
            problems.append(Problem((KEY, index), str(error)))
    return studies, problems


class _UnusableStudyError(ValueError):
    """A study that another cannot start from."""


def _trials(spec: StudySpec, name: str, strategies: set[str]) -> list[TrialRecord]:
    storage = Path(spec.storage).absolute()
    journal = storage / name / "journal.jsonl"
    if not journal.exists():
        others = sorted(path.parent.name for path in storage.glob("*/journal.jsonl") if path.parent.name != spec.name)
        listing = f"There are {listed(others)}." if others else "There is none."
        raise _UnusableStudyError(
            f"warm_start names studies in the same storage that have been run, but {name!r} has no journal at "
            f"{journal}.{did_you_mean(name, others)} {listing}"
        )
    events = Journal.read(journal)
    header = study_header(events).get("spec") or {}
    _check_metric(spec, name, header)
    records = fold(events)
    trained = {record.strategy for record in records if record.role == "search"}
    if not trained & strategies:
        raise _UnusableStudyError(
            f"a strategy learns from trials of the same strategy, but {name!r} has search trials of "
            f"{listed(sorted(trained)) or 'none'}, and this study searches {listed(sorted(strategies))}. Leave it out."
        )
    return records


def _check_metric(spec: StudySpec, name: str, header: Mapping[str, Any]) -> None:
    here = metrics_of(spec)
    try:
        there = metrics_of(header)
    except ValueError as error:
        raise _UnusableStudyError(f"{name!r} cannot be read: {error} Leave it out.") from error
    if (there.task, there.selection.key) != (here.task, here.selection.key):
        raise _UnusableStudyError(
            f"trials can be ranked for this study where they were selected by the same metric, but {name!r} selects "
            f"by {there.selection.key} of {there.task}, and this study by {here.selection.key} of {here.task}. "
            "Leave it out, or change search.metric."
        )
