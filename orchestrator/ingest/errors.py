"""What a person is told when a data source cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """The data source is missing, empty, or cannot be split as asked."""
