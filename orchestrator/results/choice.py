"""The choice of a study.

The confirmed configuration with the best mean validation, or a cheaper one that equals it. Whether another
configuration equals the best is decided by a paired bootstrap of the validation results over samples and seeds; of
equals, the one with the fewest trained parameters is chosen. Test data are never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.record.records import TrialRecord
from orchestrator.results.comparison import Competitor, competitor, paired_tables
from orchestrator.results.intervals import bootstrap_interval, paired
from orchestrator.results.predictions import SampleTables
from orchestrator.results.selection import Choice, rank, reported_value
from orchestrator.study_file.rules import VAL_DOMAIN
from orchestrator.wording import listed
from trainables.specs.metrics import CLASSIFICATION, TRAINABLE_PARAMETERS, TaskMetrics


@dataclass(frozen=True)
class Decision:
    """The chosen configuration and the reason, in words."""

    choice: Choice
    best: Choice
    """The configuration with the best mean validation."""
    equal: Sequence[Choice]
    """Others that a paired bootstrap on validation does not distinguish from `best`."""
    sentence: str


def decide(
    records: Sequence[TrialRecord],
    rule: str = "id_val",
    metrics: TaskMetrics = CLASSIFICATION,
    tables: SampleTables | None = None,
    label: str | None = None,
) -> Decision:
    """The choice by a rule, of all configurations or of those of one label.

    Raises:
        ValueError: see `orchestrator.results.selection.rank`; no complete trial of the label.
    """
    ranked = rank(records, rule, metrics)
    if label is not None:
        labels = ", ".join(dict.fromkeys(choice.record.label for choice in ranked))
        ranked = [choice for choice in ranked if choice.record.label == label]
        if not ranked:
            raise ValueError(f"A label with a complete trial is one of {labels}, but got {label!r}.")
    best = ranked[0]
    value = metrics.selection.text(best.value)
    head = f"Chosen by {rule}: {_named(best)}, {best.criterion} {value}"
    if not best.seeds:
        return Decision(
            best, best, (), f"{head} of its search trial: nothing was confirmed, and the best of many trials flatters."
        )
    head = f"{head} on average over {_seeds(best.seeds)}"
    # Per-sample results are those of validation, by which the other rules do not choose.
    if not (rule == "id_val" or rule.startswith(VAL_DOMAIN)):
        return Decision(best, best, (), f"{head}.")
    confirmed = [choice for choice in ranked if choice.seeds]
    if len(confirmed) < 2:
        return Decision(best, best, (), f"{head}; no other configuration was confirmed.")
    if tables is None:
        tables = SampleTables()
    leader = competitor(records, best, metrics, tables)
    others = {id(choice): competitor(records, choice, metrics, tables) for choice in confirmed[1:]}
    tested = {key: _equal(leader, other, best.criterion) for key, other in others.items()}
    if all(result is None for result in tested.values()):
        reason = "whether others equal it on validation is not known, because no per-sample results are kept"
        return Decision(best, best, (), f"{head}; {reason}.")
    equal = [choice for choice in confirmed[1:] if tested[id(choice)]]
    if not equal:
        return Decision(best, best, (), f"{head}; by a paired bootstrap on validation none equals it.")
    # At equal numbers `min` takes the first, `best`.
    chosen = min([best, *equal], key=lambda choice: _parameters(records, choice))
    if chosen is best:
        names = listed([_named(choice) for choice in equal])
        fewest = _parameters(records, best) < min(_parameters(records, choice) for choice in equal)
        trained = "trains the fewest parameters" if fewest else "none of these trains fewer parameters"
        reason = f"by a paired bootstrap on validation it equals {names}, and {trained}"
        return Decision(best, best, equal, f"{head}; {reason}.")
    reached = metrics.selection.text(chosen.value)
    trained = f"{_parameters(records, chosen):,.0f} against {_parameters(records, best):,.0f}"
    sentence = (
        f"Chosen by {rule}: {_named(chosen)}. {_named(best)} has the best {best.criterion}, {value} on average over "
        f"{_seeds(best.seeds)}; by a paired bootstrap on validation {_named(chosen)} ({reached}) equals it and trains "
        f"fewer parameters ({trained})."
    )
    return Decision(chosen, best, equal, sentence)


def _equal(leader: Competitor, other: Competitor, name: str) -> bool | None:
    """Whether the bootstrap interval of the paired difference contains 0; None without per-sample results."""
    tables = paired_tables(leader, other, name)
    if tables is None:
        return None
    first, second = tables
    low, high = bootstrap_interval(paired(first.values, second.values), first.strata, first.weights)
    return low <= 0 <= high


def _parameters(records: Sequence[TrialRecord], choice: Choice) -> float:
    """Trained parameters; infinitely many where the number was not recorded.

    An unrecorded number then does not decide.
    """
    value = reported_value(records, choice.record, TRAINABLE_PARAMETERS.name)
    return math.inf if value is None else value


def _named(choice: Choice) -> str:
    return f"{choice.record.label} (trial {choice.record.number})"


def _seeds(count: int) -> str:
    return f"{count} fresh seed{'' if count == 1 else 's'}"
