"""Findings of a study as sentences: pure functions on its records and measurements.

Each sentence appears only where the records support it, and states where two entries cannot be told apart: "ahead" is
kept for a leader that is better than every rival by paired tests over samples and seeds, adjusted for their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import kendalltau

from orchestrator.record.records import TrialRecord
from orchestrator.results.comparison import Competitor, Score, Standing, compare, competitors, standing
from orchestrator.results.curves import chosen_at
from orchestrator.results.fsr import ORACLE, FsrEstimate, estimates, suggested
from orchestrator.results.leaderboard import PROBE, probe_choice, relative_gain
from orchestrator.results.predictions import SampleTables
from trainables.specs.metrics import (
    CLASSIFICATION,
    COMPONENT,
    COMPONENTS_SELECTED,
    DISTORTION_COSINE,
    LAYERNORM_LAMBDA,
    PLASTICITY,
    TEST,
    WISE_ALPHA,
    TaskMetrics,
    ood,
)

Measurements = Mapping[str, Mapping[str, Any]]
"""Name → `metrics` and `curves` (`orchestrator.record.records.measurements`)."""

MIN_ENTRIES = 5
"""Fewest entries over which a rank correlation is reported."""
SIGNIFICANT = 0.05
"""p value below which a rank correlation counts as a relation."""


def findings(
    records: Sequence[TrialRecord],
    rule: str,
    measurements: Measurements | None = None,
    metrics: TaskMetrics = CLASSIFICATION,
    tables: SampleTables | None = None,
) -> list[str]:
    """All findings, the most general first.

    None before a trial of the search is complete, except for FSR, which needs no search.

    Args:
        rule: the study's own selection rule.
        tables: per-sample results; None = there are none.
    """
    try:
        entries = competitors(records, rule, metrics, tables)
    except ValueError:
        entries = []
    return [
        *best_findings(entries, metrics),
        *gain_findings(entries, metrics),
        *plasticity_findings(entries, measurements or {}, metrics),
        *choice_findings(records, entries, metrics),
        *distortion_findings(entries, metrics),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Best entries and gains over linear probing


def best_findings(entries: Sequence[Competitor], metrics: TaskMetrics) -> Iterator[str]:
    """The best entry on ID test and on OOD.

    And whether it is ahead of every other one.
    """
    for name, where, split in (
        (metrics.test, "in distribution", "test"),
        (metrics.ood_mean, "out of distribution", "OOD mean"),
    ):
        ranked = standing(entries, name, metrics)
        if ranked is not None:
            yield f"Best {where}: {_lead(ranked, split, metrics)}; {ranked.clause()}."


def _lead(ranked: Standing, split: str, metrics: TaskMetrics) -> str:
    """The leader, the next entry, and the difference of the two."""
    metric = metrics.selection
    second = ranked.rivals[0]
    difference = second.comparison.difference
    oriented = metric.score(difference.mean)
    lead = metric.difference(oriented, difference.half if second.comparison.over_both else math.nan, signed=False)
    leader = f"{ranked.leader.label} ({split} {ranked.score.text(metric)}, {ranked.score.n})"
    if ranked.ahead:
        others = "" if len(ranked.rivals) == 1 else " of every other entry, of the next"
        return f"{leader}, ahead{others} by {lead}: {second.entry.label} ({second.score.text(metric)})"
    return f"{leader}, then {second.entry.label} ({second.score.text(metric)}), with a difference of {lead}"


def gain_findings(entries: Sequence[Competitor], metrics: TaskMetrics) -> Iterator[str]:
    """Largest and smallest relative gain over linear probing (`orchestrator.results.leaderboard.relative_gain`)."""
    probe = next((entry for entry in entries if entry.strategy == PROBE), None)
    if probe is None:
        return
    parts = []
    for name, where in ((metrics.test, "in distribution"), (metrics.ood_mean, "out of distribution")):
        base = probe.score(name)
        others = [(entry, score) for entry, score in _ranked(entries, name, metrics) if entry.strategy != PROBE]
        if base is None or not base.mean or not others:
            continue
        gains = [f"{entry.label} {_gain(entry, probe, name, metrics)}" for entry, _ in others]
        if len(gains) == 1:
            parts.append(f"{where} {gains[0]}")
        else:
            parts.append(f"{where} from {gains[-1]} to {gains[0]}")
    if parts:
        yield f"Relative gain over linear probing ({probe.label}): {'; '.join(parts)}."


def _gain(entry: Competitor, probe: Competitor, name: str, metrics: TaskMetrics) -> str:
    """Relative gain, and whether the paired difference to the probe may be chance."""
    score = entry.score(name)
    base = probe.score(name)
    comparison = compare(entry, probe, name)
    assert score is not None
    assert base is not None
    assert comparison is not None
    return f"{100 * relative_gain(score.mean, base.mean, metrics.selection):+.1f} %{comparison.mark()}"


def _ranked(entries: Sequence[Competitor], name: str, metrics: TaskMetrics) -> list[tuple[Competitor, Score]]:
    """Entries that have a metric, with their scores, best first."""
    scored = [(entry, entry.score(name)) for entry in entries]
    present = [(entry, score) for entry, score in scored if score is not None]
    return sorted(present, key=lambda pair: -metrics.selection.score(pair[1].mean))


# ---------------------------------------------------------------------------------------------------------------------
# λ of LayerNorm tuning and α of WiSE-FT, chosen on one tuned model by evaluation alone


@dataclass(frozen=True)
class InterpolationFactor:
    """A factor between the pretrained weights (0) and the tuned ones (1) that validation chooses."""

    symbol: str
    curve: str
    column: str
    """x axis of the curve."""
    metric: str
    """Recorded name of the chosen value."""


LAMBDA = InterpolationFactor("λ", "lambda", "lambda", LAYERNORM_LAMBDA.name)
ALPHA = InterpolationFactor("α", "wise", "alpha", WISE_ALPHA.name)


def choice_findings(
    records: Sequence[TrialRecord], entries: Sequence[Competitor], metrics: TaskMetrics
) -> Iterator[str]:
    """C of the linear probe, FSR against every reference, then every λ and α that was chosen on validation."""
    yield from probe_findings(entries)
    ratios = estimates(records)
    yield from fsr_findings(ratios)
    for entry in entries:
        if _lambda_was_chosen(records, entry):
            yield _chosen(entry, LAMBDA, suggested(ratios), metrics)
    for entry in entries:
        if any(ALPHA.curve in run.curves for run in entry.runs):
            yield _chosen(entry, ALPHA, None, metrics)


def probe_findings(entries: Sequence[Competitor]) -> Iterator[str]:
    """The C that linear probing chose, and how flat the validation curve was."""
    for entry in entries:
        C, low, high, within, path = probe_choice(entry.chosen).values()
        if entry.strategy == PROBE and not math.isnan(path):
            yield (
                f"{entry.label}: C = {C:.3g} by validation; of {path:.0f} values, {within:.0f} from {low:.3g} to "
                f"{high:.3g} are within one standard error of the best."
            )


def fsr_findings(ratios: Sequence[FsrEstimate]) -> Iterator[str]:
    """One sentence per reference; the oracles, which are for analysis only, share one."""
    for estimate in ratios:
        if not estimate.is_oracle:
            yield estimate.sentence()
    oracles = [e for e in ratios if e.is_oracle and math.isfinite(e.value)]
    if oracles:
        values = ", ".join(f"{e.reference.removeprefix(ORACLE)} {e.number()}" for e in oracles)
        yield f"FSR against labelled OOD images (oracle, for analysis only): {values}."


def _lambda_was_chosen(records: Sequence[TrialRecord], entry: Competitor) -> bool:
    """Whether λ was chosen on validation: within each trial, or by the search."""
    if all(run.metric(LAMBDA.metric) is None for run in entry.runs):
        return False
    if entry.chosen.hparams.get("lam_choice", "fixed") != "fixed":
        return True
    searched = [r for r in records if r.label == entry.label and r.role == "search"]
    return len({r.metric(LAMBDA.metric) for r in searched} - {None}) > 1


def _chosen(entry: Competitor, factor: InterpolationFactor, expected: FsrEstimate | None, metrics: TaskMetrics) -> str:
    chosen = [run.metric(factor.metric) for run in entry.runs]
    values = [value for value in chosen if value is not None]
    mean = math.fsum(values) / len(values)
    low = min(values)
    high = max(values)
    spread = f" ({low:.2f} to {high:.2f} over {len(values)} seeds)" if low < high else ""
    text = f"{entry.label}: best {factor.symbol} on validation was {mean:.2f}{spread}"
    if expected is not None:
        above = expected.value < 1
        agrees = low > 1 if above else high < 1
        side = "> 1" if above else "< 1"
        text += f", {'as' if agrees else 'while'} FSR {expected.value:.2f} suggests {factor.symbol} {side}"
    effects = []
    for name, split in ((metrics.test, "ID test"), (metrics.ood_mean, "OOD mean")):
        effect = _effect(entry, factor, name)
        if effect is not None:
            effects.append(f"{split} {metrics.selection.title} by {effect.difference(metrics.selection)}")
    if effects:
        text += f"; against {factor.symbol} = 1 it changes {' and '.join(effects)}"
    return f"{text}."


def _effect(entry: Competitor, factor: InterpolationFactor, name: str) -> Score | None:
    """A metric at the chosen point less that at 1.

    Per seed, from the curves; None if all seeds chose 1.
    """
    differences = []
    moved = False
    for run in entry.runs:
        columns = (run.curves.get(factor.curve) or {}).get("columns") or {}
        chosen = chosen_at(run, factor.curve)
        values = columns.get(name)
        if chosen is None or values is None:
            continue
        # A chosen value need not be the grid's number to the last bit.
        points = {round(float(x), 6): value for x, value in zip(columns[factor.column], values, strict=True)}
        at_chosen = points.get(round(chosen, 6))
        at_one = points.get(1.0)
        if at_chosen is not None and at_one is not None:
            differences.append(at_chosen - at_one)
            moved = moved or chosen != 1
    return Score.of(differences) if moved else None


# ---------------------------------------------------------------------------------------------------------------------
# Plasticity of the pretrained network's components

COMPONENTS = {"ln1": "LN1", "mha": "MHA", "ln2": "LN2", "fc1": "FC1", "fc2": "FC2"}
"""Component of a transformer block → its name in Odonnat et al. (2026)."""


def plasticity_findings(
    entries: Sequence[Competitor], measurements: Measurements, metrics: TaskMetrics
) -> Iterator[str]:
    """The components ranked by plasticity, and whether training them alone confirms the ranking.

    The most plastic component's share of full fine-tuning's gain over linear probing, and whether another component,
    trained alone, is better.
    """
    measured = measurements.get("plasticity") or {}
    recorded = measured.get("metrics") or {}
    values = {kind: recorded.get(PLASTICITY.of(kind), math.nan) for kind in COMPONENTS}
    finite = [kind for kind in COMPONENTS if math.isfinite(values[kind])]
    ranked = sorted(finite, key=lambda kind: -values[kind])
    if len(ranked) < 2:
        return
    most = ranked[0]
    others = ", ".join(f"{COMPONENTS[kind]} {values[kind]:.2f}" for kind in ranked[1:])
    alone = trained_alone(entries)
    yield (
        f"{COMPONENTS[most]} is the most plastic component (P {values[most]:.2f}{_blocks(most, measured)}; {others})"
        f"{_share(entries, alone.get(most), metrics)}."
    )
    yield from _best_component(most, alone, metrics)


def _best_component(most: str, alone: Mapping[str, Competitor], metrics: TaskMetrics) -> Iterator[str]:
    metric = metrics.selection
    scores = {kind: entry.score(metrics.test) for kind, entry in alone.items()}
    present = [(kind, score) for kind, score in scores.items() if score is not None]
    scored = sorted(present, key=lambda pair: -metric.score(pair[1].mean))
    if len(scored) < 2 or most not in alone:
        return
    best, top = scored[0]
    if best == most:
        second, runner_up = scored[1]
        yield (
            f"Of the components trained alone, the most plastic one is also the best on the ID test: "
            f"{COMPONENTS[best]} ({top.text(metric)}), then {COMPONENTS[second]} ({runner_up.text(metric)}); "
            f"{_certainty(alone[best], alone[second], metrics)}."
        )
        return
    most_plastic = scores[most]
    if most_plastic is not None:
        yield (
            f"Of the components trained alone, {COMPONENTS[best]} is the best on the ID test ({top.text(metric)}), not "
            f"the most plastic one, {COMPONENTS[most]} ({most_plastic.text(metric)}); "
            f"{_certainty(alone[best], alone[most], metrics)}."
        )


def _certainty(first: Competitor, second: Competitor, metrics: TaskMetrics) -> str:
    comparison = compare(first, second, metrics.test)
    assert comparison is not None
    return comparison.clause()


def trained_alone(entries: Sequence[Competitor]) -> dict[str, Competitor]:
    """Component → the best entry that trained it alone.

    The best by the study's rule, of the entries all of whose runs trained that component and no other.
    """
    best: dict[str, Competitor] = {}
    for entry in entries:
        for kind in COMPONENTS:
            if entry.runs and all(_trains_only(run, kind) for run in entry.runs):
                best.setdefault(kind, entry)
    return best


def _trains_only(run: TrialRecord, kind: str) -> bool:
    return run.metric(COMPONENTS_SELECTED.name) == 1 and run.metric(COMPONENT.of(kind)) == 1


def _blocks(kind: str, measured: Mapping[str, Any]) -> str:
    """Clause on the blocks in which a component is the most plastic.

    Their number; empty without a value per block.
    """
    columns = ((measured.get("curves") or {}).get("plasticity") or {}).get("columns") or {}
    per_component = [columns[name] for name in COMPONENTS if columns.get(name)]
    if kind not in columns or len(per_component) < 2 or len(columns[kind]) < 2:
        return ""
    blocks = [[value for value in block if value is not None] for block in zip(*per_component, strict=True)]
    highest = [max(block, default=math.inf) for block in blocks]
    wins = sum(value is not None and value >= top for value, top in zip(columns[kind], highest, strict=True))
    return f", the highest in {wins} of {len(highest)} blocks"


def _share(entries: Sequence[Competitor], alone: Competitor | None, metrics: TaskMetrics) -> str:
    """Clause on a component's share of full fine-tuning's gain.

    The share of the gain over linear probing that the component, trained alone, reaches.
    """
    metric = metrics.selection
    reached = alone.score(metrics.test) if alone is not None else None
    if reached is None:
        return ""
    full_entries = [e for e in entries if e.strategy == "full" and e.chosen.hparams.get("wise") is None]
    full_entry = _first_with(full_entries, metrics.test)
    probe_entry = _first_with([e for e in entries if e.strategy == PROBE], metrics.test)
    full = full_entry.score(metrics.test) if full_entry is not None else None
    probe = probe_entry.score(metrics.test) if probe_entry is not None else None
    head = " and, trained alone,"
    if full_entry is None or probe_entry is None or full is None or probe is None or alone is None:
        return f"{head} reaches {reached.text(metric)} on the ID test"
    gain = metric.score(full.mean - probe.mean)
    if gain <= 0:
        return (
            f"{head} reaches {reached.text(metric)} on the ID test; full fine-tuning itself gains nothing over linear "
            f"probing ({full.text(metric)} against {probe.text(metric)}), so that there is no share of a gain to tell"
        )
    reached_gain = metric.score(reached.mean - probe.mean)
    if reached_gain <= 0:
        numbers = f"ID test {reached.text(metric)} against {probe.text(metric)}"
        return f"{head} gains nothing over linear probing ({numbers})"
    # Also without a conclusion: a share of a difference that may be chance means nothing.
    comparison = compare(full_entry, probe_entry, metrics.test)
    if comparison is None or not comparison.over_both or comparison.difference.contains_zero:
        reason = comparison.mark().strip(" ()") if comparison is not None else "no value"
        return (
            f"{head} reaches {reached.text(metric)} on the ID test; full fine-tuning's own gain over linear probing "
            f"({metric.difference(gain)}) is not certain ({reason}), so that there is no share of it to tell"
        )
    share = f"{100 * reached_gain / gain:.0f} % of full fine-tuning's gain over linear probing"
    numbers = f"ID test {reached.text(metric)} against {full.text(metric)}"
    return f"{head} reaches {share} ({numbers}; {_certainty(alone, full_entry, metrics)})"


def _first_with(entries: Sequence[Competitor], name: str) -> Competitor | None:
    """The first entry that has the metric."""
    return next((entry for entry in entries if entry.score(name) is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# Distortion of features


def distortion_findings(entries: Sequence[Competitor], metrics: TaskMetrics) -> Iterator[str]:
    """The entries that moved the features most and least.

    And whether distortion goes with the OOD score.
    """
    scored = [(entry, entry.score(DISTORTION_COSINE.of(TEST))) for entry in entries]
    measured = [(entry, cosine, _ood_cosine(entry)) for entry, cosine in scored if cosine is not None]
    # The cosine of equal features is exactly 1: a frozen backbone did not move them.
    moved = sorted((row for row in measured if row[1].mean < 1), key=lambda row: row[1].mean)
    if len(moved) >= 2:
        most, most_test, most_ood = moved[0]
        least, least_test, least_ood = moved[-1]
        yield (
            f"{most.label} moved the features most: mean cosine {_cosines(most_test, most_ood)} before and after; "
            f"{least.label} least of those that move them: {_cosines(least_test, least_ood)}."
        )
    yield from _distortion_and_ood([(entry, cosine) for entry, _, cosine in measured if cosine is not None], metrics)


def _distortion_and_ood(cosines: Sequence[tuple[Competitor, float]], metrics: TaskMetrics) -> Iterator[str]:
    scored = [(cosine, entry.score(metrics.ood_mean)) for entry, cosine in cosines]
    pairs = [(cosine, metrics.selection.score(score.mean)) for cosine, score in scored if score is not None]
    distinct_cosines = len({cosine for cosine, _ in pairs})
    distinct_scores = len({score for _, score in pairs})
    # Of four entries Kendall's τ cannot reach p < 0.05 (2 / 4! = 0.083); of ties alone it is undefined.
    if len(pairs) < MIN_ENTRIES or distinct_cosines < 3 or distinct_scores < 2:
        return
    tau, p = kendalltau(*zip(*pairs, strict=True))
    over = f"Over {len(pairs)} entries"
    numbers = f"(Kendall's τ {tau:+.2f}, p {p:.2f})"
    title = metrics.selection.title
    if p >= SIGNIFICANT or math.isnan(p):
        yield f"{over}, distortion of OOD features and OOD {title} show no clear relation {numbers}."
    else:
        direction = "better" if tau > 0 else "worse"
        yield f"{over}, less distortion of OOD features goes with {direction} OOD {title} {numbers}."


def _ood_cosine(entry: Competitor) -> float | None:
    """Mean over OOD domains and runs."""
    start, end = DISTORTION_COSINE.of(ood("*")).split("*")
    values = [
        value
        for run in entry.runs
        for name, value in run.metrics.items()
        if name.startswith(start) and name.endswith(end) and math.isfinite(value)
    ]
    return math.fsum(values) / len(values) if values else None


def _cosines(test: Score, ood_mean: float | None) -> str:
    text = f"{test.mean:.3f} on the ID test"
    return text if ood_mean is None else f"{text} and {ood_mean:.3f} on OOD"
