"""Leaderboard: one row per entry of the study.

With its chosen configuration and that one's numbers over fresh seeds. As a data frame, on a terminal, in Markdown, and
as plain JSON values. Pure functions on records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.table import Table

from orchestrator.record.records import TrialRecord
from orchestrator.results.comparison import Competitor, Score, competitor
from orchestrator.results.predictions import SampleTables
from orchestrator.results.robustness import Robustness, robustness
from orchestrator.results.selection import Choice, per_label, without_validation_domain
from trainables.specs.metrics import (
    CLASSIFICATION,
    GAIN,
    GAIN_OOD,
    MEAN_CORRUPTION_ERROR,
    NORMALISED_MCE,
    PARAMETERS,
    PEAK_GPU_BYTES,
    PEAK_HOST_BYTES,
    PROBE_C,
    PROBE_C_HIGH,
    PROBE_C_LOW,
    PROBE_PATH,
    PROBE_WITHIN_SE,
    RELATIVE_MCE,
    TEST,
    TOTAL_SECONDS,
    TRAINABLE_PARAMETERS,
    UNIT_SECONDS,
    Metric,
    TaskMetrics,
)

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL = "/ci95"
"""Suffix of the columns with the longer side of a metric's 95 % interval."""
ENDS = ("/low", "/high")
"""Suffixes of the columns with the ends of the interval, which may be asymmetric."""
SAMPLES = "/n"
"""Suffix of the columns with the number of samples that a metric is measured on; 0 = not known."""
BASIS = "/interval"
"""Suffix of the columns with what the interval is over: `samples and seeds`, `samples`, `seeds` or `none`."""
TRAINED_SHARE = "trained_share"
"""Column of the share of the network's parameters that are trained."""
DEVICE_HOURS = "device_hours"
"""Column of the hours that all trials of an entry together held their device."""
COSTS = (TRAINABLE_PARAMETERS.name, TRAINED_SHARE, PEAK_HOST_BYTES.name, PEAK_GPU_BYTES.name, TOTAL_SECONDS.name,
         DEVICE_HOURS)  # fmt: skip
"""Columns of what an entry costs; NaN where it was not recorded."""
COST_TITLES = ("trained parameters", "share", "host memory", "GPU memory", "seconds", "device-hours")
GAINS = (GAIN.name, GAIN_OOD.name)
"""Columns of the relative gain over linear probing, on ID test and on OOD."""
PROBE_CHOICE = (PROBE_C.name, PROBE_C_LOW.name, PROBE_C_HIGH.name, PROBE_WITHIN_SE.name, PROBE_PATH.name)
"""Columns of what a closed-form probe chose on validation and how flat the curve was; NaN where nothing was solved."""
PROBE = "linear_probe"
"""The strategy that gains are measured from."""


def reported_metrics(metrics: TaskMetrics) -> dict[str, Metric]:
    """Recorded name → metric, of the leaderboard's columns with intervals.

    Example:
        >>> list(reported_metrics(CLASSIFICATION))
        ['test/acc', 'ood/mean/acc', 'ood/worst/acc', 'calib/ece']
    """
    selection = dict.fromkeys((metrics.test, metrics.ood_mean, metrics.ood_worst), metrics.selection)
    return selection | {metric.on(TEST): metric for metric in metrics.leaderboard}


def summary_names(metrics: TaskMetrics) -> list[str]:
    """The leaderboard's columns that are metrics of the study's own run.

    Example:
        >>> summary_names(CLASSIFICATION)
        ['val/acc', 'test/acc', 'ood/mean/acc', 'ood/worst/acc', 'calib/ece', 'gain', 'gain/ood']
    """
    return [metrics.validation, *reported_metrics(metrics), *GAINS]


def leaderboard(
    records: Sequence[TrialRecord],
    rule: str = "id_val",
    metrics: TaskMetrics = CLASSIFICATION,
    tables: SampleTables | None = None,
    devices: float = 1.0,
) -> pd.DataFrame:
    """One row per label, best first.

    By the criterion of its chosen configuration; confirmed ones before the others. Labels without a complete trial come
    last, with NaN. Where a linear probe is among the labels, `gain` and `gain/ood` are the relative gains over it (see
    `relative_gain`) of the means on ID test and over the OOD domains.

    Columns: `label, strategy, rule, criterion` (value that the rule ranked by)`, number, config_hash, hparams, seeds`
    (how many trials the numbers are a mean of)`, confirmed` (False: only the search trial)`, val/acc`, then of each of
    `reported_metrics` the mean, the longer side `/ci95` and the ends `/low` and `/high` of its interval, the number of
    samples `/n`, and what the interval is over, `/interval`; the `PROBE_CHOICE`; the `COSTS`; and `trials, complete,
    pruned, failed` of the search. Metric names are those of the task; here of classification.

    Where confirmed trials were measured under corruptions, `robust/mce` with the same suffixes, `robust/mce_over_probe`
    and `robust/relative_mce` (`orchestrator.results.robustness`) stand before the `PROBE_CHOICE`.

    Costs are means over the trials that the numbers are of; `device_hours` is the sum over all trials of the label.

    Under `val_domain:<name>` that domain counts as validation: OOD mean and worst are those of the others.

    Args:
        tables: per-sample results; None = there are none, and intervals are over seeds alone.
        devices: share of a device that one trial holds: GPUs, or 1 for the CPUs of a trial without one.

    Raises:
        ValueError: no complete search trial, or the rule lacks what it needs.

    Example:
        >>> from orchestrator.record.records import TrialRecord
        >>> trial = TrialRecord(trial_id="t", number=0, strategy="full", label="full", state="complete",
        ...                     config_hash="h", metrics={"best/val/acc": 0.9, "test/acc": 0.8})
        >>> leaderboard([trial])[["label", "val/acc", "test/acc", "seeds"]].to_dict("records")
        [{'label': 'full', 'val/acc': 0.9, 'test/acc': 0.8, 'seeds': 1}]
    """
    records = without_validation_domain(records, rule, metrics)
    tables = tables or SampleTables()
    chosen = per_label(records, rule, metrics)
    unranked = [label for label in dict.fromkeys(r.label for r in records) if label not in chosen]
    rows = []
    entries = {label: competitor(records, choice, metrics, tables) for label, choice in chosen.items()}
    measured = {row.label: row for row in robustness(list(entries.values()))}
    for label in [*chosen, *unranked]:
        choice = chosen.get(label)
        entry = entries.get(label)
        searched = [r for r in records if r.label == label and r.role == "search"]
        row = _identity(label, next(r.strategy for r in records if r.label == label), rule, choice, entry)
        row |= _scores(entry, metrics)
        if measured:
            row |= _robustness(measured.get(label))
        row |= probe_choice(choice.record if choice else None)
        row |= _costs(entry, [r for r in records if r.label == label], devices)
        row["trials"] = len(searched)
        for state in ("complete", "pruned", "failed"):
            row[state] = sum(r.state == state for r in searched)
        rows.append(row)
    probe = next((row for row in rows if row["strategy"] == PROBE and row["seeds"]), None)
    if probe is not None:
        for row in rows:
            for gain, name in zip(GAINS, (metrics.test, metrics.ood_mean), strict=True):
                row[gain] = relative_gain(row[name], probe[name], metrics.selection)
    return pd.DataFrame(rows)


def relative_gain(value: float, probe: float, metric: Metric = CLASSIFICATION.selection) -> float:
    """Improvement over the score of linear probing, relative to it.

    (value − probe) / probe for an accuracy, after Odonnat et al. (2026), Fig. 2. Positive values are improvements,
    whatever the metric's direction. NaN where the probe's value is 0 or either is NaN.

    Example:
        >>> relative_gain(0.75, 0.5)
        0.5
    """
    return metric.score(value - probe) / abs(probe) if probe else math.nan


def _identity(label: str, strategy: str, rule: str, choice: Choice | None, entry: Competitor | None) -> dict[str, Any]:
    return {
        "label": label,
        "strategy": strategy,
        "rule": rule,
        "criterion": choice.value if choice else math.nan,
        "number": choice.record.number if choice else -1,
        "config_hash": choice.record.config_hash if choice else "",
        "hparams": dict(choice.record.hparams) if choice else {},
        "seeds": len(entry.runs) if entry else 0,
        "confirmed": bool(choice and choice.seeds),
    }


def _scores(entry: Competitor | None, metrics: TaskMetrics) -> dict[str, Any]:
    """Validation, and the columns of each of `reported_metrics`."""
    validation = entry.score(metrics.best_validation) if entry else None
    if validation is None and entry is not None:
        value = entry.chosen.metric(metrics.best_validation)
        validation = None if value is None else Score(value)
    columns: dict[str, Any] = {metrics.validation: validation.mean if validation else math.nan}
    for name in reported_metrics(metrics):
        score = (entry.score(name) if entry else None) or Score(math.nan)
        columns[name] = score.mean
        columns[f"{name}{INTERVAL}"] = score.half
        for suffix, end in zip(ENDS, (score.low, score.high), strict=True):
            columns[f"{name}{suffix}"] = end
        columns[f"{name}{SAMPLES}"] = score.samples or 0
        columns[f"{name}{BASIS}"] = score.basis
    return columns


def _robustness(measured: Robustness | None) -> dict[str, Any]:
    """The columns of errors under corruptions."""
    score = Score(math.nan) if measured is None else measured.mce
    name = MEAN_CORRUPTION_ERROR.name
    return {
        name: score.mean,
        f"{name}{INTERVAL}": score.half,
        f"{name}{ENDS[0]}": score.low,
        f"{name}{ENDS[1]}": score.high,
        f"{name}{SAMPLES}": score.samples or 0,
        f"{name}{BASIS}": score.basis,
        NORMALISED_MCE.name: math.nan if measured is None else measured.normalised_mce,
        RELATIVE_MCE.name: math.nan if measured is None else measured.relative_mce,
    }


def probe_choice(record: TrialRecord | None) -> dict[str, float]:
    """What a trial's closed-form probe chose, by `PROBE_CHOICE`."""
    values = {name: record.metric(name) if record else None for name in PROBE_CHOICE}
    return {name: math.nan if value is None else value for name, value in values.items()}


def probe_text(row: Row) -> str:
    """What a closed-form probe chose and how flat the curve was; empty where nothing was solved.

    Example:
        >>> probe_text(dict(zip(PROBE_CHOICE, (0.0231, 0.003, 10.0, 40.0, 100.0), strict=True)))
        'C=0.0231 (40 of 100 values, 0.003 to 10, within one SE of the best on validation)'
    """
    C, low, high, within, path = (float(row.get(name, math.nan)) for name in PROBE_CHOICE)
    if math.isnan(C):
        return ""
    if math.isnan(path):  # one given value, or a study of an earlier version
        return f"C={C:.3g}"
    return (
        f"C={C:.3g} ({within:.0f} of {path:.0f} values, {low:.3g} to {high:.3g}, within one SE of the best on "
        "validation)"
    )


def configuration(row: Row) -> str:
    """Hyperparameters of a row, and what its closed-form probe chose."""
    hparams = describe(row["hparams"])
    probe = "" if "C" in row["hparams"] else probe_text(row)
    if not probe:
        return hparams
    return f"{hparams} {probe}" if row["hparams"] else probe


def _costs(entry: Competitor | None, trials: Sequence[TrialRecord], devices: float) -> dict[str, Any]:
    """Means over the reported trials, and the device-hours of all trials of the label."""

    def mean(name: str) -> float:
        values = [run.metric(name) for run in entry.runs] if entry else []
        present = [value for value in values if value is not None]
        return math.fsum(present) / len(present) if present else math.nan

    trained = mean(TRAINABLE_PARAMETERS.name)
    seconds = [trial_seconds(trial) for trial in trials]
    return {
        TRAINABLE_PARAMETERS.name: trained,
        TRAINED_SHARE: trained / mean(PARAMETERS.name),
        PEAK_HOST_BYTES.name: mean(PEAK_HOST_BYTES.name),
        PEAK_GPU_BYTES.name: mean(PEAK_GPU_BYTES.name),
        TOTAL_SECONDS.name: mean(TOTAL_SECONDS.name),
        DEVICE_HOURS: devices * math.fsum(seconds) / 3600,
    }


def trial_seconds(trial: TrialRecord) -> float:
    """Seconds inside a trial's units.

    Of a trial that did not end, the sum of those that it reported.
    """
    total = trial.metric(TOTAL_SECONDS.name)
    if total is not None:
        return total
    units = [unit.get(UNIT_SECONDS.name, 0.0) for unit in trial.history]
    return math.fsum(seconds for seconds in units if math.isfinite(seconds))


Row = Mapping[Any, Any]
"""One row of `leaderboard`."""

COUNT_TITLE = "seeds × n"
GAIN_TITLES = ("gain", "gain OOD")
UNBOUNDED = 10_000
"""Terminal width that no table needs, in columns."""
STRATEGY_WIDTH = 8
"""Least width of the column with the labels, which are folded where they are longer."""
WIDE = 100
"""Terminal width, in columns, from which on the gains are columns of the table."""


def score_titles(metrics: TaskMetrics) -> list[str]:
    """Headings of the columns with scores, in the order of `cells`.

    Example:
        >>> score_titles(CLASSIFICATION)
        ['val', 'test', 'OOD mean', 'OOD worst', 'ECE']
    """
    titles = ["val", "test", "OOD mean", "OOD worst"]
    columns = [metrics.selection] * len(titles) + list(metrics.leaderboard)
    titles += [metric.heading or metric.title for metric in metrics.leaderboard]
    # A unit that all have is stated once, by `score_note`; a count has none.
    if len({metric.unit for metric in columns} - {"count"}) == 1:
        return titles
    units = [{"fraction": "%", "count": ""}.get(metric.unit, metric.unit) for metric in columns]
    return [f"{title} ({unit})" if unit else title for title, unit in zip(titles, units, strict=True)]


def score_note(metrics: TaskMetrics, rows: Sequence[Row] = ()) -> str:
    """Caption of a table of scores.

    The unit that all of them share, their meaning, and what the intervals are over.
    """
    units = {metric.unit for metric in (metrics.selection, *metrics.leaderboard)} - {"count"}
    shared = units.pop() if len(units) == 1 else ""
    name = "per cent" if shared == "fraction" else shared
    unit = f"{name}; " if name else ""
    meaning = "mean over fresh seeds (one seed that was not confirmed: the search trial) ± 95 % interval"
    return f"{unit}{meaning}{_bases(metrics, rows)}"


def _bases(metrics: TaskMetrics, rows: Sequence[Row]) -> str:
    """Clauses on what the intervals of each column are over.

    And on the numbers of samples.
    """
    titles = dict(zip(reported_metrics(metrics), score_titles(metrics)[1:], strict=True))
    over: dict[str, list[str]] = {}
    sizes: dict[int, list[str]] = {}
    for name, title in titles.items():
        for basis in dict.fromkeys(row[f"{name}{BASIS}"] for row in rows if row["seeds"]):
            over.setdefault(basis, []).append(title)
        for size in dict.fromkeys(row[f"{name}{SAMPLES}"] for row in rows if row[f"{name}{SAMPLES}"]):
            sizes.setdefault(size, []).append(title)
    parts = [f"over {basis}: {', '.join(columns)}" for basis, columns in over.items() if basis != "none"]
    parts += [f"n = {size:,}: {', '.join(columns)}" for size, columns in sizes.items()]
    return "".join(f"; {part}" for part in parts)


def markdown_table(rows: Sequence[Row], metrics: TaskMetrics = CLASSIFICATION) -> list[str]:
    """The leaderboard's lines in Markdown."""
    gain_titles = GAIN_TITLES if has_gains(rows) else ()
    scores = [*score_titles(metrics), *robustness_titles(rows)]
    titles = ["strategy", "hyperparameters", COUNT_TITLE, *scores, *gain_titles, *COST_TITLES]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        numbers = [*cells(row, metrics), *robustness_cells(row), *gains(row), *costs(row)]
        lines.append("| " + " | ".join(numbers) + " |")
    return lines


def html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML, for a notebook; all texts are escaped.

    Example:
        >>> html_table(["entry"], [["<full>"]])
        '<table><thead><tr><th>entry</th></tr></thead><tbody><tr><td>&lt;full&gt;</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def print_table(console: Console, rows: Sequence[Row], metrics: TaskMetrics = CLASSIFICATION) -> None:
    """Print the leaderboard, the costs, and the configuration of each row below it."""
    wide = has_gains(rows) and console.width >= WIDE
    table = _terminal_table(rows, metrics, wide)
    further = list(metrics.leaderboard)
    # Measured on a console that is wide enough: on a narrow one a table never needs more than its width.
    needed = console.measure(table, options=console.options.update(width=UNBOUNDED)).maximum
    whole = len(further) < 2 or needed <= console.width
    if not whole:
        table = _terminal_table(rows, metrics, wide, columns=-len(further))
    table.caption = score_note(metrics, rows)
    if wide:
        table.caption += f"; gain = {metrics.selection.title} relative to linear probing's"
    console.print(table)
    _print_costs(console, rows)
    for row in rows:
        if row["seeds"]:
            parts = [f"trial {row['number']}", configuration(row)]
            if not whole:
                named = zip(further, cells(row, metrics)[-len(further) :], strict=True)
                parts[1:1] = [f"{metric.heading or metric.title} {text}" for metric, text in named]
            if has_gains(rows) and not wide and row["strategy"] != PROBE:
                texts = zip(gains(row), ("", " OOD"), strict=True)
                parts.insert(1, "gain " + ", ".join(f"{text}{split}" for text, split in texts if text != "-"))
            console.print(f"{row['label']}: {', '.join(parts)}", markup=False, highlight=False)


def _terminal_table(rows: Sequence[Row], metrics: TaskMetrics, gained: bool, columns: int | None = None) -> Table:
    """The leaderboard for a terminal.

    Args:
        gained: whether the gains are columns.
        columns: number of columns of scores, negative = less than all; None = all.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("strategy", style="bold", overflow="fold", min_width=STRATEGY_WIDTH)
    scores = score_titles(metrics)[:columns]
    for title in (COUNT_TITLE, *scores, *robustness_titles(rows), *(GAIN_TITLES if gained else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        label, _, count, *texts = cells(row, metrics)
        table.add_row(label, count, *texts[:columns], *robustness_cells(row), *(gains(row) if gained else ()))
    return table


def _print_costs(console: Console, rows: Sequence[Row]) -> None:
    """Print what each entry costs.

    Columns that no entry has a number for are left out.
    """
    texts = [costs(row) for row in rows]
    present = [index for index in range(len(COST_TITLES)) if any(line[index] != "-" for line in texts)]
    if not present:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("cost", style="bold", overflow="fold")
    for index in present:
        table.add_column(COST_TITLES[index], justify="right")
    for row, line in zip(rows, texts, strict=True):
        table.add_row(str(row["label"]), *(line[index] for index in present))
    console.print(table)


def costs(row: Row) -> list[str]:
    """What an entry costs, as text in the order of `COST_TITLES`.

    "-" where it was not recorded.

    Example:
        >>> costs({"cost/trainable_parameters": 84000.0, "trained_share": 0.0038, "cost/peak_host_bytes": 1.2e9,
        ...        "cost/peak_gpu_bytes": math.nan, "cost/total_seconds": 35.2, "device_hours": 0.25})
        ['84.0 k', '0.38 %', '1.2 GB', '-', '35', '0.25']
    """
    trained, share, host, gpu, seconds, hours = (float(row[name]) for name in COSTS)
    texts = [_size(trained), f"{_two_digits(100 * share)} %", f"{_size(host)}B", f"{_size(gpu)}B", f"{seconds:,.0f}"]
    shown = [*texts, _two_digits(hours)]
    # A sum is never missing: no hours means that no unit was recorded.
    numbers = (trained, share, host, gpu, seconds, hours or math.nan)
    return [text if math.isfinite(number) else "-" for text, number in zip(shown, numbers, strict=True)]


def _size(number: float) -> str:
    """A number with a decimal prefix and three digits: `84.0 k`, `1.2 G`."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f} {prefix}"
    return f"{number:.0f} "


def _two_digits(number: float) -> str:
    """A number with two significant digits, and without an exponent.

    Example:
        >>> _two_digits(0.384), _two_digits(0.00002), _two_digits(100.0), _two_digits(1234.0)
        ('0.38', '0.00002', '100', '1,234')
    """
    if not number or not math.isfinite(number) or number >= 10:
        return f"{number:,.0f}"
    decimals = 1 - math.floor(math.log10(number))
    return f"{number:.{decimals}f}".rstrip("0").rstrip(".")


def has_gains(rows: Sequence[Row]) -> bool:
    """Whether the study has a linear probe to compare with."""
    return bool(rows) and all(name in rows[0] for name in GAINS)


def robustness_titles(rows: Sequence[Row]) -> tuple[str, ...]:
    """Heading of the column with mCE; none where nothing was measured under corruptions."""
    return ("mCE",) if rows and MEAN_CORRUPTION_ERROR.name in rows[0] else ()


def robustness_cells(row: Row) -> list[str]:
    """mCE in per cent with its interval, as text; empty where nothing was measured under corruptions.

    Example:
        >>> robustness_cells({"robust/mce": 34.21, "robust/mce/ci95": 1.52}), robustness_cells({})
        (['34.2 ± 1.5'], [])
    """
    if MEAN_CORRUPTION_ERROR.name not in row:
        return []
    mean, half = float(row[MEAN_CORRUPTION_ERROR.name]), float(row[f"{MEAN_CORRUPTION_ERROR.name}{INTERVAL}"])
    if math.isnan(mean):
        return ["-"]
    return [f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"]


def gains(row: Row) -> list[str]:
    """Relative gains over linear probing in per cent, as text.

    Empty where the study has no linear probe.
    """
    values = [float(row[name]) for name in GAINS if name in row]
    return ["-" if math.isnan(value) else f"{100 * value:+.1f} %" for value in values]


def cells(row: Row, metrics: TaskMetrics = CLASSIFICATION) -> list[str]:
    """Label, hyperparameters, counts and scores of a row as text.

    "-" where there is no number.
    """
    scores = [_number(row[metrics.validation], math.nan, metrics.selection)]
    for name, metric in reported_metrics(metrics).items():
        scores.append(_number(row[name], row[f"{name}{INTERVAL}"], metric))
    return [str(row["label"]), configuration(row), counts(row, metrics), *scores]


def counts(row: Row, metrics: TaskMetrics = CLASSIFICATION) -> str:
    """Seeds and ID test samples behind a row: `3 × 360`.

    The seeds alone where the samples are not known.
    """
    samples = row[f"{metrics.test}{SAMPLES}"]
    return f"{row['seeds']} × {samples:,}" if samples else str(row["seeds"])


def describe(hparams: Mapping[str, Any]) -> str:
    """Hyperparameters on one line, numbers with three significant digits.

    Example:
        >>> describe({"lr_head": 0.01234, "optimizer": "sgd", "preset": None})
        'lr_head=0.0123 optimizer=sgd'
    """
    texts = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in hparams.items() if v is not None}
    return " ".join(f"{key}={value}" for key, value in texts.items()) or "-"


def choice_values(choice: Choice) -> dict[str, Any]:
    """A chosen configuration as plain values."""
    record = choice.record
    fields = ("number", "label", "strategy", "config_hash", "seed", "trial_id")
    return {name: getattr(record, name) for name in fields} | {
        "rule": choice.rule,
        "oracle": choice.oracle,
        "criterion": choice.criterion,
        "value": choice.value,
        "hparams": dict(record.hparams),
    }


def finite(value: Any) -> Any:
    """JSON values: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(mean: float, half: float, metric: Metric) -> str:
    return metric.number(mean, half) if math.isfinite(mean) else "-"
