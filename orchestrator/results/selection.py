"""Selection rules: which configuration to choose, as pure functions on the records of a study.

The criteria are those of Gulrajani and Lopez-Paz (2021), "In Search of Lost Domain Generalization", section 3. A rule
ranks configurations by the selection metric of the study's task, best first. Only trials of the search that used their
whole budget (`complete`) are candidates: a pruned trial was stopped because it was behind, its validation score belongs
to a smaller budget, and its test numbers may be missing; counting it would compare unequal budgets.

A confirmed configuration is ranked by the mean over its fresh seeds, and before every one that was not confirmed: the
search trial's own value is the maximum of many, so that it flatters (the winner's curse), and only decides which
configurations are confirmed. Trials with role `fold` or `confirm` are never candidates themselves.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from orchestrator.record.records import TrialRecord
from orchestrator.study_file.rules import VAL_DOMAIN
from trainables.specs.metrics import CLASSIFICATION, VAL, Metric, TaskMetrics
from trainables.specs.suggestions import did_you_mean


@dataclass(frozen=True)
class Choice:
    """One configuration, ranked by a rule."""

    rule: str
    record: TrialRecord
    """The search trial of the configuration."""
    value: float
    """The rule's criterion: the mean over the confirmed seeds, or the search trial's own value."""
    criterion: str
    """Recorded name of the metric behind `value`."""
    seeds: int = 0
    """Confirmed seeds of the configuration; 0 = it was not confirmed."""

    @property
    def oracle(self) -> bool:
        """Whether the rule looks at test data: an upper bound, not a result."""
        return self.rule == "oracle"


@dataclass(frozen=True)
class Regret:
    """Loss of a rule's choice against a choice that looks at test data."""

    criterion: str
    """Recorded name of the metric that is compared."""
    chosen: Choice
    oracle: Choice
    value: float
    """Score of the oracle's configuration less that of the chosen one: 0 or more, in the metric's unit."""
    metric: Metric
    """Table entry of `criterion`."""
    confirmed: bool = False
    """Whether both are means over fresh seeds; False = nothing was confirmed, and search trials are compared."""


Rule = Callable[[Iterable[TrialRecord], TaskMetrics], list[Choice]]


def id_val(records: Iterable[TrialRecord], metrics: TaskMetrics = CLASSIFICATION) -> list[Choice]:
    """Rank by the score on ID validation.

    Ties: the task's tie-breaker on ID validation, then the earlier trial.

    Example:
        >>> from orchestrator.record.records import TrialRecord
        >>> trials = [
        ...     TrialRecord(trial_id=name, number=number, strategy=name, label=name, state="complete",
        ...                 config_hash=name, metrics={"best/val/acc": accuracy})
        ...     for number, (name, accuracy) in enumerate([("full", 0.91), ("lora", 0.93)])
        ... ]
        >>> [choice.record.label for choice in id_val(trials)]
        ['lora', 'full']
    """
    return _by_metric("id_val", metrics.best_validation, list(records), metrics)


def leave_one_domain_out(records: Iterable[TrialRecord], metrics: TaskMetrics = CLASSIFICATION) -> list[Choice]:
    """Rank by the mean score on the held-out ID domain over a configuration's folds.

    Every held-out domain of the study counts once, and only configurations with a complete fold for each of them are
    ranked.

    Raises:
        ValueError: fewer than two domains were held out, or no configuration has all its folds.
    """
    records = list(records)
    folds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        value = record.metric(metrics.held_out)
        if record.role == "fold" and record.state == "complete" and record.held_out and value is not None:
            folds[record.config_hash][record.held_out].append(value)
    domains = {domain for by_domain in folds.values() for domain in by_domain}
    if len(domains) < 2:
        names = f" ({', '.join(sorted(domains))})" if domains else ""
        raise ValueError(
            f"leave_one_domain_out needs complete folds for at least 2 ID domains, but got {len(domains)}{names}. "
            "List two or more domains under data.id and set search.objective to leave_one_domain_out, or select by "
            "id_val."
        )
    choices = [
        Choice(
            rule="leave_one_domain_out",
            record=record,
            # A mean of means: every domain counts once, however many folds it has.
            value=_mean(_mean(values) for values in folds[record.config_hash].values()),
            criterion=metrics.held_out,
            seeds=len(confirmations(records, record.config_hash)),
        )
        for record in candidates(records)
        if set(folds.get(record.config_hash, ())) == domains
    ]
    if not choices:
        raise ValueError(
            "leave_one_domain_out needs a configuration with a complete fold for each of "
            f"{', '.join(sorted(domains))}, but none has them all. Run the study again to continue it, or select by "
            "id_val."
        )
    return _ordered(choices, records, metrics)


def oracle(records: Iterable[TrialRecord], metrics: TaskMetrics = CLASSIFICATION) -> list[Choice]:
    """Rank by the mean score over the OOD test domains.

    By that on the ID test where a study has none. It looks at test data, so it is only an upper bound to measure regret
    with.
    """
    records = list(records)
    has_ood = any(record.metric(metrics.ood_mean) is not None for record in candidates(records))
    return _by_metric("oracle", metrics.ood_mean if has_ood else metrics.test, records, metrics)


def val_domain(records: Iterable[TrialRecord], domain: str, metrics: TaskMetrics = CLASSIFICATION) -> list[Choice]:
    """Rank by the score on one OOD domain.

    The study gave this domain up as a test domain (`val_domain:<name>`).
    """
    return _by_metric(f"{VAL_DOMAIN}{domain}", metrics.of_domain(domain), list(records), metrics)


RULES: dict[str, Rule] = {"id_val": id_val, "leave_one_domain_out": leave_one_domain_out, "oracle": oracle}


def rank(records: Iterable[TrialRecord], rule: str = "id_val", metrics: TaskMetrics = CLASSIFICATION) -> list[Choice]:
    """Distinct configurations, best first, by the rule of that name.

    Raises:
        ValueError: unknown rule, no complete trial, or what the rule itself needs is missing.
    """
    if rule.startswith(VAL_DOMAIN):
        return val_domain(records, rule.removeprefix(VAL_DOMAIN), metrics)
    if rule not in RULES:
        names = ", ".join([*RULES, f"{VAL_DOMAIN}<name>"])
        raise ValueError(f"A selection rule is one of {names}, but got {rule!r}.{did_you_mean(rule, RULES)}")
    return RULES[rule](records, metrics)


def without_validation_domain(
    records: Iterable[TrialRecord], rule: str, metrics: TaskMetrics = CLASSIFICATION
) -> list[TrialRecord]:
    """The records with OOD mean and worst over test domains only.

    A domain that `rule` uses for validation is left out of both. Other rules change nothing.
    """
    if not rule.startswith(VAL_DOMAIN):
        return list(records)
    return [_without_domain(record, rule.removeprefix(VAL_DOMAIN), metrics) for record in records]


def select(
    records: Iterable[TrialRecord],
    rule: str = "id_val",
    label: str | None = None,
    metrics: TaskMetrics = CLASSIFICATION,
) -> Choice:
    """The best configuration by a rule, of all or of one label (errors: see `rank`)."""
    ranked = rank(records, rule, metrics)
    if label is None:
        return ranked[0]
    for choice in ranked:
        if choice.record.label == label:
            return choice
    labels = ", ".join(dict.fromkeys(choice.record.label for choice in ranked))
    raise ValueError(f"A label with a complete trial is one of {labels}, but got {label!r}.")


def per_label(
    records: Iterable[TrialRecord], rule: str = "id_val", metrics: TaskMetrics = CLASSIFICATION
) -> dict[str, Choice]:
    """The chosen configuration of every label that has one, best label first (errors: see `rank`)."""
    return _best_of_each_label(rank(records, rule, metrics))


def regret(
    records: Iterable[TrialRecord],
    rule: str = "id_val",
    metrics: TaskMetrics = CLASSIFICATION,
    chosen: Choice | None = None,
) -> Regret:
    """Loss of the study's choice against the oracle's.

    Both as means over the seeds of their confirmation. Where nothing was confirmed, both are measured on their search
    trials.

    Args:
        chosen: the study's choice, where it is not the first of the rule's ranking.

    Raises:
        ValueError: see `rank`.
    """
    records = without_validation_domain(records, rule, metrics)
    chosen = chosen or select(records, rule, metrics=metrics)
    best = select(records, "oracle", metrics=metrics)
    metric = metrics.selection
    reached = reported_value(records, chosen.record, best.criterion)
    lost = math.nan if reached is None else metric.score(best.value) - metric.score(reached)
    return Regret(best.criterion, chosen, best, lost, metric, confirmed=bool(best.seeds))


def top_candidates(
    records: Iterable[TrialRecord], k: int, rule: str = "id_val", metrics: TaskMetrics = CLASSIFICATION
) -> list[TrialRecord]:
    """Up to `k` distinct configurations for confirmation.

    The best of every label first, then the rest, each ranked. They are ranked by their search trials alone, whether or
    not some were confirmed before.

    Raises:
        ValueError: negative `k`; or see `rank`.
    """
    if k < 0:
        raise ValueError(f"The number of candidates must be 0 or more, but got {k}.")
    ranked = rank([record for record in records if record.role != "confirm"], rule, metrics)
    first = {id(choice) for choice in _best_of_each_label(ranked).values()}
    # Every label gets a confirmation before any gets a second one: a table of one strategy compares nothing.
    ordered = sorted(ranked, key=lambda choice: id(choice) not in first)  # stable: keeps the ranks
    return [choice.record for choice in ordered[:k]]


def candidates(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Complete search trials, one per configuration (the earliest), in order of their numbers.

    Raises:
        ValueError: there is none.
    """
    search = sorted((r for r in records if r.role == "search"), key=lambda r: r.number)
    # Reversed, so that the earliest trial of a configuration is the one that stays in the dict.
    distinct = {r.config_hash or r.trial_id: r for r in reversed(search) if r.state == "complete"}
    if not distinct:
        states = Counter(r.state for r in search)
        got = ", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "none at all"
        raise ValueError(
            f"Selection needs at least one complete search trial, but got {got}. "
            "Run the study again to continue it; `luthier status` says why trials failed."
        )
    return sorted(distinct.values(), key=lambda r: r.number)


def confirmations(records: Iterable[TrialRecord], config_hash: str) -> list[TrialRecord]:
    """The complete confirmations of a configuration, one per seed.

    The earliest of a seed, in order of their numbers.
    """
    of_configuration = [r for r in records if r.config_hash == config_hash and r.role == "confirm"]
    complete = sorted((r for r in of_configuration if r.state == "complete"), key=lambda r: r.number)
    # Reversed, so that the earliest trial of a seed is the one that stays in the dict.
    by_seed = {r.seed: r for r in reversed(complete)}
    return sorted(by_seed.values(), key=lambda r: r.number)


def reported_trials(records: Iterable[TrialRecord], config_hash: str) -> list[TrialRecord]:
    """The trials that report a configuration: its complete confirmations, one per seed.

    The search trial is not among them, because it was chosen for being good; it stands in only where there is no
    confirmation.
    """
    records = list(records)
    confirmed = confirmations(records, config_hash)
    if confirmed:
        return confirmed
    search = [r for r in records if r.config_hash == config_hash and r.state == "complete" and r.role == "search"]
    return sorted(search, key=lambda r: r.number)[:1]


def reported_value(records: Iterable[TrialRecord], record: TrialRecord, name: str) -> float | None:
    """Mean of a metric over the trials that report a configuration.

    The search trial's own value stands in where no confirmation has the metric; None where that has none either.

    Args:
        record: the search trial of the configuration.
    """
    values = [run.metric(name) for run in confirmations(records, record.config_hash)]
    present = [value for value in values if value is not None]
    return _mean(present) if present else record.metric(name)


def _by_metric(rule: str, name: str, records: Sequence[TrialRecord], metrics: TaskMetrics) -> list[Choice]:
    """Rank by a recorded metric.

    Raises:
        ValueError: no complete trial has it.
    """
    complete = candidates(records)
    choices = []
    for record in complete:
        value = reported_value(records, record, name)
        if value is not None:
            choices.append(Choice(rule, record, value, name, len(confirmations(records, record.config_hash))))
    if not choices:
        raise ValueError(
            f"The rule {rule} needs the metric {name}, but none of the {len(complete)} complete trials has a finite "
            "one. Choose another rule."
        )
    return _ordered(choices, records, metrics)


def _ordered(choices: Sequence[Choice], records: Sequence[TrialRecord], metrics: TaskMetrics) -> list[Choice]:
    """Confirmed configurations first, then by value, tie-breaker and number."""

    def order(choice: Choice) -> tuple[bool, float, float, int]:
        tie = _tie_score(choice.record, records, metrics)
        return choice.seeds == 0, -metrics.selection.score(choice.value), -tie, choice.record.number

    return sorted(choices, key=order)


def _tie_score(record: TrialRecord, records: Sequence[TrialRecord], metrics: TaskMetrics) -> float:
    value = reported_value(records, record, metrics.tie_breaker.on(VAL))
    return -math.inf if value is None else metrics.tie_breaker.score(value)


def _without_domain(record: TrialRecord, domain: str, metrics: TaskMetrics) -> TrialRecord:
    summaries = (metrics.ood_mean, metrics.ood_worst)
    values = [record.metrics[metrics.of_domain(name)] for name in metrics.domains(record.metrics) if name != domain]
    kept = {name: value for name, value in record.metrics.items() if name not in summaries}
    if values:
        kept[metrics.ood_mean] = _mean(values)
        kept[metrics.ood_worst] = metrics.selection.worst(values)
    return replace(record, metrics=kept)


def _best_of_each_label(ranked: Iterable[Choice]) -> dict[str, Choice]:
    best: dict[str, Choice] = {}
    for choice in ranked:
        best.setdefault(choice.record.label, choice)
    return best


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    # Exact, so that the order in which concurrent trials ended does not change a mean's last bit.
    return math.fsum(numbers) / len(numbers)
