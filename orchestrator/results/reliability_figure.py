"""Reliability diagrams, before and after temperature scaling (Guo et al., 2017, Fig. 4), as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.results.curve_plot import BLUE, GREY, RED, NotebookFigure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from orchestrator.results.errors import Reliability

PER_ROW = 4
LARGEST_POINT = 110.0
"""Area, in square points, of a point that has all samples."""
SMALLEST_POINT = 9.0


@dataclass(frozen=True)
class SplitReliability:
    """Calibration on one split."""

    title: str
    before: Reliability
    after: Reliability | None
    """With scaled logits; None without a temperature."""
    error: float | None = None
    """Recorded calibration error; None where it was not recorded, or the panel is of several runs."""
    error_scaled: float | None = None


def reliability_figure(splits: Sequence[SplitReliability], side: float = 2.6) -> Figure:
    """One panel per split: accuracy over confidence, and the diagonal of perfect calibration.

    The area of a point is the share of the images in its bin.

    Args:
        side: of a panel, in inches.
    """
    across = min(PER_ROW, len(splits))
    down = math.ceil(len(splits) / across)
    figure = NotebookFigure(figsize=(side * across + 0.4, (side + 0.15) * down + 0.3))
    figure.subplots_adjust(wspace=0.3, hspace=0.6)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes, split in zip(grid, splits, strict=False):
        _panel(axes, split)
    for axes in grid[len(splits) :]:
        axes.set_visible(False)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8.5, ncols=3, loc="lower left", bbox_to_anchor=(0.1, 0.95))
    return figure


def _panel(axes: Axes, split: SplitReliability) -> None:
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    curves = [("as trained", split.before, RED, split.error)]
    if split.after is not None:
        curves.append(("temperature-scaled", split.after, BLUE, split.error_scaled))
    errors = []
    for name, curve, colour, error in curves:
        total = max(1, int(curve.count.sum()))
        areas = [max(SMALLEST_POINT, LARGEST_POINT * int(count) / total) for count in curve.count]
        x, y = 100 * curve.confidence, 100 * curve.accuracy
        # Faint: a bin of a few samples says little, and lines between bins are as long as they are.
        axes.plot(x, y, color=colour, linewidth=1.0, alpha=0.35)
        axes.scatter(x, y, s=areas, color=colour, alpha=0.75, linewidths=0, label=name)
        if error is not None:
            errors.append(f"{100 * error:.1f}")
    axes.set_title(split.title, loc="left", fontsize=9.5, fontweight="bold", pad=17, parse_math=False)
    if errors:
        text = f"calibration error {' → '.join(errors)} %"
        axes.text(0, 1.05, text, transform=axes.transAxes, fontsize=7.5, color=GREY)
    axes.set(xlim=(-3, 103), ylim=(-3, 103), aspect="equal")
    axes.set_xlabel("confidence (%)", fontsize=8)
    axes.set_ylabel("accuracy (%)", fontsize=8)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7.5, colors=GREY)
