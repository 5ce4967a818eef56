"""Pictures of curves with matplotlib, without its global state or settings: safe from any thread."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from trainables.specs.metrics import CLASSIFICATION, OOD_MEAN, OOD_WORST, TEST, VAL, TaskMetrics, ood_domain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Columns = Mapping[str, Sequence[Any]]

FLAGS = frozenset({"absolute", "within_one_se"})
"""Columns that qualify a row; they are not drawn."""
MAX_TICKS = 36
"""Names on an axis; with more, only every second, third … is written."""
X_AXES = {"lambda": "λ", "alpha": "α", "quantile": "share of the images below", "images": "training images"}
"""Axis titles of x columns, where they differ from the column's name."""
LOG_X = frozenset({"C"})
"""x columns on a logarithmic axis."""
DISTANCE_AXES = {"cosine": "cosine similarity", "l2": "L2 distance"}
"""Axis titles of the measures of feature distortion, which are no metrics of a task."""
CURVE_AXES = {
    "linear_probe": "negative log-likelihood",
    "ln_shift": "shift (L2 norm)",
    "bn_shift": "shift (L2 norm)",
    "plasticity": "rate of change P",
    "plasticity_distribution": "rate of change P",
    "change": "relative change",
    "change_by_stage": "relative change",
    "cka": "linear CKA",
    "layernorm_lambda": "λ",
    "fsr": "LayerNorm shift (L2 norm)",
}
"""y axis titles of the curves whose columns are not named `<split>/<measure>`."""
BOX = ("q05", "q25", "q50", "q75", "q95")
"""Columns that are drawn together as one box per row."""
PALETTE = ("#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#332288", "#DDCC77", "#117733", "#4477AA", "#EE6677")
"""Colours that are distinguishable with colour vision deficiency (Tol's bright and muted schemes)."""
BLACK = "#222222"
BLUE = "#4477AA"
RED = "#EE6677"
GREY = "#666666"
STYLES: Mapping[str, dict[str, Any]] = {
    VAL: {"color": BLACK, "linewidth": 2.0},
    TEST: {"color": BLUE, "linewidth": 2.0},
    OOD_MEAN: {"color": RED, "linewidth": 2.0},
    OOD_WORST: {"color": RED, "linewidth": 1.2, "linestyle": (0, (4, 2))},
}
"""Styles of the splits that every sweep has, the same in all pictures."""


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot, whose global state nothing here uses."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
        return out.getvalue()


def draw(
    name: str, curve: Mapping[str, Any], chosen: float | None = None, metrics: TaskMetrics = CLASSIFICATION
) -> bytes:
    """A curve as a PNG (arguments and errors: see `figure_of`)."""
    out = io.BytesIO()
    # Without matplotlib's version, so that equal pictures are equal bytes.
    figure_of(name, curve, chosen, metrics).savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def figure_of(
    name: str, curve: Mapping[str, Any], chosen: float | None = None, metrics: TaskMetrics = CLASSIFICATION
) -> Figure:
    """A curve as a figure, one panel per measure.

    Lines over numbers, dots or boxes over names. Fractions, such as accuracies, are drawn in per cent.

    Args:
        name: the curve's, for the title.
        curve: `columns` (the first is the x axis) and `note`.
        chosen: x of the point that the trial chose; it is marked.
        metrics: of the study's task, for titles and units.

    Raises:
        ValueError: no column can be drawn.
    """
    columns: Columns = curve["columns"]
    x_name, x = next(iter(columns.items()))
    panels = _panels(columns, metrics)
    if not panels:
        raise ValueError(f"A curve needs a column of numbers beside its x axis {x_name!r}, but got {list(columns)}.")
    named = any(isinstance(value, str) for value in x)
    names = without_shared_path([str(value) for value in x]) if named else []
    note = textwrap.wrap(str(curve.get("note") or ""), 110)
    page = _Page(panels, names, len(note))
    # Not by `pyplot`, whose global state is not safe between threads.
    figure = NotebookFigure(figsize=(page.width, page.height), dpi=100)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=page.rows)[:, 0]
    figure.subplots_adjust(*page.margins, hspace=0.12)
    for axes, panel in zip(rows, panels, strict=True):
        _draw_panel(axes, x, panel, _groups(columns, x_name))
        axes.set_ylabel(panel.title or CURVE_AXES.get(name, ""), fontsize=9)
        if chosen is not None and not named:
            axes.axvline(chosen, color=BLACK, linewidth=1.0, linestyle=":", zorder=1)
    if x_name in LOG_X:
        rows[-1].set_xscale("log")
    if chosen is not None and not named:
        rows[0].set_title(f"{X_AXES.get(x_name, x_name)} = {chosen:.3g} chosen", loc="right", fontsize=9, color=GREY)
    rows[0].set_title(name.replace("_", " "), loc="left", fontsize=10, fontweight="bold")
    rows[-1].set_xlabel(X_AXES.get(x_name, x_name), fontsize=9)
    if named:
        _name_ticks(rows[-1], names)
    figure.text(0.01, 0.06 / page.height, "\n".join(note), fontsize=7.5, color=GREY, va="bottom")
    return figure


@dataclass(frozen=True)
class _Panel:
    """Columns that share a y axis."""

    title: str
    """Of the y axis; empty = the curve's own."""
    scale: float
    """Factor from the columns' values to those of the axis."""
    series: dict[str, list[float]]
    """Name in the legend → values; NaN = a gap."""


class _Page:
    """Page layout, in inches.

    Not one of matplotlib's own layouts, which measure every text twice: half the time of a picture.

    Args:
        panels: see `_panels`.
        names: of the x axis; empty = a numeric axis.
        note: lines below the picture.
    """

    def __init__(self, panels: Sequence[_Panel], names: Sequence[str], note: int) -> None:
        self.rows = [2.6, *[1.6] * (len(panels) - 1)]
        self.width = min(7.8 + 0.09 * max(0, len(names) - 12), 11.0)
        letters = max(len(name) for panel in panels for name in panel.series)
        bottom = 0.55 + 0.13 * note
        if _vertical(names):
            bottom += 0.054 * _longest(names)
        self.height = 0.35 + sum(self.rows) + bottom
        right = 1 - min(0.55 + 0.075 * max(letters, 8), 2.2) / self.width
        self.margins = (0.8 / self.width, bottom / self.height, right, 1 - 0.35 / self.height)
        """Left, bottom, right and top of the panels, as shares of the page."""


def _panels(columns: Columns, metrics: TaskMetrics) -> list[_Panel]:
    """The columns of numbers, one panel per measure; None and strings become gaps.

    A column named `<split>/<key>` (or `<key>`) of a metric or distance goes to that one's panel; all others share one.
    """
    panels: dict[str, _Panel] = {}
    for name, values in list(columns.items())[1:]:
        numbers = [math.nan if isinstance(value, str) or value is None else float(value) for value in values]
        if name in FLAGS or not any(map(math.isfinite, numbers)):
            continue
        title, scale, label = _column(name, metrics)
        if label is None:
            continue
        panels.setdefault(title, _Panel(title, scale, {})).series[label] = numbers
    return list(panels.values())


def _column(name: str, metrics: TaskMetrics) -> tuple[str, float, str | None]:
    """Title of the y axis, scale and legend entry of a column.

    No entry = not drawn.
    """
    split, _, key = name.rpartition("/")
    for metric in metrics.metrics:
        if name == metric.test_name:
            return metric.axis, metric.scale, TEST
        if key == metric.key:
            single_domain = ood_domain(split) is not None
            # Every OOD domain is drawn for the selection metric only: the picture would be unreadable otherwise.
            label = None if single_domain and metric is not metrics.selection else split or key
            return metric.axis, metric.scale, label
    if key in DISTANCE_AXES:
        return DISTANCE_AXES[key], 1.0, split or key
    return "", 1.0, name


def _groups(columns: Columns, x_name: str) -> list[str] | None:
    """Values of the last column of names beside the x axis.

    Rows of equal name share a colour.
    """
    named = [key for key, values in columns.items() if key != x_name and all(isinstance(v, str) for v in values)]
    return [str(value) for value in columns[named[-1]]] if named else None


def _draw_panel(axes: Axes, x: Sequence[Any], panel: _Panel, groups: list[str] | None) -> None:
    named = any(isinstance(value, str) for value in x)
    if named:
        positions = [float(index) for index in range(len(x))]
    else:
        positions = [math.nan if value is None else float(value) for value in x]
    boxes = tuple(panel.series) == BOX
    if boxes:
        _draw_boxes(axes, positions, panel.series)
    elif groups is not None and len(panel.series) == 1:
        _draw_groups(axes, positions, panel, groups)
    else:
        _draw_lines(axes, positions, panel, marker_size=4 if named else 2.5)
    if groups is not None or (len(panel.series) > 1 and not boxes):
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)


def _draw_lines(axes: Axes, positions: Sequence[float], panel: _Panel, marker_size: float) -> None:
    colours = _colours()
    for name, values in panel.series.items():
        style: dict[str, Any] = {"ms": marker_size}
        style |= STYLES.get(name) or {"color": next(colours), "linewidth": 1.2}
        if 2 * sum(map(math.isfinite, values)) < len(values):  # single measurements beside a fitted line
            style |= {"ms": 5.5, "linestyle": "none", "zorder": 3}
        label = {"gamma": "γ", "beta": "β"}.get(name, name)
        axes.plot(positions, [panel.scale * value for value in values], label=label, marker="o", **style)


def _draw_groups(axes: Axes, positions: Sequence[float], panel: _Panel, groups: Sequence[str]) -> None:
    (values,) = panel.series.values()
    for colour, group in zip(_colours(), dict.fromkeys(groups), strict=False):
        members = [index for index, name in enumerate(groups) if name == group]
        x = [positions[index] for index in members]
        y = [panel.scale * values[index] for index in members]
        axes.plot(x, y, "o", color=colour, ms=4, label=group)


def _draw_boxes(axes: Axes, positions: Sequence[float], series: Mapping[str, list[float]]) -> None:
    low, lower, middle, upper, high = (series[name] for name in BOX)
    heights = [b - a for a, b in zip(lower, upper, strict=True)]
    axes.vlines(positions, low, high, color=BLUE, linewidth=1.2)
    axes.bar(positions, heights, 0.5, bottom=lower, color=BLUE, alpha=0.35)
    axes.hlines(middle, [x - 0.25 for x in positions], [x + 0.25 for x in positions], color=BLUE, linewidth=2)
    text = "line: median; box: quartiles; whiskers: 5 % and 95 %"
    axes.text(1.0, 1.01, text, fontsize=7.5, color=GREY, transform=axes.transAxes, ha="right", va="bottom")


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Names below the axis; of many, every second, third …"""
    ticks = _ticks(names)
    vertical = _vertical(names)
    size = 7 if vertical else 8.5
    axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90 if vertical else 0, fontsize=size)
    axes.set_xlim(-0.6, len(names) - 0.4)


def _ticks(names: Sequence[str]) -> range:
    return range(0, len(names), math.ceil(len(names) / MAX_TICKS) or 1)


def _longest(names: Sequence[str]) -> int:
    """Letters of the longest name that is written."""
    return max((len(names[i]) for i in _ticks(names)), default=0)


def _vertical(names: Sequence[str]) -> bool:
    """Whether the names only fit when they are rotated."""
    return _longest(names) * len(_ticks(names)) > 70


def without_shared_path(names: Sequence[str]) -> list[str]:
    """Dotted names without their common leading parts; at least one part of each is kept.

    Example:
        >>> without_shared_path(["blocks.0.norm1", "blocks.0.norm2"])
        ['norm1', 'norm2']
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def _colours() -> Iterator[str]:
    return itertools.cycle(PALETTE)
