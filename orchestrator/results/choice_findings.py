"""What was chosen on one tuned model by evaluation alone – λ of LayerNorm tuning, α of WiSE – and what FSR had said."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.record.records import TrialRecord
from orchestrator.results.comparison import Competitor, Score
from orchestrator.results.curves import chosen_at
from orchestrator.results.fsr import ORACLE, FsrEstimate, estimates, suggested

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
