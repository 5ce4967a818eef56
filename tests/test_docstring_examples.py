"""The examples in docstrings are run, and public modules have some."""

from __future__ import annotations

import doctest
import importlib

import pytest

WITH_EXAMPLES = (
    "luthier",
    "orchestrator.cluster.resources",
    "orchestrator.commands.exit_status",
    "orchestrator.commands.metric_reference",
    "orchestrator.commands.reference",
    "orchestrator.errors",
    "orchestrator.export.columns",
    "orchestrator.record.records",
    "orchestrator.results.comparison",
    "orchestrator.results.curve_plot",
    "orchestrator.results.leaderboard",
    "orchestrator.results.selection",
    "orchestrator.results.study_results",
    "orchestrator.search.sampling",
    "orchestrator.search.space",
    "orchestrator.study",
    "orchestrator.study_file.explain",
    "orchestrator.study_file.schema",
    "orchestrator.study_file.yaml_text",
    "orchestrator.wording",
    "search_spaces",
    "search_spaces._hyperparameter",
    "trainables.data.corruptions.batch",
    "trainables.data.corruptions.noise",
    "trainables.specs.metrics",
)
"""Modules whose docstrings hold at least one example."""


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_give_what_they_show(module: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(importlib.import_module(module), optionflags=flags)
    assert attempted > 0
    assert failed == 0
