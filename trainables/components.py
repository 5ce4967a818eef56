"""Plasticity-guided tuning of transformer components (Odonnat et al., 2026).
One kind of component moves across all blocks, or a chosen set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainables.diagnostics.plasticity import plasticity_of
from trainables.engine.contract import ParamGroup, Prepared, Strategy, TrainingConfig
from trainables.models.transformer_blocks import COMPONENTS, component_kinds
from trainables.specs.metrics import COMPONENT, COMPONENTS_SELECTED

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel

AUTO = "auto"
TOP = 2
"""How many components `auto` trains unless `k` says otherwise: the paper's advice is attention and the first
feed-forward layer, the two most plastic ones of its networks."""


class Components(Strategy):
    """Trains one or several components of every block, the final norm and the head.

    Components are LN1, MHA, LN2, FC1 and FC2. All else is frozen, the embedding included.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"transformer_block"})
    measures: ClassVar[frozenset[str]] = frozenset({"gradients"})

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """The paper's recipe.

        SGD with momentum 0.9, gradients clipped at norm 1, cosine schedule, one rate for all that moves (1e-3, 3e-3,
        1e-2, 3e-2).
        """

        kinds: str | Sequence[str] = AUTO
        """Which components move: `auto` (the most plastic of the pretrained network), or any of ln1, mha, ln2, fc1 and
        fc2 as a list or joined by a plus sign, such as `mha+fc1`. Kept in the latter form."""
        k: int | None = None
        """How many components `auto` takes, by measured plasticity; None = 2. Only beside `auto`."""
        lr_backbone: float = 1e-2
        bn_mode: Literal["train", "eval"] = "eval"
        clip_norm: float | None = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            # The dataclass is frozen; equal choices get one spelling, whatever their order.
            object.__setattr__(self, "kinds", canonical(self.kinds))
            if self.k is None:
                return
            if self.kinds != AUTO:
                raise ValueError(
                    f"k is how many components kinds='auto' takes, but got k={self.k!r} beside kinds={self.kinds!r}. "
                    "Leave k out, or set kinds to 'auto'."
                )
            if isinstance(self.k, bool) or not isinstance(self.k, int) or not 1 <= self.k <= len(COMPONENTS):
                raise ValueError(f"k must be a whole number from 1 to {len(COMPONENTS)}, but got {self.k!r}.")

    def prepare(self, model: TaskModel, data: TrialData) -> Prepared:
        """Choose the components, by measured plasticity where `kinds` is `auto`; the state is their set.

        Raises:
            ValueError: the components are not defined for this network, or have no parameters in it.
        """
        owners = component_kinds(model)
        selected = self._selected(data)
        for kind in sorted(selected - set(owners.values())):
            raise ValueError(f"A component to be trained must have parameters, but {kind} has none in this network.")
        chosen = {COMPONENT.of(kind): float(kind in selected) for kind in COMPONENTS}
        report = {**super().prepare(model, data).report, **chosen, COMPONENTS_SELECTED.name: float(len(selected))}
        return Prepared(report, selected)

    def param_groups(self, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
        """The selected components and the final norm at η_θ, the head at η_w.

        Args:
            prepared: set of the selected components.
        """
        # The paper tunes the final norm and the head with every component.
        moving = prepared | {"final_norm"}
        owners = component_kinds(model)
        parameters = [parameter for name, parameter in model.named_parameters() if owners[name] in moving]
        return [ParamGroup("backbone", parameters, self.config.lr_backbone), self.head_group(model)]

    def moving_parameters(self, model: TaskModel) -> int:
        """All of the blocks, where plasticity chooses the components."""
        chosen = COMPONENTS if self.config.kinds == AUTO else self.config.kinds.split("+")
        moving = self.param_groups(model, frozenset(chosen))
        return sum(parameter.numel() for group in moving for parameter in group.parameters)

    def _selected(self, data: TrialData) -> frozenset[str]:
        if self.config.kinds != AUTO:
            return frozenset(self.config.kinds.split("+"))
        return frozenset(plasticity_of(data).rank[: self.config.k or TOP])


def canonical(kinds: Any) -> str:
    """`auto`, or the chosen components in the order of `COMPONENTS`, joined by a plus sign.

    Raises:
        ValueError: an unknown component, one that is named twice, or none.
    """
    if isinstance(kinds, str):
        names = kinds.split("+")
    else:
        names = list(kinds) if isinstance(kinds, (list, tuple)) else [kinds]
    names = [name.strip() if isinstance(name, str) else name for name in names]
    if names == [AUTO]:
        return AUTO
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(
            f"kinds must be 'auto' or some of {', '.join(COMPONENTS)}, each once, as a list or such as 'mha+fc1', but "
            f"got {kinds!r}."
        )
    return "+".join(kind for kind in COMPONENTS if kind in names)


STRATEGY = Components
