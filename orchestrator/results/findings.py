"""What a study says, in sentences. Pure functions on its records and measurements; each sentence stands only where the
records support it, and says so where the 95 % intervals do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.record.records import TrialRecord
from orchestrator.results.choice_findings import choice_findings
from orchestrator.results.comparison import Competitor, Score, competitors, listed, overlap
from orchestrator.results.leaderboard import GAINS, PROBE, relative_gain
from orchestrator.results.plasticity_findings import plasticity_findings

Measurements = Mapping[str, Mapping[str, Any]]
"""Name → `metrics` and `curves` (`orchestrator.record.folding.measurements`)."""

PLACES = (("test/acc", "in distribution", "test"), ("ood/mean/acc", "out of distribution", "OOD mean"))
ENOUGH = 5
"""Entries from which on a rank correlation over them is given."""
SIGNIFICANT = 0.05


def findings(records: Sequence[TrialRecord], rule: str, measurements: Measurements | None = None) -> list[str]:
    """All sentences, the most general first; none before a trial of the search is complete (but FSR, which needs no
    search).

    Args:
        rule: the study's own way to choose configurations.
    """
    try:
        entries = competitors(records, rule)
    except ValueError:
        entries = []
    return [
        *best_findings(entries),
        *gain_findings(entries),
        *plasticity_findings(entries, measurements or {}),
        *choice_findings(records, entries),
        *distortion_findings(entries),
    ]


def best_findings(entries: Sequence[Competitor]) -> Iterator[str]:
    """Which entry is best on the ID test, which on OOD, and which others its interval does not tell it from."""
    for metric, place, name in PLACES:
        ranked = _ranked(entries, metric)
        if len(ranked) < 2:
            continue
        (best, top), (second, runner_up) = ranked[:2]
        ahead = f"{100 * (top.mean - runner_up.mean):.1f} points ahead of {second.label} ({runner_up.per_cent()})"
        near = [entry.label for entry, score in ranked[1:] if overlap(top, score)]
        unknown = [entry.label for entry, score in ranked if not score.known]
        if best.label in unknown or second.label in unknown:
            tail = "one seed has no interval, so that the order may be chance"
        elif near:
            tail = f"the 95 % interval of {listed(near)} overlaps its own, so that the order may be chance"
            if len(near) > 1:
                tail = f"the 95 % intervals of {listed(near)} overlap its own, so that the order may be chance"
        else:
            tail = "no other 95 % interval reaches its own"
        yield f"Best {place}: {best.label} ({name} {top.per_cent()}), {ahead}; {tail}."


def gain_findings(entries: Sequence[Competitor]) -> Iterator[str]:
    """Largest and smallest relative gain over linear probing (`orchestrator.results.leaderboard.relative_gain`)."""
    probe = next((entry for entry in entries if entry.strategy == PROBE), None)
    if probe is None:
        return
    parts = []
    for metric, (_, place, _) in zip(GAINS.values(), PLACES, strict=True):
        base = probe.score(metric)
        others = [(entry, score) for entry, score in _ranked(entries, metric) if entry.strategy != PROBE]
        if base is None or not base.mean or not others:
            continue
        shown = [f"{entry.label} {_gain(score, base)}" for entry, score in others]
        if len(shown) == 1:
            parts.append(f"{place} {shown[0]}")
        else:
            parts.append(f"{place} from {shown[-1]} to {shown[0]}")
    if parts:
        yield f"Relative gain over linear probing ({probe.label}): {'; '.join(parts)}."


def distortion_findings(entries: Sequence[Competitor]) -> Iterator[str]:
    """Who moved the features, how far, and whether that went with OOD accuracy."""
    moved = [(entry, test, _ood_cosine(entry)) for entry in entries if (test := entry.score("distortion/test/cosine"))]
    tuned = sorted((row for row in moved if row[1].mean < 1), key=lambda row: row[1].mean)
    if len(tuned) >= 2:
        (most, cosine, outside), (least, still, still_outside) = tuned[0], tuned[-1]
        yield (
            f"{most.label} moved the features most: mean cosine {_cosines(cosine, outside)} before and after; "
            f"{least.label} least of those that move them: {_cosines(still, still_outside)}."
        )
    pairs = [(ood, score.mean) for e, _, ood in moved if ood is not None and (score := e.score("ood/mean/acc"))]
    if len(pairs) < ENOUGH or len({a for a, _ in pairs}) < 3 or len({b for _, b in pairs}) < 2:
        return
    from scipy.stats import kendalltau

    tau, p = kendalltau(*zip(*pairs, strict=True))
    over, numbers = f"Over {len(pairs)} entries", f"(Kendall's τ {tau:+.2f}, p {p:.2f})"
    if p >= SIGNIFICANT or math.isnan(p):
        yield f"{over}, distortion of OOD features and OOD accuracy show no clear relation {numbers}."
    else:
        goes = "better" if tau > 0 else "worse"
        yield f"{over}, less distortion of OOD features goes with {goes} OOD accuracy {numbers}."


def _ranked(entries: Sequence[Competitor], metric: str) -> list[tuple[Competitor, Score]]:
    scored = [(entry, score) for entry in entries if (score := entry.score(metric)) is not None]
    return sorted(scored, key=lambda pair: -pair[1].mean)


def _gain(score: Score, base: Score) -> str:
    text = f"{100 * relative_gain(score.mean, base.mean):+.1f} %"
    shared = overlap(score, base)
    return f"{text} (one seed)" if shared is None else f"{text} (within the intervals)" if shared else text


def _ood_cosine(entry: Competitor) -> float | None:
    """Mean over OOD domains and runs."""
    values = [
        value
        for run in entry.runs
        for name, value in run.metrics.items()
        if name.startswith("distortion/ood/") and name.endswith("/cosine") and math.isfinite(value)
    ]
    return math.fsum(values) / len(values) if values else None


def _cosines(test: Score, ood: float | None) -> str:
    return f"{test.mean:.3f} on the ID test" + ("" if ood is None else f" and {ood:.3f} on OOD")
