"""Which configuration to choose: pure functions on the records of a study, applied after its trials have run.

The criteria are those of DomainBed (Gulrajani & Lopez-Paz 2021, section 3). A rule ranks configurations, best first.
Only trials of the search that used their whole budget (`complete`) are candidates: a pruned trial was stopped because
it was behind, its validation accuracy belongs to a smaller budget, and its test numbers may be missing; counting it
would compare unequal budgets. Trials with role `fold` or `confirm` are never candidates themselves.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from orchestrator.record.records import TrialRecord
from orchestrator.study_file.rules import VAL_DOMAIN


@dataclass(frozen=True)
class Choice:
    """One configuration as a rule sees it."""

    rule: str
    record: TrialRecord
    """The search trial of the configuration."""
    value: float
    """The rule's criterion, higher is better."""
    criterion: str
    """Name of the metric behind `value`."""

    @property
    def oracle(self) -> bool:
        """True if test data was looked at: an upper bound, not a result."""
        return self.rule == "oracle"


@dataclass(frozen=True)
class Regret:
    """What a rule gave away against a choice that looks at the test data."""

    metric: str
    chosen: Choice
    oracle: Choice
    value: float
    """`metric` of the oracle's configuration minus that of the chosen one (accuracy, 0 or more)."""


Rule = Callable[[Iterable[TrialRecord]], list[Choice]]


def id_val(records: Iterable[TrialRecord]) -> list[Choice]:
    """Rank by best accuracy on ID validation (`best/val/acc`); ties: lower `val/nll`, then the earlier trial."""
    return _ranked("id_val", "best/val/acc", [(r, r.metric("best/val/acc")) for r in candidates(records)])


def leave_one_domain_out(records: Iterable[TrialRecord]) -> list[Choice]:
    """Rank by mean accuracy on the held-out ID domain over a configuration's folds; every held-out domain of the study
    counts once, and only configurations with a complete fold for each of them are ranked.

    Raises:
        ValueError: fewer than two domains were held out, or no configuration has all its folds.
    """
    found = list(records)
    folds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in found:
        value = record.metric("held_out/acc")
        if record.role == "fold" and record.state == "complete" and record.held_out and value is not None:
            folds[record.config_hash][record.held_out].append(value)
    domains = {domain for by_domain in folds.values() for domain in by_domain}
    if len(domains) < 2:
        raise ValueError(
            f"leave_one_domain_out needs complete folds for at least 2 ID domains, but got {len(domains)}"
            f"{' (' + ', '.join(sorted(domains)) + ')' if domains else ''}. "
            "List two or more domains under data.id and set search.objective to leave_one_domain_out, or select by "
            "id_val."
        )
    scored: list[tuple[TrialRecord, float | None]] = [
        (record, _mean(_mean(values) for values in folds[record.config_hash].values()))
        for record in candidates(found)
        if set(folds.get(record.config_hash, ())) == domains
    ]
    if not scored:
        raise ValueError(
            "leave_one_domain_out needs a configuration with a complete fold for each of "
            f"{', '.join(sorted(domains))}, but none has them all. Run the study again to continue it, or select by "
            "id_val."
        )
    return _ranked("leave_one_domain_out", "held_out/acc", scored)


def oracle(records: Iterable[TrialRecord]) -> list[Choice]:
    """Rank by mean accuracy on the OOD test domains (`test/acc` where a study has none). It looks at test data, so it
    is only an upper bound to measure regret with."""
    found = candidates(records)
    metric = _oracle_metric(found)
    return _ranked("oracle", metric, [(record, record.metric(metric)) for record in found])


def val_domain(records: Iterable[TrialRecord], domain: str) -> list[Choice]:
    """Rank by accuracy on one OOD domain that the person gave up as a test (`val_domain:<name>`)."""
    metric = f"ood/{domain}/acc"
    return _ranked(f"{VAL_DOMAIN}{domain}", metric, [(r, r.metric(metric)) for r in candidates(records)])


RULES: dict[str, Rule] = {"id_val": id_val, "leave_one_domain_out": leave_one_domain_out, "oracle": oracle}


def rank(records: Iterable[TrialRecord], rule: str = "id_val") -> list[Choice]:
    """Distinct configurations, best first, by the rule of that name.

    Raises:
        ValueError: unknown rule, no complete trial, or what the rule itself needs is missing.
    """
    if rule.startswith(VAL_DOMAIN):
        return val_domain(records, rule.removeprefix(VAL_DOMAIN))
    if rule not in RULES:
        near = difflib.get_close_matches(rule, RULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join([*RULES, f"{VAL_DOMAIN}<name>"])
        raise ValueError(f"A selection rule is one of {known}, but got {rule!r}.{hint}")
    return RULES[rule](records)


def tested(records: Iterable[TrialRecord], rule: str) -> list[TrialRecord]:
    """The records with OOD mean and worst over test domains alone: a domain that `rule` uses for validation is left out
    of both. Other rules change nothing."""
    if not rule.startswith(VAL_DOMAIN):
        return list(records)
    return [_without_domain(record, rule.removeprefix(VAL_DOMAIN)) for record in records]


def select(records: Iterable[TrialRecord], rule: str = "id_val", label: str | None = None) -> Choice:
    """The configuration that the rule chooses, of all or of one label (errors: see `rank`)."""
    ranked = rank(records, rule)
    if label is None:
        return ranked[0]
    for choice in ranked:
        if choice.record.label == label:
            return choice
    known = ", ".join(dict.fromkeys(choice.record.label for choice in ranked))
    raise ValueError(f"A label with a complete trial is one of {known}, but got {label!r}.")


def per_label(records: Iterable[TrialRecord], rule: str = "id_val") -> dict[str, Choice]:
    """The chosen configuration of every label that has one, best label first (errors: see `rank`)."""
    chosen: dict[str, Choice] = {}
    for choice in rank(records, rule):
        chosen.setdefault(choice.record.label, choice)
    return chosen


def regret(records: Iterable[TrialRecord], rule: str = "id_val") -> Regret:
    """What the rule's choice lacks against the oracle's, both measured on their search trials (errors: see `rank`)."""
    found = tested(records, rule)
    best, chosen = select(found, "oracle"), select(found, rule)
    metric = best.criterion
    return Regret(metric, chosen, best, best.value - chosen.record.metrics.get(metric, math.nan))


def top_candidates(records: Iterable[TrialRecord], k: int, rule: str = "id_val") -> list[TrialRecord]:
    """Up to `k` distinct configurations to look at again: the best of every label first, then the rest, each ranked.

    Raises:
        ValueError: negative `k`; or see `rank`.
    """
    if k < 0:
        raise ValueError(f"The number of candidates must be 0 or more, but got {k}.")
    ranked = rank(records, rule)
    first = {id(choice) for choice in _first_of_each_label(ranked)}
    ordered = sorted(ranked, key=lambda choice: id(choice) not in first)  # stable: keeps the ranks
    return [choice.record for choice in ordered[:k]]


def candidates(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Complete search trials, one per configuration (the earliest), in order of their numbers.

    Raises:
        ValueError: there is none.
    """
    search = sorted((r for r in records if r.role == "search"), key=lambda r: r.number)
    distinct = {r.config_hash or r.trial_id: r for r in reversed(search) if r.state == "complete"}
    if not distinct:
        states = Counter(r.state for r in search)
        got = ", ".join(f"{n} {state}" for state, n in sorted(states.items())) or "none at all"
        raise ValueError(
            f"Selection needs at least one complete search trial, but got {got}. "
            "Run the study again to continue it; `luthier status` says why trials failed."
        )
    return sorted(distinct.values(), key=lambda r: r.number)


def _ranked(rule: str, criterion: str, scored: Sequence[tuple[TrialRecord, float | None]]) -> list[Choice]:
    choices = [Choice(rule, record, value, criterion) for record, value in scored if value is not None]
    if not choices:
        raise ValueError(
            f"The rule {rule} needs the metric {criterion}, but none of the {len(scored)} complete trials has a finite "
            "one. Choose another rule."
        )
    return sorted(choices, key=lambda c: (-c.value, _nll(c.record), c.record.number))


def _nll(record: TrialRecord) -> float:
    value = record.metric("val/nll")
    return math.inf if value is None else value


def _without_domain(record: TrialRecord, domain: str) -> TrialRecord:
    named = (re.fullmatch(r"ood/(.+)/acc", key) for key in record.metrics)
    domains = {match[1] for match in named if match} - {"mean", "worst", domain}
    values = [record.metrics[f"ood/{name}/acc"] for name in sorted(domains)]
    metrics = {key: value for key, value in record.metrics.items() if key not in ("ood/mean/acc", "ood/worst/acc")}
    if values:
        metrics |= {"ood/mean/acc": _mean(values), "ood/worst/acc": min(values)}
    return replace(record, metrics=metrics)


def _oracle_metric(records: Sequence[TrialRecord]) -> str:
    return "ood/mean/acc" if any(r.metric("ood/mean/acc") is not None for r in records) else "test/acc"


def _first_of_each_label(ranked: Iterable[Choice]) -> list[Choice]:
    first: dict[str, Choice] = {}
    for choice in ranked:
        first.setdefault(choice.record.label, choice)
    return list(first.values())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
