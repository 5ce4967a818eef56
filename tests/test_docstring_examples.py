"""Examples in docstrings give what they show. Add a module here with its first example."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("trainables.specs.metrics",)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module(module: str) -> None:
    """Without Ray: none of these modules may need it."""
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0, "the module has no example"
    assert results.failed == 0
