"""BitFit (Ben Zaken et al., 2022): only bias terms and the head train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainables.engine.contract import ParamGroup, Strategy, TrainingConfig

if TYPE_CHECKING:
    from trainables.models.task_model import TaskModel


class BitFit(Strategy):
    """Every bias of the backbone, those of norm layers (β) included, moves at η_θ."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """The common recipe; biases take larger steps than weights."""

        lr_backbone: float = 1e-2

    def param_groups(self, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
        """All biases of the backbone, and the head.

        Raises:
            ValueError: the backbone has no bias.
        """
        biases = [p for name, p in model.backbone.named_parameters() if is_bias(name)]
        if not biases:
            raise ValueError("BitFit needs a network with bias terms, but this one has none. Use another strategy.")
        return [ParamGroup("biases", biases, self.config.lr_backbone), self.head_group(model)]


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias.

    `bias`, or `q_bias` and `v_bias` of BEiT and its kin, but no table of relative positions.

    Example:
        >>> is_bias("blocks.0.attn.q_bias"), is_bias("blocks.0.attn.relative_position_bias_table")
        (True, False)
    """
    last = name.rpartition(".")[2]
    return last == "bias" or (last.endswith("_bias") and "relative_position" not in last)


STRATEGY = BitFit
