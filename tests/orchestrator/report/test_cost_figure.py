"""The figure of cost and score has the leaderboard's numbers at the leaderboard's places."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from orchestrator.results import figures

PARAMETERS, SECONDS = "cost/trainable_parameters", "cost/total_seconds"


def row(label: str, score: float, parameters: float, seconds: float, ood: float = math.nan) -> dict[str, Any]:
    values: dict[str, Any] = {"label": label, PARAMETERS: parameters, SECONDS: seconds}
    for name, value in (("test/acc", score), ("ood/mean/acc", ood)):
        values |= {name: value, f"{name}/low": value - 0.1, f"{name}/high": value + 0.05}
    return values


ROWS = [row("probe", 0.7, 650, 2.0, 0.5), row("full", 0.9, 2.1e7, 40.0, 0.6)]
COLOURS = figures.colours(["probe", "full", "$x_$"])


def test_each_panel_has_every_entry_with_its_interval() -> None:
    figure = figures.cost_and_score(ROWS, COLOURS)
    assert figure is not None
    drawn = {(axes.get_ylabel(), axes.get_xlabel()): axes for axes in figure.axes}
    assert set(drawn) == {
        (y, x)
        for y in ("ID test accuracy (%)", "mean OOD accuracy (%)")
        for x in ("trained parameters", "seconds of a trial")
    }
    axes = drawn["ID test accuracy (%)", "trained parameters"]
    assert axes.get_xscale() == "log"
    for container, entry in zip(axes.containers, ROWS, strict=True):
        assert isinstance(container, ErrorbarContainer)
        line, _, (bar,) = container.lines
        assert line.get_xydata().tolist() == pytest.approx(np.array([[entry[PARAMETERS], 100 * entry["test/acc"]]]))
        low, high = bar.get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((100 * entry["test/acc/low"], 100 * entry["test/acc/high"]))


def test_only_panels_with_two_entries_are_drawn() -> None:
    no_ood = [row("probe", 0.7, 650, math.nan), row("full", 0.9, 2.1e7, 40.0)]
    figure = figures.cost_and_score(no_ood, COLOURS)
    assert figure is not None
    assert [(axes.get_ylabel(), axes.get_xlabel()) for axes in figure.axes] == [
        ("ID test accuracy (%)", "trained parameters")
    ]
    assert figures.cost_and_score(ROWS[:1], COLOURS) is None
    assert (
        figures.cost_and_score([{**entry, PARAMETERS: math.nan, SECONDS: math.nan} for entry in ROWS], COLOURS) is None
    )


def test_a_label_is_no_formula() -> None:
    figure = figures.cost_and_score([*ROWS, row("$x_$", 0.8, 1000, 3.0, 0.4)], COLOURS)
    assert figure is not None
    assert figures.data_uri(figure).startswith("data:image/svg+xml;base64,")
