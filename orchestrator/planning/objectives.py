"""Objectives of a study's search, and those that its strategies or this machine cannot serve."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import search_spaces
from orchestrator.errors import Problem
from orchestrator.planning.configurations import points, structure
from orchestrator.record.records import metrics_of
from trainables import strategy_class
from trainables.engine.contract import TrainingConfig

if TYPE_CHECKING:
    from orchestrator.study_file.schema import StrategyEntry, StudySpec

_RECIPE = frozenset(field.name for field in dataclasses.fields(TrainingConfig))
"""Hyperparameters of every strategy; the number of trained parameters depends on none of them."""
_HOST_MEMORY = Path("/proc/self/status")
"""Where the peak of the host's memory is read."""


def metric_of(spec: StudySpec) -> str:
    """First objective of the search.

    The study's selection metric on ID validation, or on a validation domain.
    """
    metrics = metrics_of(spec)
    domain = spec.search.validation_domain
    return metrics.of_domain(domain) if domain else metrics.validation


def objectives_of(spec: StudySpec) -> tuple[str, ...]:
    """What the search optimises: the selecting metric, then the costs."""
    return metric_of(spec), *spec.search.costs


def cost_problems(spec: StudySpec) -> Iterator[Problem]:
    """Costs that would be the same for every trial, or missing from it."""
    costs = spec.search.costs
    if "trainable_parameters" in costs:
        count = _only_count(spec)
        if count is not None:
            labels = ", ".join(entry.label for entry in spec.strategies)
            yield Problem(
                ("search", "objectives", 1 + costs.index("trainable_parameters")),
                "the number of trained parameters is an objective where configurations differ in it, but it is "
                f"the same for all of {labels}. Add an entry that trains fewer or more, free a hyperparameter "
                "that changes it (such as lora's rank), or leave trainable_parameters out.",
            )
    elsewhere = os.environ.get("RAY_ADDRESS", "local") != "local"
    if "peak_memory" in costs and not (elsewhere or torch.cuda.is_available() or _HOST_MEMORY.exists()):
        yield Problem(
            ("search", "objectives", 1 + costs.index("peak_memory")),
            f"peak_memory is that of the GPU, or of the host as {_HOST_MEMORY} has it (Linux), but this machine has "
            "neither. Run the study elsewhere, or leave peak_memory out.",
        )


def _only_count(spec: StudySpec) -> int | None:
    """The trained parameters that all configurations share; None where they differ, may differ, or are not known."""
    counts = set()
    try:
        model = structure(spec, classes=2)
        for entry in spec.strategies:
            if _may_vary(entry, spec.task):
                return None
            chosen = strategy_class(entry.name, spec.task)
            counts |= {chosen.from_hparams(p).moving_parameters(model) for p in points(entry, spec.task)}
    except (ValueError, RuntimeError):  # no such network, or not the layers that a strategy needs: reported elsewhere
        return None
    return counts.pop() if len(counts) == 1 else None


def _may_vary(entry: StrategyEntry, task: str) -> bool:
    """Whether the search has choices, beyond the common recipe, that may change what is trained."""
    if entry.preset is not None:
        return True
    space = search_spaces.space(entry.name, task)
    searched = search_spaces.searched(entry.name, entry.fixed, task)
    return any(key not in _RECIPE and space[key].discrete_ends() for key in searched)
