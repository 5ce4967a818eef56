"""Configurations that stand for an entry's search space, for checks and estimates before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

import search_spaces
from trainables.demo.backbones import NETWORKS, architecture
from trainables.models.task_model import TaskModel

if TYPE_CHECKING:
    from orchestrator.study_file.schema import StrategyEntry, StudySpec


def points(entry: StrategyEntry) -> Iterator[dict[str, Any]]:
    """Configurations of an entry that are checked.

    Those of its preset, or default point, choices and ends of integer ranges.
    """
    if entry.preset is not None:
        preset = search_spaces.preset(entry.name, entry.preset)
        fixed = {**preset.fixed, **entry.fixed}
        yield from ({**fixed, **point} for step in range(len(preset.steps)) for point in preset.points(step))
        return
    yield search_spaces.default_point(entry.name, entry.fixed)
    for key in search_spaces.searched(entry.name, entry.fixed):
        for value in search_spaces.space(entry.name)[key].discrete_ends():
            yield search_spaces.default_point(entry.name, {**entry.fixed, key: value})


def structure(spec: StudySpec, classes: int) -> TaskModel:
    """The study's network under a linear head, on the meta device."""
    name = spec.model.name
    with torch.device("meta"):
        network: Any = (
            architecture(name) if name in NETWORKS else timm.create_model(name, pretrained=False, num_classes=0)
        )
        # timm: a network with a layer between pooling and classifier has that layer's width.
        width = getattr(network, "head_hidden_size", None) or network.num_features
        return TaskModel(network, nn.Linear(int(width), classes))
