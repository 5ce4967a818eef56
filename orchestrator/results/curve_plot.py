"""A curve as a picture. Neither matplotlib's global state nor its settings are changed: any thread may draw."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Columns = Mapping[str, Sequence[Any]]

FLAGS = frozenset({"absolute"})
"""Columns that say something about a row; they are not drawn."""
MOST_TICKS = 36
"""Names on an axis; of more, every second, third … is written."""
X_AXES = {"lambda": "λ", "alpha": "α", "quantile": "share of the images below", "images": "training images"}
"""x axes that are called differently in pictures."""
Y_AXES = {
    "acc": "accuracy (%)",
    "nll": "negative log-likelihood",
    "ece": "calibration error (%)",
    "cosine": "cosine similarity",
    "l2": "L2 distance",
}
"""Axis of the columns whose names end in `/<unit>` (or are one); each unit has a panel of its own."""
CURVES = {
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
"""y axis of the curves whose columns have no unit."""
MINOR = frozenset({"nll", "ece"})
"""Units whose OOD domains are left to the numbers: the picture is about accuracy."""
PER_CENT = frozenset({"acc", "ece"})
BOX = ("q05", "q25", "q50", "q75", "q95")
"""Columns that are drawn as one box per row."""
PALETTE = ("#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#332288", "#DDCC77", "#117733", "#4477AA", "#EE6677")
"""Colours that also people with colour vision deficiency tell apart (Tol's bright and muted schemes)."""
BLACK, BLUE, RED, GREY = "#222222", "#4477AA", "#EE6677", "#666666"
STYLES: Mapping[str, dict[str, Any]] = {
    "val": {"color": BLACK, "linewidth": 2.0},
    "test": {"color": BLUE, "linewidth": 2.0},
    "calib": {"color": BLUE, "linewidth": 2.0},
    "ood/mean": {"color": RED, "linewidth": 2.0},
    "ood/worst": {"color": RED, "linewidth": 1.2, "linestyle": (0, (4, 2))},
}
"""The splits that every sweep has look the same in all pictures."""


def draw(name: str, curve: Mapping[str, Any], chosen: float | None = None) -> bytes:
    """A PNG of a curve (arguments and errors: see `figure_of`)."""
    out = io.BytesIO()
    figure_of(name, curve, chosen).savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def figure_of(name: str, curve: Mapping[str, Any], chosen: float | None = None) -> Figure:
    """Numbers over numbers as lines, numbers over names as dots or boxes, each unit in a panel of its own, accuracies
    in per cent.

    Args:
        name: the curve's, for the title.
        curve: `columns` (the first is the x axis) and `note`.
        chosen: x of the point that the trial chose; it is marked.

    Raises:
        ValueError: nothing in it can be drawn.
    """
    from matplotlib.figure import Figure

    columns: Columns = curve["columns"]
    x_name, x = next(iter(columns.items()))
    panels = _panels(columns)
    if not panels:
        raise ValueError(f"A curve needs a column of numbers beside its x axis {x_name!r}, but got {list(columns)}.")
    named = any(isinstance(value, str) for value in x)
    names = without_shared_path([str(value) for value in x]) if named else []
    note = textwrap.wrap(str(curve.get("note") or ""), 110)
    page = _Page(panels, names, len(note))
    figure = Figure(figsize=(page.width, page.height), dpi=100)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=page.rows)[:, 0]
    figure.subplots_adjust(*page.margins, hspace=0.12)
    for axes, (unit, series) in zip(rows, panels.items(), strict=True):
        _panel(axes, x, series, _groups(columns, x_name), 100.0 if unit in PER_CENT else 1.0)
        axes.set_ylabel(Y_AXES.get(unit) or CURVES.get(name, ""), fontsize=9)
        if chosen is not None and not named:
            axes.axvline(chosen, color=BLACK, linewidth=1.0, linestyle=":", zorder=1)
    if chosen is not None and not named:
        rows[0].set_title(f"{X_AXES.get(x_name, x_name)} = {chosen:.3g} chosen", loc="right", fontsize=9, color=GREY)
    rows[0].set_title(name.replace("_", " "), loc="left", fontsize=10, fontweight="bold")
    rows[-1].set_xlabel(X_AXES.get(x_name, x_name), fontsize=9)
    if named:
        _name_ticks(rows[-1], names)
    figure.text(0.01, 0.06 / page.height, "\n".join(note), fontsize=7.5, color=GREY, va="bottom")
    return figure


class _Page:
    """Sizes in inches. (matplotlib's own layouts measure every text twice, which is half the time of a picture.)

    Args:
        panels: see `_panels`.
        names: of the x axis; empty = it has numbers.
        note: lines below the picture.
    """

    def __init__(self, panels: Mapping[str, Mapping[str, Any]], names: Sequence[str], note: int) -> None:
        self.rows = [2.6, *[1.6] * (len(panels) - 1)]
        self.width = min(7.8 + 0.09 * max(0, len(names) - 12), 11.0)
        letters = max(len(name) for series in panels.values() for name in series)
        upright, longest = _upright(names)
        bottom = 0.55 + 0.13 * note + (0.054 * longest if upright else 0.0)
        self.height = 0.35 + sum(self.rows) + bottom
        right = 1 - min(0.55 + 0.075 * max(letters, 8), 2.2) / self.width
        self.margins = (0.8 / self.width, bottom / self.height, right, 1 - 0.35 / self.height)
        """Left, bottom, right and top of the panels, as shares of the page."""


def _panels(columns: Columns) -> dict[str, dict[str, list[float]]]:
    """Columns of numbers by the unit that they share (empty = none) and by their name without it; None and text become
    gaps."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, values in list(columns.items())[1:]:
        numbers = [math.nan if isinstance(v, str) or v is None else float(v) for v in values]
        if name in FLAGS or not any(map(math.isfinite, numbers)):
            continue
        split, _, unit = name.rpartition("/")
        if unit in MINOR and split.startswith("ood/"):
            continue
        if unit in Y_AXES:
            found.setdefault(unit, {})[split or unit] = numbers
        else:
            found.setdefault("", {})[name] = numbers
    return found


def _groups(columns: Columns, x_name: str) -> list[str] | None:
    """The last column of names beside the x axis: rows of one name share a colour."""
    named = [key for key, values in columns.items() if key != x_name and all(isinstance(v, str) for v in values)]
    return [str(value) for value in columns[named[-1]]] if named else None


def _panel(
    axes: Axes, x: Sequence[Any], series: Mapping[str, list[float]], groups: list[str] | None, scale: float
) -> None:
    named = any(isinstance(value, str) for value in x)
    at = [float(i) for i in range(len(x))] if named else [math.nan if v is None else float(v) for v in x]
    if tuple(series) == BOX:
        _boxes(axes, at, series)
    elif groups is not None and len(series) == 1:
        (values,) = series.values()
        for colour, group in zip(_colours(), dict.fromkeys(groups), strict=False):
            own = [i for i, its in enumerate(groups) if its == group]
            axes.plot([at[i] for i in own], [scale * values[i] for i in own], "o", color=colour, ms=4, label=group)
    else:
        colours = _colours()
        for name, values in series.items():
            style = {"ms": 4 if named else 2.5, **(STYLES.get(name) or {"color": next(colours), "linewidth": 1.2})}
            if 2 * sum(map(math.isfinite, values)) < len(values):  # single measurements beside a fitted line
                style |= {"ms": 5.5, "linestyle": "none", "zorder": 3}
            label = {"gamma": "γ", "beta": "β"}.get(name, name)
            axes.plot(at, [scale * v for v in values], label=label, marker="o", **style)
    if groups is not None or (len(series) > 1 and tuple(series) != BOX):
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)


def _boxes(axes: Axes, at: Sequence[float], series: Mapping[str, list[float]]) -> None:
    low, lower, middle, upper, high = (series[name] for name in BOX)
    axes.vlines(at, low, high, color=BLUE, linewidth=1.2)
    axes.bar(at, [b - a for a, b in zip(lower, upper, strict=True)], 0.5, bottom=lower, color=BLUE, alpha=0.35)
    axes.hlines(middle, [a - 0.25 for a in at], [a + 0.25 for a in at], color=BLUE, linewidth=2)
    text = "line: median; box: quartiles; whiskers: 5 % and 95 %"
    axes.text(1.0, 1.01, text, fontsize=7.5, color=GREY, transform=axes.transAxes, ha="right", va="bottom")


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Names below the axis; of many, every second, third …"""
    shown, (upright, _) = _shown(names), _upright(names)
    axes.set_xticks(shown, [names[i] for i in shown], rotation=90 if upright else 0, fontsize=7 if upright else 8.5)
    axes.set_xlim(-0.6, len(names) - 0.4)


def _shown(names: Sequence[str]) -> range:
    return range(0, len(names), math.ceil(len(names) / MOST_TICKS) or 1)


def _upright(names: Sequence[str]) -> tuple[bool, int]:
    """Whether the names only fit upright, and how many letters the longest that is shown has."""
    lengths = [len(names[i]) for i in _shown(names)] or [0]
    return max(lengths) * len(lengths) > 70, max(lengths)


def without_shared_path(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all of them begin with; at least one part stays."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def _colours() -> Iterator[str]:
    return itertools.cycle(PALETTE)
