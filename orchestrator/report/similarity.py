"""Similarity of features before and after fine-tuning, as the report shows it; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.results.errors import Floats


@dataclass(frozen=True)
class FeatureSimilarity:
    """Cosine similarities of one trial."""

    cosines: Mapping[str, Floats]
    """(n,) by split, ID test and OOD domains, in the order of the data store."""
    unchanged: bool = False
    """Whether the features are the pretrained network's: only the head was trained."""
