"""Section of a report about accuracy and cost: the Pareto front as a table and a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from orchestrator.record.costs import COSTS
from orchestrator.results import figures
from orchestrator.results.front import front_cells, front_titles
from orchestrator.results.front_plot import front_figure
from orchestrator.results.study_results import Results

logger = logging.getLogger("luthier")


def front_section(results: Results, colour: Mapping[str, str]) -> dict[str, Any] | None:
    """The section for the template; None for a study without costs among its objectives, or before its first result.

    Args:
        colour: label → colour, as in the other pictures.
    """
    if not results.costs:
        return None
    try:
        front = results.trade_offs()
    except ValueError:  # no complete trial, which the leaderboard reports
        return None
    pictures = []
    for cost in front.costs:
        try:
            figure = front_figure(front, cost, results.metrics, colour)
        except Exception as error:  # a picture that cannot be drawn must not cost the page
            reason = f"{type(error).__name__}: {error}"
            logger.warning("The report is made without the Pareto front's picture of %s (%s)", cost, reason)
            continue
        if figure is not None:
            title = f"Validation against {COSTS[cost].title}, the Pareto front ringed"
            pictures.append({"title": title, "source": figures.data_uri(figure)})
    return {
        "sentence": front.sentence(results.metrics),
        "titles": front_titles(front),
        "rows": front_cells(front, results.metrics),
        "pictures": pictures,
    }
