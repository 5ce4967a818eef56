"""Warm start: what a search takes over from the trials of earlier studies.

Values of two studies cannot be compared, since data or network may differ: a trial counts by its rank among the trials
of its own study that fit the entry. Two things are taken over for every searched entry:

- *First points*: the best configurations of each earlier study, proposed after the default points.
- *Earlier trials* for the entry's sampler, with normal scores (van der Waerden) in place of values, as Salinas et al.
  (2020), "A Quantile-based Approach for Hyperparameter Transfer Learning", ICML, transform both sides. A sampler sees
  at most `EARLIER` of them, one less for every trial that the entry has here, so that what this study measures soon
  outweighs them and a misleading study costs little.

One sampler over all entries gets no earlier trials: the scores of two entries are no comparison between them.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FixedTrial

import search_spaces
from orchestrator.record.costs import objective_value
from orchestrator.record.records import WARM_START, TrialRecord
from orchestrator.search.sampling import LEARNING
from orchestrator.search.stages import Entry
from orchestrator.wording import counted

POINTS = 2
"""First points of an entry, at most."""
EARLIER = 12
"""Trials that an entry's sampler sees as long as earlier ones are among them."""
LEAST = 3
"""Trials of a study that fit an entry, below which their ranks say nothing to its sampler."""


@dataclass(frozen=True)
class EarlierTrial:
    """A complete trial of an earlier study."""

    study: str
    number: int
    """In that study."""
    hparams: Mapping[str, Any]
    """All of them, fixed ones included."""
    value: float
    """Objective, as recorded there."""
    score: float
    """Normal score among the trials of that study that fit the entry; ordered as the values are."""


@dataclass(frozen=True)
class EntryWarmStart:
    """What one entry takes over."""

    points: tuple[EarlierTrial, ...] = ()
    """First points, in the order in which they are proposed."""
    trials: tuple[EarlierTrial, ...] = ()
    """For the entry's sampler: at most `EARLIER`, spread evenly over the ranks of each study."""
    fitting: int = 0
    """Complete trials of the strategy, of all earlier studies, that the entry could propose."""
    examined: int = 0
    """Complete trials of the strategy."""

    def sentence(self, learns: bool) -> str:
        """What is taken over, in words.

        Args:
            learns: see `learns_from_trials`.
        """
        if not self.examined:
            return "nothing, no trial of this strategy is complete there"
        if not self.fitting:
            return (
                f"nothing, none of {counted(self.examined, 'trial')} is a configuration that this entry could propose "
                "(its fixed values, its ranges)"
            )
        points = counted(len(self.points), "first point")
        if not learns:
            return f"{points} of {counted(self.fitting, 'earlier trial')}"
        return f"{points}, and {len(self.trials)} of {counted(self.fitting, 'earlier trial')} for its sampler"


@dataclass(frozen=True)
class WarmStart:
    """What a study takes over; journalled when it starts."""

    studies: tuple[str, ...] = ()
    entries: Mapping[str, EntryWarmStart] = field(default_factory=dict)
    """Label of a searched entry → what it takes over."""

    def fields(self) -> dict[str, Any]:
        """Fields of the event `warm_start`."""
        return {"studies": list(self.studies), "entries": {k: asdict(entry) for k, entry in self.entries.items()}}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> WarmStart:
        """From the event `warm_start`."""
        entries = {}
        for label, entry in fields["entries"].items():
            taken = {key: tuple(EarlierTrial(**trial) for trial in entry[key]) for key in ("points", "trials")}
            entries[label] = EntryWarmStart(**{**entry, **taken})
        return cls(tuple(fields["studies"]), entries)

    def is_last_of(self, events: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a journal's newest event `warm_start` says the same."""
        recorded = [event for event in events if event["kind"] == WARM_START]
        return bool(recorded) and WarmStart.from_fields(recorded[-1]) == self

    def sentences(self, learns: bool) -> list[str]:
        """One line, and one per entry; empty without a warm start."""
        if not self.studies:
            return []
        lines = [f"  {label}: {entry.sentence(learns)}." for label, entry in self.entries.items()]
        return [f"Warm start from {', '.join(self.studies)}:", *lines]

    def first_points(self, entries: Mapping[str, Entry]) -> list[tuple[Entry, dict[str, Any]]]:
        """(entry, sampled hyperparameters) of all first points: the best of every entry, then the next ones.

        Args:
            entries: label → searched entry; a point that its entry could not propose any more is left out.
        """
        ranked = []
        for position in range(POINTS):
            for label, entry in entries.items():
                points = self.entries.get(label, EntryWarmStart()).points
                if position < len(points):
                    choice = sampled(entry, points[position].hparams)
                    if choice is not None:
                        ranked.append((entry, choice.values))
        return ranked

    def trials_of(self, label: str) -> Sequence[EarlierTrial]:
        """Earlier trials for the sampler of an entry."""
        return self.entries.get(label, EntryWarmStart()).trials


def learns_from_trials(sampler: str, allocation: str, costs: Sequence[str]) -> bool:
    """Whether the entries' samplers learn from earlier trials, beside the first points.

    Costs are those of a network and its data, so that a search for several objectives takes over points alone.

    Args:
        sampler: one of `orchestrator.search.sampling.SAMPLERS`.
        allocation: one of `orchestrator.search.allocation.ALLOCATIONS`.
        costs: objectives beside the selecting metric.
    """
    return sampler in LEARNING and allocation != "sampler" and not costs


def warm_start_sentences(header: Mapping[str, Any]) -> list[str]:
    """What a study took over, in lines; empty without a warm start.

    Args:
        header: `orchestrator.record.records.study_header` of the study.
    """
    spec = header.get("spec") or {}
    recorded = header.get(WARM_START)
    if recorded is None or spec.get("warm_start") is None:
        return []
    search = spec["search"]
    costs = (search["objectives"] or ())[1:]
    return WarmStart.from_fields(recorded).sentences(learns_from_trials(search["sampler"], search["allocation"], costs))


def take_over(
    studies: Mapping[str, Sequence[TrialRecord]], entry: Entry, objective: str, maximise: bool
) -> EntryWarmStart:
    """What an entry takes over from earlier studies.

    Search trials of the entry's strategy count, under any label, that used their whole budget, have a finite objective
    and are a configuration that the entry could propose: fixed values equal, sampled ones within their ranges.

    Args:
        studies: name → all trials of the study, in the order of the study file.
        entry: of the present study, which the sampler searches.
        objective: recorded name of what is compared.
        maximise: whether a higher value is better.
    """
    examined = 0
    groups: list[list[EarlierTrial]] = []
    for name, records in studies.items():
        complete = [(r, _value(r, objective)) for r in records if _counts(r, entry)]
        examined += len(complete)
        groups.append(_ranked(name, complete, entry, maximise))
    return EntryWarmStart(
        points=tuple(_best(groups, entry)),
        trials=tuple(_spread_over([group for group in groups if len(group) >= LEAST])),
        fitting=sum(len(group) for group in groups),
        examined=examined,
    )


@dataclass(frozen=True)
class Sampled:
    """The part of a configuration that a sampler chooses, by bare names."""

    values: dict[str, Any]
    """As the sampler would return them."""
    distributions: dict[str, BaseDistribution]


def sampled(entry: Entry, hparams: Mapping[str, Any]) -> Sampled | None:
    """What the sampler would choose for an entry to have a configuration; None = the entry could not propose it."""
    space = search_spaces.space(entry.strategy, entry.task)
    trial = FixedTrial({key: value for key, value in hparams.items() if key in space and key not in entry.fixed})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Optuna only warns about a value outside its range
            proposed = search_spaces.suggest(trial, entry.strategy, fixed=entry.fixed, task=entry.task)
    except (ValueError, KeyError, UserWarning):
        return None
    if proposed != dict(hparams):
        return None
    spaces = trial.distributions
    # An integer where floats are sampled, as from a value that was fixed there, becomes a float.
    values = {key: space.to_external_repr(space.to_internal_repr(hparams[key])) for key, space in spaces.items()}
    return Sampled(values, spaces)


def normal_scores(values: Sequence[float]) -> list[float]:
    """Φ⁻¹((rank − ½) / n) of every value; equal values share the mean of their ranks.

    Example:
        >>> [round(score, 2) for score in normal_scores([0.5, 0.9, 0.7])]
        [-0.97, 0.97, 0.0]
    """
    scores = []
    for value in values:
        below = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        scores.append(NormalDist().inv_cdf((below + equal / 2) / len(values)))
    return scores


def spread(trials: Sequence[EarlierTrial], count: int) -> list[EarlierTrial]:
    """`count` trials at even distances, the first and the last among them; all where there are no more."""
    if count >= len(trials):
        return list(trials)
    if count <= 1:
        return list(trials[:count])
    step = (len(trials) - 1) / (count - 1)
    return [trials[round(index * step)] for index in range(count)]


def _counts(record: TrialRecord, entry: Entry) -> bool:
    return record.role == "search" and record.strategy == entry.strategy and record.state == "complete"


def _value(record: TrialRecord, objective: str) -> float:
    value = objective_value(record.metrics, objective)
    return math.nan if value is None else value


def _ranked(
    study: str, complete: Sequence[tuple[TrialRecord, float]], entry: Entry, maximise: bool
) -> list[EarlierTrial]:
    """The trials of one study that fit, best first; of equal configurations the best one."""
    sign = 1.0 if maximise else -1.0
    by_configuration: dict[str | None, tuple[TrialRecord, float]] = {}
    finite = [(record, value) for record, value in complete if math.isfinite(value)]
    for record, value in sorted(finite, key=lambda item: (-sign * item[1], item[0].number)):
        by_configuration.setdefault(_key(entry, record.hparams), (record, value))
    by_configuration.pop(None, None)
    fitting = list(by_configuration.values())
    scores = normal_scores([value for _, value in fitting])
    return [
        EarlierTrial(study, record.number, dict(record.hparams), value, score)
        for (record, value), score in zip(fitting, scores, strict=True)
    ]


def _best(groups: Sequence[Sequence[EarlierTrial]], entry: Entry) -> list[EarlierTrial]:
    """The first `POINTS` distinct configurations: the best of every study, then their second ones, and so on.

    The default point is left out, which is tried anyway.
    """
    points: dict[str | None, EarlierTrial] = {}
    for position in range(max(map(len, groups), default=0)):
        for group in groups:
            if position < len(group):
                points.setdefault(_key(entry, group[position].hparams), group[position])
    points.pop(_key(entry, search_spaces.default_point(entry.strategy, entry.fixed, entry.task)), None)
    return list(points.values())[:POINTS]


def _spread_over(groups: Sequence[Sequence[EarlierTrial]]) -> list[EarlierTrial]:
    """`EARLIER` trials at most, the same number of every study, best scores first.

    An order across studies is needed, since later proposals see a part of them (`spread`).
    """
    trials = []
    for position, group in enumerate(groups):
        share = EARLIER // len(groups) + (position < EARLIER % len(groups))
        trials += spread(group, share)
    return sorted(trials, key=lambda trial: -trial.score)


def _key(entry: Entry, hparams: Mapping[str, Any]) -> str | None:
    """The same for equal configurations of an entry; None = the entry could not propose it."""
    choice = sampled(entry, hparams)
    return None if choice is None else json.dumps(choice.values, sort_keys=True)
