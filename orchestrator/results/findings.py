"""What a study says, in sentences. Pure functions on its records and measurements; each sentence stands only where the
records support it, and says so where the 95 % intervals do not.

What was chosen on one tuned model by evaluation alone – λ of LayerNorm tuning, α of WiSE – and what FSR had said.

What the measured plasticity of the pretrained network's components says, and whether training bears it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.record.records import TrialRecord
from orchestrator.results.comparison import Competitor, Score, certainty, competitors, listed, overlap
from orchestrator.results.curves import chosen_at
from orchestrator.results.fsr import ORACLE, FsrEstimate, estimates, suggested
from orchestrator.results.leaderboard import GAINS, PROBE, relative_gain

EFFECTS = (("test/acc", "ID test accuracy"), ("ood/mean/acc", "OOD mean accuracy"))


@dataclass(frozen=True)
class Knob:
    """A number between the pretrained weights (0) and the tuned ones (1) that validation chooses."""

    sign: str
    curve: str
    """Curve, and name of its x axis' column."""
    column: str
    metric: str


LAMBDA = Knob("λ", "lambda", "lambda", "layernorm/lambda")
ALPHA = Knob("α", "wise", "alpha", "wise/alpha")


def choice_findings(records: Sequence[TrialRecord], entries: Sequence[Competitor]) -> Iterator[str]:
    """FSR against every reference, then every λ and α that was chosen on validation."""
    found = estimates(records)
    yield from fsr_findings(found)
    for entry in entries:
        if _searched(records, entry):
            yield _chosen(entry, LAMBDA, suggested(found))
    for entry in entries:
        if any(ALPHA.curve in run.curves for run in entry.runs):
            yield _chosen(entry, ALPHA, None)


def fsr_findings(found: Sequence[FsrEstimate]) -> Iterator[str]:
    """A sentence per reference; the oracles, which are for analysis only, together in one."""
    yield from (estimate.sentence() for estimate in found if not estimate.is_oracle)
    oracles = [e for e in found if e.is_oracle and math.isfinite(e.value)]
    if oracles:
        shown = ", ".join(f"{e.reference.removeprefix(ORACLE)} {e.number()}" for e in oracles)
        yield f"FSR against labelled OOD images (oracle, for analysis only): {shown}."


def _searched(records: Sequence[TrialRecord], entry: Competitor) -> bool:
    """Whether λ was chosen on validation: within each trial, or by the search."""
    values = {r.metric(LAMBDA.metric) for r in records if r.label == entry.label and r.role == "search"} - {None}
    if all(run.metric(LAMBDA.metric) is None for run in entry.runs):
        return False
    return entry.chosen.hparams.get("lam_choice", "fixed") != "fixed" or len(values) > 1


def _chosen(entry: Competitor, knob: Knob, expected: FsrEstimate | None) -> str:
    values = [value for run in entry.runs if (value := run.metric(knob.metric)) is not None]
    mean, low, high = math.fsum(values) / len(values), min(values), max(values)
    spread = f" ({low:.2f} to {high:.2f} over {len(values)} seeds)" if low < high else ""
    text = f"{entry.label}: best {knob.sign} on validation was {mean:.2f}{spread}"
    if expected is not None:
        side = "> 1" if expected.value < 1 else "< 1"
        agrees = low > 1 if expected.value < 1 else high < 1
        text += f", {'as' if agrees else 'while'} FSR {expected.value:.2f} suggests {knob.sign} {side}"
    effects = [f"{name} by {score.points()}" for metric, name in EFFECTS if (score := _effect(entry, knob, metric))]
    if effects:
        text += f"; against {knob.sign} = 1 it changes {' and '.join(effects)}"
    return f"{text}."


def _effect(entry: Competitor, knob: Knob, metric: str) -> Score | None:
    """Accuracy at the chosen point less that at 1, seed by seed from the curves; None where nothing was moved."""
    differences, moved = [], False
    for run in entry.runs:
        columns = (run.curves.get(knob.curve) or {}).get("columns") or {}
        at, values = chosen_at(run, knob.curve), columns.get(metric)
        if at is None or values is None:
            continue
        points = {round(float(x), 6): value for x, value in zip(columns[knob.column], values, strict=True)}
        here, tuned = points.get(round(at, 6)), points.get(1.0)
        if here is not None and tuned is not None:
            differences.append(here - tuned)
            moved = moved or at != 1
    return Score.of(differences) if moved else None


NAMES = {"ln1": "LN1", "mha": "MHA", "ln2": "LN2", "fc1": "FC1", "fc2": "FC2"}
METRIC = "test/acc"


def plasticity_findings(entries: Sequence[Competitor], measurements: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The rank of the components by plasticity; what share of full fine-tuning's gain over linear probing the most
    plastic one reaches when it is trained alone; whether another one, trained alone, is better."""
    found = measurements.get("plasticity") or {}
    values = {kind: (found.get("metrics") or {}).get(f"plasticity/{kind}", math.nan) for kind in NAMES}
    ranked = sorted((kind for kind in NAMES if math.isfinite(values[kind])), key=lambda kind: -values[kind])
    if len(ranked) < 2:
        return
    most, others = ranked[0], ", ".join(f"{NAMES[kind]} {values[kind]:.2f}" for kind in ranked[1:])
    head = f"{NAMES[most]} is the most plastic component (P {values[most]:.2f}{_blocks(most, found)}; {others})"
    alone = trained_alone(entries)
    yield f"{head}{_share(entries, alone.get(most))}."
    scored = [(kind, score) for kind, entry in alone.items() if (score := entry.score(METRIC)) is not None]
    if len(scored) < 2 or most not in alone:
        return
    (best, top), *rest = sorted(scored, key=lambda pair: -pair[1].mean)
    if best == most:
        second, runner_up = rest[0]
        yield (
            f"Of the components trained alone, the most plastic one is also the best on the ID test: {NAMES[best]} "
            f"({top.per_cent()}), then {NAMES[second]} ({runner_up.per_cent()}); {certainty(top, runner_up)}."
        )
        return
    own = dict(scored).get(most)
    if own is not None:
        yield (
            f"Of the components trained alone, {NAMES[best]} is the best on the ID test ({top.per_cent()}), not the "
            f"most plastic one, {NAMES[most]} ({own.per_cent()}); {certainty(top, own)}."
        )


def trained_alone(entries: Sequence[Competitor]) -> dict[str, Competitor]:
    """Component → the best entry, by the study's rule, all of whose runs trained that component and no other."""
    found: dict[str, Competitor] = {}
    for entry in entries:
        for kind in NAMES:
            alone = [
                run.metric("components/selected") == 1 and run.metric(f"components/{kind}") == 1 for run in entry.runs
            ]
            if alone and all(alone):
                found.setdefault(kind, entry)
    return found


def _blocks(kind: str, found: Mapping[str, Any]) -> str:
    columns = ((found.get("curves") or {}).get("plasticity") or {}).get("columns") or {}
    per_block = [columns[name] for name in NAMES if columns.get(name)]
    if kind not in columns or len(per_block) < 2 or len(columns[kind]) < 2:
        return ""
    rows = [[v for v in row if v is not None] for row in zip(*per_block, strict=True)]
    wins = sum(own is not None and own >= max(row) for own, row in zip(columns[kind], rows, strict=True))
    return f", the highest in {wins} of {len(rows)} blocks"


def _share(entries: Sequence[Competitor], alone: Competitor | None) -> str:
    own = alone.score(METRIC) if alone is not None else None
    if own is None:
        return ""
    plain = [e for e in entries if e.strategy == "full" and e.chosen.hparams.get("wise") is None]
    full = next((score for e in plain if (score := e.score(METRIC))), None)
    probe = next((score for e in entries if e.strategy == PROBE and (score := e.score(METRIC))), None)
    head = " and, trained alone,"
    if full is None or probe is None:
        return f"{head} reaches {own.per_cent()} on the ID test"
    gain = full.mean - probe.mean
    if gain <= 0:
        return (
            f"{head} reaches {own.per_cent()} on the ID test; full fine-tuning itself gains nothing over linear "
            f"probing ({full.per_cent()} against {probe.per_cent()}), so that there is no share of a gain to tell"
        )
    if overlap(full, probe) is not False:
        return (
            f"{head} reaches {own.per_cent()} on the ID test; full fine-tuning's own gain over linear probing "
            f"({100 * gain:+.1f} points) is within the intervals, so that there is no share of it to tell"
        )
    if own.mean <= probe.mean:
        return f"{head} gains nothing over linear probing (ID test {own.per_cent()} against {probe.per_cent()})"
    share = f"{100 * (own.mean - probe.mean) / gain:.0f} % of full fine-tuning's gain over linear probing"
    return f"{head} reaches {share} (ID test {own.per_cent()} against {full.per_cent()}; {_told_apart(own, full)})"


def _told_apart(own: Score, full: Score) -> str:
    shared = overlap(own, full)
    if shared is None:
        return "one seed has no interval"
    return "their 95 % intervals overlap" if shared else "their 95 % intervals are apart"


Measurements = Mapping[str, Mapping[str, Any]]
"""Name → `metrics` and `curves` (`orchestrator.record.records.measurements`)."""

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
