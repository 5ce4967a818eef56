"""Fifteen common corruptions of pictures at five severities (Hendrycks and Dietterich, 2019)."""

from trainables.data.corruptions.batch import corrupt
from trainables.data.corruptions.parameters import LARGE_SIDE
from trainables.specs.corruptions import COMMON, GROUPS, SEVERITIES

__all__ = ["COMMON", "GROUPS", "LARGE_SIDE", "SEVERITIES", "corrupt"]
