"""Configurations that stand for an entry's search space, for checks and estimates before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

import search_spaces
from trainables.demo.backbones import NETWORKS, architecture
from trainables.models.backbone import Backbone, backbone_data_config
from trainables.models.task_model import TaskModel
from trainables.specs.metrics import CLASSIFICATION
from trainables.specs.trial_spec import ModelSpec
from trainables.tasks.base import TargetSpec, TaskSettings
from trainables.tasks.registry import task_for

if TYPE_CHECKING:
    from orchestrator.study_file.schema import StrategyEntry, StudySpec


def points(entry: StrategyEntry, task: str = CLASSIFICATION.task) -> Iterator[dict[str, Any]]:
    """Configurations of an entry that are checked.

    Those of its preset, or default point, choices and ends of integer ranges.
    """
    if entry.preset is not None:
        preset = search_spaces.preset(entry.name, entry.preset, task)
        fixed = {**preset.fixed, **entry.fixed}
        yield from ({**fixed, **point} for step in range(len(preset.steps)) for point in preset.points(step))
        return
    yield search_spaces.default_point(entry.name, entry.fixed, task)
    for key in search_spaces.searched(entry.name, entry.fixed, task):
        for value in search_spaces.space(entry.name, task)[key].discrete_ends():
            yield search_spaces.default_point(entry.name, {**entry.fixed, key: value}, task)


def structure(spec: StudySpec, classes: int) -> TaskModel:
    """The study's network under its task's head, on the meta device.

    Raises:
        ValueError: the head needs what the network does not have.
    """
    name = spec.model.name
    with torch.device("meta"):
        network: Any = (
            architecture(name) if name in NETWORKS else timm.create_model(name, pretrained=False, num_classes=0)
        )
        # timm: a network with a layer between pooling and classifier has that layer's width.
        width = int(getattr(network, "head_hidden_size", None) or network.num_features)
        if spec.task == CLASSIFICATION.task:
            return TaskModel(network, nn.Linear(width, classes))
    # At the network's own side, which the structure was made for.
    config = backbone_data_config(ModelSpec(name=name, pretrained=False))
    backbone = Backbone(network.eval(), config, width, digest=f"structure of {name}")
    targets = TargetSpec(tuple(map(str, range(classes))))
    return task_for(spec.task, targets, TaskSettings(decoder=spec.model.decoder)).build_model(backbone, seed=0)
