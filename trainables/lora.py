"""LoRA (Hu et al., 2022) through peft.
Low-rank updates beside frozen linear maps, merged at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trainables.engine.contract import ParamGroup, Prepared, Strategy, TrainingConfig, Tuned
from trainables.models.low_rank import LowRankUpdate
from trainables.models.transformer_blocks import Block, find_blocks, linear_width
from trainables.specs.metrics import LORA_MAPS

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel

ADAPTER = "default"
"""peft's name of the only adapter of a network."""


class LoRA(Strategy):
    """W + (α/r)·B·A on the chosen linear maps of every block.

    B starts at zero, so that the network's function starts unchanged.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"transformer_block"})
    packages: ClassVar[Mapping[str, str]] = {"peft": "lora"}

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """Hyperparameters of LoRA."""

        lr_backbone: float = 1e-1
        """Learning rate of A and B."""
        bn_mode: Literal["train", "eval"] = "eval"
        """eval = where the network has BatchNorm as well, its statistics stay the pretrained ones."""
        rank: int = 8
        alpha: float | None = None
        """Numerator of the scale α/r; None = 2·rank, a scale of 2."""
        targets: Literal["attention", "mlp", "all"] = "attention"
        """attention = the maps of query, key and value (fused or separate) and the output projection; mlp =
        the feed-forward maps; all = both."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
                raise ValueError(f"rank must be a whole number of at least 1, but got {self.rank!r}.")
            if self.alpha is not None and not self.alpha > 0:
                raise ValueError(f"alpha must be positive, but got {self.alpha!r}.")

    def prepare(self, model: TaskModel, data: TrialData) -> Prepared:
        """Inject the adapters into the network as it starts (errors: see `inject`)."""
        # First: a probe for the head is solved on the network without adapters.
        report = super().prepare(model, data).report
        image, _ = next(data.batches("train", batch_size=1))
        return Prepared({**report, LORA_MAPS.name: float(inject(model.backbone, self.config, image))})

    def param_groups(self, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
        """A and B of every adapter at η_θ, the head at η_w."""
        adapters = [p for name, p in model.backbone.named_parameters() if ".lora_" in name]
        return [ParamGroup("adapters", adapters, self.config.lr_backbone), self.head_group(model)]

    def moving_parameters(self, model: TaskModel) -> int:
        """A and B of every target, and the head.

        The whole maps where WiSE-FT interpolates what was merged.
        """
        names = target_names(model.backbone, self.config.targets)
        weights = [model.backbone.get_parameter(f"{name}.weight") for name in names]
        whole = self.config.wise is not None
        count = sum(weight.numel() if whole else self.config.rank * sum(weight.shape) for weight in weights)
        return count + sum(int(parameter.numel()) for parameter in model.head.parameters())

    def finalize(self, model: TaskModel, data: TrialData, prepared: Any = None) -> Tuned:
        """Merge the adapters: the network has its plain structure again."""
        return Tuned(merged=merge(model))


def inject(backbone: nn.Module, config: LoRA.Config, image: Tensor) -> int:
    """Put adapters beside the targets, in place, and return how many.

    Args:
        image: (1, 3, H, W), to see that every adapter takes part in the forward pass.

    Raises:
        ValueError: the targets match no linear map of this network, or one whose weights it reads without calling it.
        ModuleNotFoundError: peft is not installed.
    """
    names = target_names(backbone, config.targets)
    peft = _peft()
    _check_called(backbone, names, image)
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        # Full names: peft matches a short one as a suffix, also outside the chosen components.
        target_modules=names,
        lora_dropout=0.0,
        bias="none",
    )
    peft.inject_adapter_in_model(adapter, backbone)
    return len(names)


@torch.no_grad()
def _check_called(backbone: nn.Module, names: list[str], image: Tensor) -> None:
    idle = set(names)

    def seen(name: str) -> Callable[..., None]:
        return lambda module, inputs: idle.discard(name)

    hooks = [backbone.get_submodule(name).register_forward_pre_hook(seen(name)) for name in names]
    # Module by module: `train()` afterwards would also wake modules that were in eval mode before.
    modes = {module: module.training for module in backbone.modules()}
    try:
        # In eval mode: BatchNorm would count this image in its statistics.
        backbone.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if idle:
        unused = [name for name in names if name in idle]
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise ValueError(
            f"LoRA adapts linear maps that the network calls, but this one reads the weights of {unused[0]}{more} by "
            "itself, so that an adapter would do nothing. Use targets='mlp', or another strategy."
        )


def target_names(backbone: nn.Module, targets: str) -> list[str]:
    """Names of the linear maps that get an adapter.

    Raises:
        ValueError: no block can be found, or nothing matches.
    """
    kinds = {"attention": ("mha",), "mlp": ("fc1", "fc2"), "all": ("mha", "fc1", "fc2")}[targets]
    maps = [part for block in find_blocks(backbone) for kind in kinds for part in _maps(block, kind)]
    inside = {id(inner) for part in maps for inner in part.modules()}
    matching = [n for n, m in backbone.named_modules() if id(m) in inside and isinstance(m, nn.Linear)]
    if not matching:
        raise ValueError(
            f"LoRA needs linear maps to adapt, but targets={targets!r} matches none in this network. Use other "
            "targets, or another strategy."
        )
    return matching


def _maps(block: Block, kind: str) -> tuple[nn.Module, ...]:
    """The linear maps of a component, over the channels of tokens.

    Attention may hold others: small networks that turn positions into biases, and maps over its heads. They are no part
    of the method.
    """
    if kind != "mha":
        return block.component(kind)
    entering = linear_width(block.fc1[0])
    assert entering is not None
    return tuple(m for m in block.mha.children() if (width := linear_width(m)) and max(width) >= entering[0])


@torch.no_grad()
def merge(model: nn.Module) -> LowRankUpdate:
    """Fold every adapter into its map and return the update.

    The plain map takes the adapter's place.
    """
    adapters = adapters_of(model)
    tensors = {}
    for name, module in adapters.items():
        tensors[f"{name}.lora_A"] = module.lora_A[ADAPTER].weight.detach()
        tensors[f"{name}.lora_B"] = module.lora_B[ADAPTER].weight.detach()
    one = next(iter(adapters.values()))  # all have the same rank and scale
    update = LowRankUpdate(one.r[ADAPTER], float(one.lora_alpha[ADAPTER]), tuple(adapters), tensors)
    for name, module in adapters.items():
        plain = module.get_base_layer()
        # Not by peft's own `merge`, whose matrix product has other bits on another device.
        plain.weight.copy_(update.merged(name, plain.weight))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    return update


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """All adapters, by the path of the map that each one wraps."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('LoRA needs peft, which is not installed. pip install "luthier[lora]"') from error
    return peft


STRATEGY = LoRA
