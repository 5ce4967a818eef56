"""Heat maps of the errors under corruptions: corruption × severity, a panel per entry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from orchestrator.results.curve_plot import BLACK, NotebookFigure
from orchestrator.results.robustness import Robustness
from trainables.specs.corruptions import SEVERITIES

COLUMNS = 4
"""Panels in a row."""
DARK = 60.0
"""Error in per cent from which on a cell's number is white."""


def corruption_figure(rows: Sequence[Robustness]) -> Figure | None:
    """Error by corruption and severity of every entry, on one scale of 0 to 100 %; None without an entry."""
    if not rows:
        return None
    names = list(rows[0].errors)
    columns = min(COLUMNS, len(rows))
    height = math.ceil(len(rows) / columns)
    figure = NotebookFigure(figsize=(1.6 + 2.3 * columns, height * (1.0 + 0.24 * len(names))), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    for index, (axes, row) in enumerate(zip(grid.flat, rows, strict=False)):
        values = np.asarray([row.grid[name] for name in names])
        axes.imshow(values, cmap="YlOrRd", vmin=0, vmax=100, aspect="auto")
        for (line, column), value in np.ndenumerate(values):
            color = "white" if value >= DARK else BLACK
            axes.text(column, line, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_title(
            f"{row.label}: mCE {row.mce.mean:.1f}", loc="left", fontsize=9, fontweight="bold", parse_math=False
        )
        axes.set_xticks(range(len(SEVERITIES)), list(map(str, SEVERITIES)), fontsize=7.5)
        axes.set_xlabel("severity", fontsize=8.5)
        labels = [name.replace("_", " ") for name in names] if index % columns == 0 else []
        axes.set_yticks(range(len(names)) if labels else [], labels, fontsize=7.5)
    return figure
