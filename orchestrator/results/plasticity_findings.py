"""What the measured plasticity of the pretrained network's components says, and whether training bears it out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.results.comparison import Competitor, Score, certainty, overlap
from orchestrator.results.leaderboard import PROBE

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
