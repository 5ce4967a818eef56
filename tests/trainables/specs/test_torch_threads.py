"""Weights that are the same whatever number of threads the process had before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.support.synthetic import write_network
from trainables.specs.torch_threads import torch_threads


def test_the_number_of_threads_is_restored_also_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        raise ZeroDivisionError(torch.get_num_threads())
    assert torch.get_num_threads() == before


def test_the_tiny_networks_do_not_depend_on_it(tmp_path: Path) -> None:
    weights = []
    for threads in (1, 2):
        with torch_threads(threads):
            folder = write_network("vit", tmp_path / str(threads))
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
