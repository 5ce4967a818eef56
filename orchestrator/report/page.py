"""Report of a study: one self-contained HTML page, from its journal and the predictions that it keeps.

Untrusted strings of study files, data sets and failing trials (names, messages, paths) are escaped by the template, and
the page's content security policy forbids loading anything and running any script but its own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FunctionLoader

from orchestrator.errors import redact
from orchestrator.record.changes import Change
from orchestrator.record.records import TrialRecord, fold, measurements, study_header, validation_score
from orchestrator.report.error_section import error_section, nothing
from orchestrator.report.front import front_section
from orchestrator.report.robustness import robustness_section
from orchestrator.results import figures
from orchestrator.results.curve_plot import figure_of
from orchestrator.results.curves import NUMBERS_ONLY
from orchestrator.results.leaderboard import (
    COST_TITLES,
    COUNT_TITLE,
    GAIN_TITLES,
    cells,
    costs,
    describe,
    gains,
    has_gains,
    robustness_cells,
    robustness_titles,
    score_note,
    score_titles,
)
from orchestrator.results.selection import Choice
from orchestrator.results.study_results import Results
from orchestrator.search.warm_start import warm_start_sentences
from trainables.specs.metrics import TaskMetrics
from trainables.storage.atomic_files import write_text

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

    from orchestrator.record.journal import Event
    from orchestrator.report.error_section import Similarities

logger = logging.getLogger("luthier")

REPORT = "report.html"
FIGURES = "figures"
"""Folder of the page's drawings, where they are files of their own."""
_DRAWING = re.compile(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)"')
MOST_TRIALS = 500
"""Rows of the table of trials; more would make the page slow. `luthier results --json` has all trials."""
WIDE = 8.0
"""Width, in inches, from which on a picture has a row of its own."""


def write_report(
    events: Sequence[Event], path: Path, folder: Path | None = None, similarities: Similarities | None = None
) -> None:
    """Write the page of a study, and the folder of `path` (arguments and errors: see `report_html`)."""
    page = report_html(events, folder, similarities)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def report_html(events: Sequence[Event], folder: Path | None = None, similarities: Similarities | None = None) -> str:
    """The page of a study.

    Args:
        events: its journal (`orchestrator.record.journal.Journal.read`), also of a running study.
        folder: of the study, for its predictions; None = where its journal says that it was run.
        similarities: of features before and after fine-tuning, by number of the trial
            (`orchestrator.report.features`); None = not measured.

    Raises:
        ValueError: the journal has no study, or the study's task is unknown.
    """
    header = study_header(events)
    if not header:
        raise ValueError("A report needs a study, but this journal does not tell of one. Run the study first.")
    return page_of(header, fold(events), measurements(events), folder, similarities)


def page_of(
    header: Mapping[str, Any],
    records: Sequence[TrialRecord],
    measured: Mapping[str, Mapping[str, Any]],
    folder: Path | None = None,
    similarities: Similarities | None = None,
) -> str:
    """The page of a study from its folded journal.

    Args:
        header: `orchestrator.record.records.study_header`.
        records: its trials, by number.
        measured: `orchestrator.record.records.measurements`.
        folder, similarities: as `report_html`.
    """
    spec = header.get("spec") or {}
    results = Results(records, {**spec, "name": header["study"]}, measurements=measured, folder=folder)
    table, rows, chosen = _leaderboard(results)
    script = _source("sorting.js")
    return _template().render(
        name=header["study"],
        state=header["state"],
        facts=list(_facts(header, records)),
        findings=results.findings(),
        warnings=results.warnings(),
        table=table,
        robustness=robustness_section(results),
        front=front_section(results, figures.colours([row["label"] for row in rows])),
        pictures=list(_pictures(rows, results, chosen)),
        errors=_errors(results, header, similarities),
        trials=[_trial(record, results.metrics) for record in records[:MOST_TRIALS]],
        left_out=max(0, len(records) - MOST_TRIALS),
        failures=_failures(records),
        spec=_spec_text(spec),
        changes=list(_changes(header)),
        versions=", ".join(f"{key} {value}" for key, value in (header.get("versions") or {}).items()),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def artifacts_of(
    header: Mapping[str, Any], records: Sequence[TrialRecord], measured: Mapping[str, Mapping[str, Any]]
) -> dict[str, bytes]:
    """The page of a study and its drawings as files of their own, by path (arguments: see `page_of`).

    Drawings are `figures/<title>.svg`. Photographs stay in the page alone.
    """
    page = page_of(header, records, measured)
    files = {REPORT: page.encode()}
    for title, content in _DRAWING.findall(page):
        stem = re.sub(r"[^a-z0-9]+", "_", html.unescape(title).lower()).strip("_")[:80] or "figure"
        namesakes = itertools.count(2)
        path = f"{FIGURES}/{stem}.svg"
        while path in files:
            path = f"{FIGURES}/{stem}_{next(namesakes)}.svg"
        files[path] = base64.b64decode(content)
    return files


def _leaderboard(results: Results) -> tuple[dict[str, Any], list[dict[Any, Any]], dict[str, Choice]]:
    """(Leaderboard for the template, its rows, the chosen configurations); the reason, before a trial is complete."""
    metrics = results.metrics
    try:
        rows = results.leaderboard().to_dict("records")
        chosen = results.per_label()
    except ValueError as error:
        return {"problem": str(error)}, [], {}
    gain_titles = GAIN_TITLES if has_gains(rows) else ()
    scores = [*score_titles(metrics), *robustness_titles(rows)]
    titles = ["strategy", COUNT_TITLE, *scores, *gain_titles, *COST_TITLES, "chosen configuration"]
    lines = []
    for row in rows:
        label, hparams, *numbers = cells(row, metrics)
        configuration = f"trial {row['number']}: {hparams}" if row["seeds"] else "–"
        lines.append([label, *numbers, *robustness_cells(row), *gains(row), *costs(row), configuration])
    note = score_note(metrics, rows)
    table = {
        "titles": titles,
        "rows": lines,
        "note": f"{note[0].upper()}{note[1:]}.",
        "line": f"{results.decision().sentence} {results.regret_line()}",
    }
    return table, rows, chosen


def _facts(header: Mapping[str, Any], records: Sequence[TrialRecord]) -> Iterator[tuple[str, str]]:
    """The study's settings and state, as (name, text)."""
    spec = header.get("spec") or {}
    yield "backbone", str(header.get("backbone") or (spec.get("model") or {}).get("name", ""))
    yield "data", f"{header.get('dataset')} (digest {str(header.get('dataset_digest'))[:12]})"
    if header.get("images_left_out"):
        yield "images left out", str(header["images_left_out"])
    layout = header.get("memory_layout")
    if layout is not None:
        yield "memory layout", "channels last" if layout["channels_last"] else "contiguous"
    lines = warm_start_sentences(header)
    if lines:
        yield "warm start", " ".join(line.strip() for line in lines).removeprefix("Warm start ")
    states = Counter(record.state for record in records)
    yield "trials", ", ".join(f"{count} {state}" for state, count in states.most_common()) or "none yet"
    again = sum(max(0, record.attempts - 1) for record in records)
    if again:
        yield "started again", f"{again} times, after faults or interruptions"
    yield "started", time.strftime("%Y-%m-%d %H:%M", time.localtime(header["first_started"]))
    if header.get("ended"):
        yield "ended", time.strftime("%Y-%m-%d %H:%M", time.localtime(header["ended"]))


def _pictures(
    rows: Sequence[Mapping[Any, Any]], results: Results, chosen: Mapping[str, Choice]
) -> Iterator[dict[str, Any]]:
    metrics = results.metrics
    records = results.records
    colour = figures.colours([row["label"] for row in rows])
    cost = functools.partial(figures.cost_and_score, rows, colour, metrics)
    scatter = functools.partial(figures.id_and_ood, rows, colour, metrics)
    training = functools.partial(figures.training, records, chosen, colour, metrics)
    rates = functools.partial(figures.learning_rates, records, chosen, metrics)
    pictures: list[tuple[str, str, Callable[[], Figure | None]]] = [
        ("In and out of distribution", "mean, 95 % interval", scatter),
        ("Cost and score", "mean, 95 % interval", cost),
        ("Training", "all runs of the chosen configurations", training),
        ("Learning rates", "search trials; ring: the chosen one", rates),
    ]
    for measurement in results.measurements.values():
        for name, curve in (measurement.get("curves") or {}).items():
            if name not in NUMBERS_ONLY:
                plot = functools.partial(figure_of, name, curve, metrics=metrics)
                pictures.append(("Measured", name.replace("_", " "), plot))
    for title, note, draw in pictures:
        try:
            figure = draw()
        except Exception as error:  # a picture that cannot be drawn must not cost the page
            logger.warning("The report is made without the picture %r (%s: %s)", title, type(error).__name__, error)
            continue
        if figure is not None:
            wide = figure.get_figwidth() > WIDE
            yield {"title": title, "note": note, "source": figures.data_uri(figure), "wide": wide}


def _errors(results: Results, header: Mapping[str, Any], similarities: Similarities | None) -> dict[str, Any]:
    try:
        return error_section(results, str(header.get("dataset_digest")), similarities)
    except Exception as error:  # files that cannot be read must not cost the page
        logger.warning("The report is made without its section on errors (%s: %s)", type(error).__name__, error)
        return nothing(f"The errors cannot be shown ({type(error).__name__}).")


def _trial(record: TrialRecord, metrics: TaskMetrics) -> list[str]:
    validation = validation_score(record, metrics)
    role = record.role if record.held_out is None else f"{record.role} ({record.held_out})"
    seconds = None if record.started is None or record.ended is None else record.ended - record.started
    return [
        str(record.number),
        record.label,
        role,
        record.state if record.reason is None else f"{record.state}: {record.reason}",
        "–" if validation is None else metrics.selection.number(validation),
        *(_tested(record, name, metrics) for name in (metrics.test, metrics.ood_mean)),
        str(record.unit),
        "–" if seconds is None else f"{seconds:.0f}",
        describe(record.hparams),
    ]


def _tested(record: TrialRecord, name: str, metrics: TaskMetrics) -> str:
    """Score on test images; a stopped trial usually has none."""
    score = record.metric(name)
    if score is not None:
        return metrics.selection.number(score)
    return "not evaluated" if record.state == "pruned" else "–"


def _failures(records: Sequence[TrialRecord]) -> list[tuple[str, str]]:
    """(trial, its error) of every failed trial, but those that their driver interrupted."""
    failed = [record for record in records if record.state == "failed" and not record.unfinished]
    return [(f"trial {r.number}, {r.label}: {r.reason}", redact(r.error or "no message")) for r in failed]


def _changes(header: Mapping[str, Any]) -> Iterator[str]:
    """Settings that earlier trials had, one sentence per change."""
    for change in header.get("changes") or ():
        for key, (was, now) in change["changed"].items():
            yield f"Changed before trial {change['before']}: {redact(str(Change(key, was, now, harmless=False)))}"


def _spec_text(spec: Mapping[str, Any]) -> str:
    return redact(yaml.safe_dump(dict(spec), sort_keys=False, allow_unicode=True))


@functools.cache
def _template() -> Template:
    environment = Environment(loader=FunctionLoader(_source), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html")


@functools.cache
def _source(name: str) -> str:
    return (files("orchestrator.report") / name).read_text(encoding="utf-8")
