"""torch's private names are as they were read: `trainables/models/torch_internals.py`; peft's, which LoRA uses, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainables.models.torch_internals import has_forward_hooks, tensor_norms


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_seen_while_they_are_registered(register: str) -> None:
    layer = nn.Linear(2, 2)
    assert not has_forward_hooks(layer)
    handle = getattr(layer, register)(lambda *_: None)
    assert has_forward_hooks(layer), f"torch {torch.__version__} keeps forward hooks elsewhere than torch 2.14 did"
    assert not has_forward_hooks(nn.Sequential(layer))
    handle.remove()
    assert not has_forward_hooks(layer)


def test_norms_of_many_tensors_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in ((3,), (4, 5), (1, 2, 3), (7, 7))]
    expected = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    assert torch.equal(tensor_norms(tensors), expected)


def test_adapters_of_peft_have_the_names_that_are_looked_for() -> None:
    """`.lora_` names trainable tensors, `base_layer` the map that an adapter wraps."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = nn.Sequential(nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), network)
    (adapter,) = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    assert adapter.get_base_layer() is adapter.base_layer
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trainable == {"0.lora_A.default.weight", "0.lora_B.default.weight"}
    assert "0.base_layer.weight" in network.state_dict()
