"""The pictures of a report, as SVG. Neither matplotlib's global state nor its settings are changed."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.record.records import TrialRecord
from orchestrator.results.curve_plot import BLACK, GREY, PALETTE
from orchestrator.results.leaderboard import measured
from orchestrator.results.selection import Choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[Any, Any]

RATES = ("lr_head", "lr_backbone")
RATE_NAMES = {"lr_head": "head learning rate", "lr_backbone": "backbone learning rate"}
VAL = "best/val/acc"
PANELS_PER_ROW = 4


def data_uri(figure: Figure) -> str:
    """A figure as the `src` of an `<img>`: SVG whose letters are paths, so that it looks the same everywhere."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight", pad_inches=0.05)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue().encode()).decode()


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour per entry, the same in all pictures."""
    return {label: PALETTE[index % len(PALETTE)] for index, label in enumerate(labels)}


def id_and_ood(rows: Sequence[Row], colour: Mapping[str, str]) -> Figure | None:
    """ID test accuracy against mean OOD accuracy per entry, per cent, with 95 % intervals; None without two entries
    that have both."""
    points = [row for row in rows if all(math.isfinite(row[name]) for name in ("test/acc", "ood/mean/acc"))]
    if len(points) < 2:
        return None
    figure = _figure(5.4, 4.0)
    axes = figure.subplots()
    for row in points:
        x, y = 100 * row["test/acc"], 100 * row["ood/mean/acc"]
        half = [_half(row[f"{name}/ci95"]) for name in ("test/acc", "ood/mean/acc")]
        style: dict[str, Any] = {"fmt": "o", "markersize": 7, "linewidth": 1.2, "capsize": 2}
        axes.errorbar(x, y, xerr=half[0], yerr=half[1], color=colour[row["label"]], label=row["label"], **style)
    axes.set_xlabel("ID test accuracy (%)")
    axes.set_ylabel("mean OOD accuracy (%)")
    axes.margins(0.12)
    _legend(axes)
    _plain(axes)
    return figure


def learning_rates(records: Sequence[TrialRecord], chosen: Mapping[str, Choice]) -> Figure | None:
    """Validation accuracy over the learning rates that were tried, a panel per entry; the chosen point is ringed. None
    where no entry has tried two rates.

    With both rates searched, a panel has the rates as its axes and accuracy as colour; with one, accuracy is an axis.
    """
    panels = {label: tried for label in chosen if (tried := _tried(records, label)) is not None}
    if not panels:
        return None
    across = min(PANELS_PER_ROW, len(panels))
    down = math.ceil(len(panels) / across)
    figure = _figure(3.0 * across + 0.6, 2.9 * down)
    figure.subplots_adjust(wspace=0.45, hspace=0.6)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (label, (rates, trials)) in zip(grid, panels.items(), strict=False):
        _rates_panel(axes, rates, trials, chosen[label].record)
        axes.set_title(label, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


def training(records: Sequence[TrialRecord], chosen: Mapping[str, Choice], colour: Mapping[str, str]) -> Figure | None:
    """Validation accuracy over the units of budget, of every run of each entry's chosen configuration; None where none
    has two units."""
    curves = {
        label: [curve for record in measured(records, choice.record.config_hash) if (curve := _curve(record))]
        for label, choice in chosen.items()
    }
    curves = {label: found for label, found in curves.items() if found}
    if not curves:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = _figure(5.4, 4.0)
    axes = figure.subplots()
    for label, found in curves.items():
        for index, curve in enumerate(found):
            name = "" if index else label
            axes.plot(*zip(*curve, strict=True), color=colour[label], linewidth=1.4, alpha=0.85, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("units of budget")
    axes.set_ylabel("validation accuracy (%)")
    _legend(axes)
    _plain(axes)
    return figure


def _rates_panel(axes: Axes, rates: Sequence[str], trials: Sequence[TrialRecord], chosen: TrialRecord) -> None:
    accuracy = [100 * (record.metric(VAL) or 0.0) for record in trials]
    x = [float(record.hparams[rates[0]]) for record in trials]
    at = [record.number for record in trials].index(chosen.number) if chosen in trials else None
    _log_axis(axes, "x", x)
    axes.set_xlabel(RATE_NAMES[rates[0]], fontsize=8.5)
    if len(rates) == 2:
        y = [float(record.hparams[rates[1]]) for record in trials]
        _log_axis(axes, "y", y)
        axes.set_ylabel(RATE_NAMES[rates[1]], fontsize=8.5)
        shown = axes.scatter(x, y, c=accuracy, cmap="viridis", s=46, edgecolors="white", linewidths=0.6)
        bar = axes.figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.03)
        bar.ax.tick_params(labelsize=7.5)
        bar.ax.set_title("val %", fontsize=7.5)
    else:
        y = accuracy
        axes.set_ylabel("validation accuracy (%)", fontsize=8.5)
        axes.scatter(x, y, color=PALETTE[8], s=40)
    if at is not None:
        axes.scatter([x[at]], [y[at]], s=150, facecolors="none", edgecolors=BLACK, linewidths=1.4)
    _plain(axes)


def _tried(records: Sequence[TrialRecord], label: str) -> tuple[list[str], list[TrialRecord]] | None:
    """(rates that differ between the entry's search trials, those trials); None where there are none."""
    mine = [r for r in records if r.label == label and r.role == "search" and r.metric(VAL) is not None]
    mine = [r for r in mine if all((rate := _rate(r, name)) is None or rate > 0 for name in RATES)]
    rates = [name for name in RATES if len({_rate(r, name) for r in mine} - {None}) > 1]
    mine = [r for r in mine if all(_rate(r, name) is not None for name in rates)]
    return (rates, mine) if rates and len(mine) > 1 else None


def _rate(record: TrialRecord, name: str) -> float | None:
    value = record.hparams.get(name)
    return float(value) if isinstance(value, int | float) else None


def _curve(record: TrialRecord) -> list[tuple[float, float]]:
    found = [
        (unit["unit"], 100 * unit["val/acc"]) for unit in record.history if math.isfinite(unit.get("val/acc", math.nan))
    ]
    return found if len(found) > 1 else []


def _half(value: float) -> float | None:
    return 100 * value if math.isfinite(value) else None


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _log_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Whole decades, so that an axis always has two numbers on it."""
    from matplotlib.ticker import NullFormatter

    low, high = math.floor(math.log10(min(values)) - 0.05), math.ceil(math.log10(max(values)) + 0.05)
    axes.set(**{f"{which}scale": "log", f"{which}lim": (10.0**low, 10.0**high)})
    getattr(axes, f"{which}axis").set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    legend = axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a $


def _plain(axes: Axes) -> None:
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=GREY, labelcolor=BLACK)
