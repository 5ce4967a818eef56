"""The best unit, what may move, and when a network still is the pretrained one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from trainables.engine.best_weights import Best, is_pristine, movable_names, put_back, take
from trainables.engine.contract import ParamGroup
from trainables.specs.metrics import CLASSIFICATION


class Network(nn.Module):
    """A BatchNorm network of the layout of `TaskModel`."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(inputs))
        return logits


@pytest.mark.parametrize(
    ("accuracy", "nll", "better"),
    [(0.6, 9.0, True), (0.4, 0.1, False), (0.5, 0.9, True), (0.5, 1.1, False), (0.5, 1.0, False)],
)
def test_accuracy_decides_then_the_loss_then_the_earlier_unit(accuracy: float, nll: float, better: bool) -> None:
    assert Best(unit=3, value=0.5, tie_breaker=1.0).improved_by(accuracy, nll, CLASSIFICATION) is better


def test_any_first_unit_is_better_than_none() -> None:
    assert Best().improved_by(0.0, 1e9, CLASSIFICATION)


def test_groups_buffers_and_the_head_are_what_may_move() -> None:
    model = Network()
    names = movable_names(model, [ParamGroup("norms", list(model.backbone[1].parameters()), 0.1)])
    assert names == {
        *("backbone.1.weight", "backbone.1.bias", "head.weight", "head.bias"),
        *("backbone.1.running_mean", "backbone.1.running_var", "backbone.1.num_batches_tracked"),
    }


def test_a_foreign_parameter_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        movable_names(Network(), [ParamGroup("adapter", [nn.Parameter(torch.zeros(5))], 0.1)])
    assert str(error.value) == (
        "Parameter groups must hold parameters of the model, but 'adapter' has a foreign one of shape (5,)."
    )


def test_what_was_taken_comes_back_and_does_not_follow_the_model() -> None:
    model = Network()
    before = copy.deepcopy(model.state_dict())
    kept = take(model, movable_names(model, [ParamGroup("all", list(model.backbone.parameters()), 0.1)]))
    model(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    put_back(model, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_is_pristine_until_a_bit_a_layer_or_a_hook_changes() -> None:
    reference = Network().backbone
    assert is_pristine(copy.deepcopy(reference), reference)
    changed = copy.deepcopy(reference)
    changed[1].running_mean[0] += 1e-6
    assert not is_pristine(changed, reference)
    wrapped = copy.deepcopy(reference)
    wrapped[1] = nn.Identity()
    assert not is_pristine(wrapped, reference)
    hooked = copy.deepcopy(reference)
    hooked[0].register_forward_hook(lambda module, inputs, output: output * 2)
    assert not is_pristine(hooked, reference)
