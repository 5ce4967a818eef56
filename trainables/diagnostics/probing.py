"""Rates of change of transformer components, measured during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import pad

from trainables.models.transformer_blocks import COMPONENTS, Block, linear_width

Function = Callable[..., Any]


@dataclass(frozen=True)
class _Probe:
    """A wrapped function: a component, or one of the two maps of a gated FC1."""

    block: int
    kind: str
    first: bool
    """Whether this function's input is counted (the maps of a gated FC1 share theirs)."""
    owner: nn.Module
    method: str
    module: nn.Module


class Probes:
    """Context manager that wraps the components of blocks and restores them on exit.

    Args:
        blocks: see `trainables.models.transformer_blocks.find_blocks`.
        embedding: apply the components to the token embeddings; False = to the activations that enter them.
    """

    def __init__(self, blocks: Sequence[Block], embedding: bool) -> None:
        self._blocks = blocks
        self._embedding = embedding
        self._probes = [probe for i, block in enumerate(blocks) for probe in _probes(i, block)]
        self._pairs = 0
        # Squared distances (pairs,) by (block, component)
        self._inputs: dict[tuple[int, str], Tensor] = {}
        self._outputs: dict[tuple[int, str], Tensor] = {}
        # Embeddings by shape of the tokens, and those last used in each block
        self._by_shape: dict[torch.Size, Tensor] = {}
        self._latest: dict[int, Tensor] = {}
        # Size of the input of each block's attention norm
        self._normed: dict[int, int] = {}

    def __enter__(self) -> Probes:
        for probe in self._probes:
            # Replaced rather than hooked: the component is called again, on other tokens, while the forward pass runs,
            # and windowed attention is a method of its block that no hook of torch reaches. An attribute of the
            # instance hides the method of its class, for `__call__` as for the block itself.
            setattr(probe.owner, probe.method, self._wrapped(probe, getattr(probe.owner, probe.method)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for probe in self._probes:
            # The method of the class is visible again.
            delattr(probe.owner, probe.method)
        self._clear()

    def rates(self, forward: Callable[[], Any], pairs: int) -> NDArray[np.float64]:
        """Rates (components, blocks, pairs) of one forward pass; NaN where x and y are equal.

        Args:
            forward: runs the network on a batch of 2·pairs images, first all x, then all y.
            pairs: number of pairs.

        Raises:
            ValueError: a component cannot be applied to the tokens, or was never called.
        """
        self._clear()
        self._pairs = pairs
        forward()
        keys = [(i, kind) for kind in COMPONENTS for i in range(len(self._blocks))]
        if missing := [key for key in keys if key not in self._inputs]:
            i, kind = missing[0]
            raise ValueError(f"{kind} of {self._blocks[i].name} was not called in the network's forward pass.")
        inputs = torch.stack([self._inputs[key] for key in keys]).cpu().numpy()
        outputs = torch.stack([self._outputs[key] for key in keys]).cpu().numpy()
        self._clear()
        # `np.where` computes the quotient for equal x and y too.
        with np.errstate(invalid="ignore", divide="ignore"):
            rates = np.where(inputs > 0, np.sqrt(outputs / inputs), np.nan)
        return rates.reshape(len(COMPONENTS), len(self._blocks), pairs)

    def _clear(self) -> None:
        for store in (self._inputs, self._outputs, self._by_shape, self._latest, self._normed):
            store.clear()

    def _wrapped(self, probe: _Probe, function: Function) -> Function:
        def measured(tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
            if probe.method != "forward" and any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
                self._refuse(probe, "it also reads queries that are computed from the image")
            output = function(tokens, *args, **kwargs)
            if self._embedding:
                x = self._embedding_for(probe, tokens)
                self._add(probe, x, self._apply(probe, function, x, args, kwargs))
            else:
                self._check_whole(probe, tokens)
                self._add(probe, tokens, output)
            return output

        return measured

    def _apply(self, probe: _Probe, function: Function, x: Tensor, args: Any, kwargs: Any) -> Any:
        if probe.kind == "fc2":
            x = self._padded(probe, x)
        return function(x, *args, **kwargs)

    def _check_whole(self, probe: _Probe, tokens: Tensor) -> None:
        """Refuse attention over padded windows, since outputs for padding tokens would count."""
        if probe.kind == "ln1":
            self._normed[probe.block] = tokens.numel()
        unpadded = self._normed.get(probe.block, tokens.numel())
        if probe.kind == "mha" and tokens.numel() > unpadded:
            values_per_token = 2 * self._pairs * tokens.shape[-1]  # over all images of the batch
            self._refuse(
                probe,
                f"its windows are filled up, from {unpadded // values_per_token} tokens an image to "
                f"{tokens.numel() // values_per_token}, and what "
                "comes of the filling is thrown away",
                "Use images of a size that whole windows cover, or another network.",
            )

    def _add(self, probe: _Probe, tokens: Tensor, output: Any) -> None:
        key = (probe.block, probe.kind)
        result = output[0] if isinstance(output, tuple) else output
        # Summed: the two maps of a gated FC1 are one function with concatenated outputs.
        self._outputs[key] = self._square_distances(probe, result) + self._outputs.get(key, 0.0)
        if probe.first:
            self._inputs[key] = self._square_distances(probe, tokens) + self._inputs.get(key, 0.0)

    def _square_distances(self, probe: _Probe, tokens: Tensor) -> Tensor:
        """Squared distances ‖x − y‖² (pairs,) float64."""
        if len(tokens) % (2 * self._pairs):
            self._refuse(probe, f"its tokens {tuple(tokens.shape)} are not sorted by image")
        # Windows of one image are adjacent in the first dimension, so that they become one row.
        x, y = tokens.reshape(2, self._pairs, -1)
        distances: Tensor = torch.linalg.vector_norm(x - y, dim=1, dtype=torch.float64)
        return distances.square()

    def _embedding_for(self, probe: _Probe, tokens: Tensor) -> Tensor:
        """Embeddings to apply the component to, instead of the `tokens` of the forward pass."""
        latest = self._latest.get(probe.block)
        if probe.kind == "fc2" and latest is not None:
            return latest
        embedding = self._by_shape.get(tokens.shape)
        if embedding is None and latest is not None:
            embedding = self._fitting(probe, tokens, latest)
        if embedding is None:
            # Tokens that enter the first block of a shape; copied: later layers may modify them in place.
            embedding = tokens.clone()
            self._by_shape[tokens.shape] = embedding
        self._latest[probe.block] = embedding
        return embedding

    def _fitting(self, probe: _Probe, tokens: Tensor, embedding: Tensor) -> Tensor | None:
        """Embeddings of the block, if a component with another token shape accepts them.

        None = the tokens start a new width, and become its embeddings.
        """
        if probe.kind == "mha":
            shapes = f"tokens {tuple(embedding.shape)} enter the block, which makes them {tuple(tokens.shape)} for it"
            self._refuse(probe, shapes)
        axis = _channel_axis(probe.module)
        if tokens.shape[axis] == embedding.shape[axis]:
            return embedding
        if probe.kind not in ("ln1", "ln2"):
            self._refuse(probe, f"it takes {tokens.shape[axis]} channels, the tokens have {embedding.shape[axis]}")
        return None

    def _padded(self, probe: _Probe, x: Tensor) -> Tensor:
        """Embeddings padded with zeros to the input width of FC2."""
        width = linear_width(probe.module)
        assert width is not None
        axis = _channel_axis(probe.module)
        missing = width[0] - x.shape[axis]
        if missing < 0:
            self._refuse(probe, f"it takes {width[0]} channels, fewer than the {x.shape[axis]} of the tokens")
        # `pad` counts axes from the last one: none of those behind the channels is padded.
        trailing_axes = x.ndim - 1 - axis % x.ndim
        return pad(x, [0, 0] * trailing_axes + [0, missing])

    def _refuse(self, probe: _Probe, why: str, way_out: str = "Use another network.") -> NoReturn:
        name = self._blocks[probe.block].name
        if self._embedding and probe.method == "forward":
            way_out = "Use probe='in_situ'."
        raise ValueError(
            f"Plasticity is that of functions of an image's tokens, but {probe.kind} of {name} is none: {why}. "
            f"{way_out}"
        )


def _probes(number: int, block: Block) -> list[_Probe]:
    owner, method = block.attention()
    probes = [_Probe(number, "mha", True, owner, method, block.mha)]
    for kind in COMPONENTS:
        if kind != "mha":
            parts = block.component(kind)
            probes += [_Probe(number, kind, part is parts[0], part, "forward", part) for part in parts]
    return probes


def _channel_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, (nn.Conv2d, nn.GroupNorm, LayerNorm2d)) else -1
