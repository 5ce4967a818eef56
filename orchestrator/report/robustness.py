"""Section of a report about errors under corruptions: both tables and the heat maps."""

from __future__ import annotations

import logging
from typing import Any

from orchestrator.results import figures
from orchestrator.results.corruption_plot import corruption_figure
from orchestrator.results.robustness import TITLES, corruption_lines, corruption_titles, lines, note
from orchestrator.results.study_results import Results

logger = logging.getLogger("luthier")


def robustness_section(results: Results) -> dict[str, Any] | None:
    """The section for the template; None where nothing was measured under corruptions."""
    rows = results.corrupted()
    if not rows:
        return None
    pictures = []
    try:
        figure = corruption_figure(rows)
    except Exception as error:  # a picture that cannot be drawn must not cost the page
        logger.warning("The report is made without the heat maps (%s: %s)", type(error).__name__, error)
        figure = None
    if figure is not None:
        pictures.append({"title": "Error by corruption and severity", "source": figures.data_uri(figure)})
    text = note(rows)
    return {
        "titles": TITLES,
        "rows": lines(rows),
        "note": f"{text[0].upper()}{text[1:]}.",
        "corruption_titles": corruption_titles(rows),
        "corruption_rows": corruption_lines(rows),
        "pictures": pictures,
    }
