"""Figures of a study, for its report and for notebooks, without matplotlib's global state or settings."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from orchestrator.record.records import TrialRecord, validation_score
from orchestrator.results.curve_plot import BLACK, BLUE, GREY, PALETTE, NotebookFigure
from orchestrator.results.fsr import FsrEstimate
from orchestrator.results.leaderboard import ENDS
from orchestrator.results.selection import Choice, reported_trials
from trainables.specs.metrics import CLASSIFICATION, TOTAL_SECONDS, TRAINABLE_PARAMETERS, Metric, TaskMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

Row = Mapping[Any, Any]

RATE_NAMES = {
    "lr_head": "head learning rate",
    "lr_backbone": "backbone learning rate",
    "lr_backbone_relative": "backbone learning rate × curvature",
}
RATES = tuple(RATE_NAMES)
"""Hyperparameters that are drawn; an entry has at most one of the backbone's."""
PANELS_PER_ROW = 4
MOST_NUMBERS = 20
"""Classes up to which the cells of a confusion matrix have their counts written in them."""
MOST_NAMES = 60
"""Classes up to which a confusion matrix has their names on its axes."""


def data_uri(figure: Figure) -> str:
    """A figure as the `src` of an `<img>`: SVG with letters as paths, so that it needs no fonts."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight", pad_inches=0.05)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue().encode()).decode()


def colours(labels: Sequence[str]) -> dict[str, str]:
    """Label → colour, the same in all figures."""
    return {label: PALETTE[index % len(PALETTE)] for index, label in enumerate(labels)}


def id_and_ood(rows: Sequence[Row], colour: Mapping[str, str], metrics: TaskMetrics = CLASSIFICATION) -> Figure | None:
    """Selection metric on ID test against its mean over the OOD domains, per entry, with 95 % intervals.

    None without two entries that have both.
    """
    names = (metrics.test, metrics.ood_mean)
    metric = metrics.selection
    points = [row for row in rows if all(math.isfinite(row[name]) for name in names)]
    if len(points) < 2:
        return None
    figure = _figure(5.4, 4.0)
    axes = figure.subplots()
    for row in points:
        x, y = (metric.scale * row[name] for name in names)
        x_sides, y_sides = (_sides(row, name, metric) for name in names)
        style: dict[str, Any] = {"fmt": "o", "markersize": 7, "linewidth": 1.2, "capsize": 2}
        axes.errorbar(x, y, xerr=x_sides, yerr=y_sides, color=colour[row["label"]], label=row["label"], **style)
    axes.set_xlabel(f"ID test {metric.axis}")
    axes.set_ylabel(f"mean OOD {metric.axis}")
    axes.margins(0.12)
    _legend(axes)
    _plain(axes)
    return figure


def intervals(rows: Sequence[Row], colour: Mapping[str, str], metrics: TaskMetrics = CLASSIFICATION) -> Figure | None:
    """Selection metric of every entry on ID test and over the OOD domains, best entry on top, with 95 % intervals.

    None without an entry that has an ID test score.
    """
    metric = metrics.selection
    entries = [row for row in rows if math.isfinite(row[metrics.test])]
    if not entries:
        return None
    titles = {metrics.test: "ID test", metrics.ood_mean: "mean OOD", metrics.ood_worst: "worst OOD domain"}
    present = [name for name in titles if any(math.isfinite(row[name]) for row in entries)]
    figure = _figure(1.6 + 2.6 * len(present), 0.9 + 0.36 * len(entries))
    panels = figure.subplots(1, len(present), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, present, strict=True):
        for position, row in enumerate(entries):
            if not math.isfinite(row[name]):
                continue
            style: dict[str, Any] = {"fmt": "o", "markersize": 6, "linewidth": 1.4, "capsize": 2}
            value = metric.scale * row[name]
            axes.errorbar(value, position, xerr=_sides(row, name, metric), color=colour[row["label"]], **style)
        axes.set_xlabel(f"{titles[name]} {metric.axis}", fontsize=8.5)
        _plain(axes)
    panels[0].set_yticks(range(len(entries)), [str(row["label"]) for row in entries], parse_math=False)
    panels[0].set_ylim(len(entries) - 0.5, -0.5)
    return figure


def shift_ratios(ratios: Sequence[FsrEstimate]) -> Figure | None:
    """FSR against every reference, with 95 % intervals; the line is FSR = 1. None where no FSR is determined."""
    known = [ratio for ratio in ratios if math.isfinite(ratio.value)]
    if not known:
        return None
    figure = _figure(5.4, 1.1 + 0.4 * len(known))
    axes = figure.subplots()
    end = max(value for ratio in known for value in (ratio.value, ratio.high) if math.isfinite(value))
    for position, ratio in enumerate(known):
        color = GREY if ratio.is_oracle else BLUE
        axes.plot([ratio.value], [position], "o", color=color, markersize=7)
        if math.isfinite(ratio.low):
            # An open interval reaches the edge of the picture.
            high = ratio.high if math.isfinite(ratio.high) else 2 * end
            axes.plot([ratio.low, high], [position, position], color=color, linewidth=1.4)
    axes.axvline(1.0, color=BLACK, linewidth=1.0, linestyle=":")
    axes.set_xlim(0, 1.1 * max(end, 1.0))
    axes.set_yticks(range(len(known)), [ratio.reference for ratio in known], parse_math=False)
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.set_xlabel("fine-tuning shift ratio")
    _plain(axes)
    return figure


def confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Confusion matrix: rows are labels, columns predictions; the colour is the share of the row.

    Args:
        counts: (K, K) images.
        classes: names, in that order.
    """
    number = len(classes)
    side = min(max(3.2, 0.42 * number), 12.0)
    figure = _figure(side + 1.4, side)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=7.5)
    bar.set_label("share of the label's images", fontsize=8.5)
    if number <= MOST_NUMBERS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else BLACK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7.5, color=color)
    if number <= MOST_NAMES:
        axes.set_xticks(range(number), list(classes), rotation=90, fontsize=7.5, parse_math=False)
        axes.set_yticks(range(number), list(classes), fontsize=7.5, parse_math=False)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    return figure


def cost_and_score(
    rows: Sequence[Row], colour: Mapping[str, str], metrics: TaskMetrics = CLASSIFICATION
) -> Figure | None:
    """Selection metric over what an entry's trial costs, with 95 % intervals; a panel per cost and kind of test data.

    Costs are the trained parameters and the seconds of a trial; test data are ID test and, below, the mean over the OOD
    domains. None where no panel has two entries.
    """
    scores = [(metrics.test, "ID test"), (metrics.ood_mean, "mean OOD")]
    costs = [(TRAINABLE_PARAMETERS.name, "trained parameters"), (TOTAL_SECONDS.name, "seconds of a trial")]
    panels: dict[tuple[str, str], list[Row]] = {}
    for name, _ in scores:
        for cost, _ in costs:
            points = [row for row in rows if math.isfinite(row[name]) and _positive(row.get(cost))]
            if len(points) > 1:
                panels[name, cost] = points
    scores = [(name, title) for name, title in scores if any(key[0] == name for key in panels)]
    costs = [(cost, title) for cost, title in costs if any(key[1] == cost for key in panels)]
    if not panels:
        return None
    figure = _figure(4.1 * len(costs) + 0.4, 3.1 * len(scores) + 0.2)
    figure.subplots_adjust(wspace=0.3, hspace=0.35)
    grid = figure.subplots(len(scores), len(costs), squeeze=False)
    for axes_row, (name, score_title) in zip(grid, scores, strict=True):
        for axes, (cost, cost_title) in zip(axes_row, costs, strict=True):
            _cost_panel(axes, panels.get((name, cost), []), name, cost, colour, metrics)
            axes.set_xlabel(cost_title, fontsize=9)
            axes.set_ylabel(f"{score_title} {metrics.selection.axis}", fontsize=9)
    _legend(grid[0][-1])
    return figure


def _cost_panel(
    axes: Axes, points: Sequence[Row], name: str, cost: str, colour: Mapping[str, str], metrics: TaskMetrics
) -> None:
    metric = metrics.selection
    if points:
        _log_axis(axes, "x", [float(row[cost]) for row in points])
    for row in points:
        style: dict[str, Any] = {"fmt": "o", "markersize": 7, "linewidth": 1.2, "capsize": 2}
        sides = _sides(row, name, metric)
        value = metric.scale * row[name]
        axes.errorbar(float(row[cost]), value, yerr=sides, color=colour[row["label"]], label=row["label"], **style)
    axes.margins(y=0.12)
    _plain(axes)


def _positive(value: Any) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def learning_rates(
    records: Sequence[TrialRecord], chosen: Mapping[str, Choice], metrics: TaskMetrics = CLASSIFICATION
) -> Figure | None:
    """Validation score over the searched learning rates, one panel per entry; a ring marks the chosen point.

    With both rates searched, a panel has the rates as its axes and the score as colour; with one, the score is an axis.
    None where no entry tried two rates.
    """
    tried = {label: _tried_rates(records, label, metrics) for label in chosen}
    panels = {label: rates for label, rates in tried.items() if rates is not None}
    if not panels:
        return None
    across = min(PANELS_PER_ROW, len(panels))
    down = math.ceil(len(panels) / across)
    figure = _figure(3.0 * across + 0.6, 2.9 * down)
    figure.subplots_adjust(wspace=0.45, hspace=0.6)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (label, rates) in zip(grid, panels.items(), strict=False):
        _rates_panel(axes, rates, chosen[label].record, metrics)
        axes.set_title(label, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def training(
    records: Sequence[TrialRecord],
    chosen: Mapping[str, Choice],
    colour: Mapping[str, str],
    metrics: TaskMetrics = CLASSIFICATION,
) -> Figure | None:
    """Validation score over the units of budget, of every run of each entry's chosen configuration.

    None where no run has two units.
    """
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for label, choice in chosen.items():
        runs = [_curve(record, metrics) for record in reported_trials(records, choice.record.config_hash)]
        curves[label] = [curve for curve in runs if curve]
    if not any(curves.values()):
        return None
    figure = _figure(5.4, 4.0)
    axes = figure.subplots()
    for label, runs in curves.items():
        for index, curve in enumerate(runs):
            name = "" if index else label
            axes.plot(*zip(*curve, strict=True), color=colour[label], linewidth=1.4, alpha=0.85, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("units of budget")
    axes.set_ylabel(f"validation {metrics.selection.axis}")
    _legend(axes)
    _plain(axes)
    return figure


@dataclass(frozen=True)
class _TriedRates:
    names: list[str]
    """Learning rates that differ between the trials: one or two."""
    trials: list[TrialRecord]
    scores: list[float]
    """Selection metric on validation, per trial."""


def _rates_panel(axes: Axes, rates: _TriedRates, chosen: TrialRecord, metrics: TaskMetrics) -> None:
    metric = metrics.selection
    scores = [metric.scale * score for score in rates.scores]
    x = [float(record.hparams[rates.names[0]]) for record in rates.trials]
    _log_axis(axes, "x", x)
    axes.set_xlabel(RATE_NAMES[rates.names[0]], fontsize=8.5)
    if len(rates.names) == 2:
        y = [float(record.hparams[rates.names[1]]) for record in rates.trials]
        _log_axis(axes, "y", y)
        axes.set_ylabel(RATE_NAMES[rates.names[1]], fontsize=8.5)
        points = axes.scatter(x, y, c=scores, cmap="viridis", s=46, edgecolors="white", linewidths=0.6)
        bar = axes.figure.colorbar(points, ax=axes, fraction=0.05, pad=0.03)
        bar.ax.tick_params(labelsize=7.5)
        bar.ax.set_title("val %" if metric.unit == "fraction" else "val", fontsize=7.5)
    else:
        y = scores
        axes.set_ylabel(f"validation {metric.axis}", fontsize=8.5)
        axes.scatter(x, y, color=PALETTE[8], s=40)
    if chosen in rates.trials:
        index = [record.number for record in rates.trials].index(chosen.number)
        axes.scatter([x[index]], [y[index]], s=150, facecolors="none", edgecolors=BLACK, linewidths=1.4)
    _plain(axes)


def _tried_rates(records: Sequence[TrialRecord], label: str, metrics: TaskMetrics) -> _TriedRates | None:
    """The entry's search trials with a score, and the rates that differ between them; None where no rate does."""
    searched = [r for r in records if r.label == label and r.role == "search"]
    scored = [(record, validation_score(record, metrics)) for record in searched]
    trials = [(r, score) for r, score in scored if score is not None and not _has_zero_rate(r)]
    names = [name for name in RATES if len({_rate(r, name) for r, _ in trials} - {None}) > 1]
    trials = [(r, score) for r, score in trials if all(_rate(r, name) is not None for name in names)]
    if not names or len(trials) < 2:
        return None
    return _TriedRates(names, [record for record, _ in trials], [score for _, score in trials])


def _has_zero_rate(record: TrialRecord) -> bool:
    """Whether a rate has no place on a logarithmic axis."""
    rates = (_rate(record, name) for name in RATES)
    return any(rate is not None and rate <= 0 for rate in rates)


def _rate(record: TrialRecord, name: str) -> float | None:
    value = record.hparams.get(name)
    return float(value) if isinstance(value, int | float) else None


def _curve(record: TrialRecord, metrics: TaskMetrics) -> list[tuple[float, float]]:
    """(unit, displayed validation score); empty for fewer than two units."""
    name = metrics.validation
    scale = metrics.selection.scale
    points = [(unit["unit"], scale * unit.get(name, math.nan)) for unit in record.history]
    points = [point for point in points if math.isfinite(point[1])]
    return points if len(points) > 1 else []


def _sides(row: Row, name: str, metric: Metric) -> list[list[float]] | None:
    """Lengths of an interval below and above its mean, as matplotlib takes them; None without an interval."""
    low, high = (float(row[f"{name}{suffix}"]) for suffix in ENDS)
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    return [[metric.scale * (row[name] - low)], [metric.scale * (high - row[name])]]


def _figure(width: float, height: float) -> Figure:
    return NotebookFigure(figsize=(width, height))


def _log_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Logarithmic axis over whole decades, so that it always has two tick labels."""
    low = math.floor(math.log10(min(values)) - 0.05)
    high = math.ceil(math.log10(max(values)) + 0.05)
    axes.set(**{f"{which}scale": "log", f"{which}lim": (10.0**low, 10.0**high)})
    getattr(axes, f"{which}axis").set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    legend = axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label may contain a $


def _plain(axes: Axes) -> None:
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=GREY, labelcolor=BLACK)
