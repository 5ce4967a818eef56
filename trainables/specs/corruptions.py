"""Which corruptions the network of a confirmed trial is measured under.

Standard library only, so that a study file is checked without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trainables.specs.suggestions import did_you_mean

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
        "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        "weather": ("snow", "frost", "fog", "brightness"),
        "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    }
)
"""The corruptions of Hendrycks and Dietterich (2019) in their four groups."""

COMMON = tuple(name for group in GROUPS.values() for name in group)
"""Names of the fifteen corruptions, in the order of the paper's tables."""

SEVERITIES = (1, 2, 3, 4, 5)


def check_corruption(name: str) -> None:
    """Refuse a name that is none of `COMMON`.

    Raises:
        ValueError: unknown corruption.
    """
    if name not in COMMON:
        raise ValueError(f"A corruption is one of {', '.join(COMMON)}, but got {name!r}.{did_you_mean(name, COMMON)}")


@dataclass(frozen=True, kw_only=True)
class CorruptionSettings:
    """Pictures and corruptions on which confirmed trials are measured."""

    names: tuple[str, ...] = COMMON
    images: int = 200
    """Pictures per corruption and severity: of ID test, or of the files in `folder`."""
    folder: str | None = None
    """Folder with corrupted pictures as CIFAR-10-C has them: `<corruption>.npy` and `labels.npy`. None = the ID test
    pictures are corrupted."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("Corruptions need at least one name, but got none.")
        for name in self.names:
            check_corruption(name)
        if self.images < 1:
            raise ValueError(f"images must be at least 1, but got {self.images!r}.")

    @property
    def evaluations(self) -> int:
        """Pictures that the network of one trial sees under corruptions."""
        return len(self.names) * len(SEVERITIES) * self.images

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CorruptionSettings:
        """Inverse of `dataclasses.asdict`; lists become tuples again."""
        values = dict(fields)
        values["names"] = tuple(values["names"])
        return cls(**values)
