"""Picture of a Pareto front: score on validation against a cost, as a figure of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from orchestrator.record.costs import COSTS
from orchestrator.results.curve_plot import BLACK, GREY, PALETTE
from orchestrator.results.front import Front, TradeOff
from trainables.specs.metrics import CLASSIFICATION, TaskMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE_RANGE = 20.0
"""Largest over smallest cost from which on the axis is logarithmic."""


def front_figure(
    front: Front, cost: str, metrics: TaskMetrics = CLASSIFICATION, colour: Mapping[str, str] | None = None
) -> Figure | None:
    """Score against one cost: every compared configuration, those on the front ringed.

    With one cost among the objectives the front is drawn as a line: the best score that a budget reaches. With several
    it is a surface, of which the picture shows one side, so that ringed points may lie below others. None without two
    configurations.

    Args:
        cost: one of the front's.
        colour: label → colour; None = in the order of appearance.
    """
    if len(front.configurations) < 2:
        return None
    labels = dict.fromkeys(configuration.choice.record.label for configuration in front.configurations)
    colour = dict(zip(labels, _cycle(len(labels)), strict=True)) | dict(colour or {})
    figure = Figure(figsize=(5.4, 4.0))
    axes = figure.subplots()
    _panel(axes, front, cost, metrics, colour)
    axes.set_ylabel(f"validation {metrics.selection.axis}")
    legend = axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label may contain a $
    return figure


def _panel(axes: Axes, front: Front, name: str, metrics: TaskMetrics, colour: Mapping[str, str]) -> None:
    scale = metrics.selection.scale
    by_label: dict[str, list[TradeOff]] = {}
    for configuration in front.configurations:
        by_label.setdefault(configuration.choice.record.label, []).append(configuration)
    for label, configurations in by_label.items():
        x = [configuration.costs[name] for configuration in configurations]
        y = [scale * configuration.choice.value for configuration in configurations]
        axes.scatter(x, y, color=colour[label], s=40, label=label, zorder=3)
    members = sorted(front.members, key=lambda member: (member.costs[name], member.choice.value))
    x = [member.costs[name] for member in members]
    y = [scale * member.choice.value for member in members]
    axes.scatter(x, y, s=120, facecolors="none", edgecolors=BLACK, linewidths=1.4, label="Pareto front", zorder=4)
    if len(front.costs) == 1:
        axes.step(x, y, where="post", color=BLACK, linewidth=1.0, zorder=2)
    cost = COSTS[name]
    _axis(axes, [configuration.costs[name] for configuration in front.configurations], cost.unit)
    axes.set_xlabel(cost.title)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=GREY, labelcolor=BLACK)


def _axis(axes: Axes, values: Sequence[float], unit: str) -> None:
    """A logarithmic axis over whole decades where the costs differ much, else a linear one."""
    low = min(values)
    high = max(values)
    if low > 0 and high / low >= WIDE_RANGE:
        axes.set_xscale("log")
        axes.set_xlim(10.0 ** math.floor(math.log10(low) - 0.05), 10.0 ** math.ceil(math.log10(high) + 0.05))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(unit, sep="\N{NARROW NO-BREAK SPACE}"))
    axes.margins(0.12)


def _cycle(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]
