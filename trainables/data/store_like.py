"""What the training side needs of a store, so that a test or a benchmark may keep its images in memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class StoreLike(Protocol):
    """What is needed of `trainables.data.store.Store`; anything in memory will do as well."""

    @property
    def classes(self) -> list[str]: ...

    @property
    def domains(self) -> list[str]: ...

    @property
    def splits(self) -> list[str]: ...

    @property
    def digest(self) -> str: ...

    @property
    def image_size(self) -> int: ...

    def images(self, split: str) -> NDArray[np.uint8]: ...

    def labels(self, split: str) -> Indices: ...

    def domain_ids(self, split: str) -> Indices: ...

    def fraction(self, split: str, fraction: float, /) -> int: ...
