"""Fixtures that several packages share. Tests get a cache of their own, never the person's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.trials import MakeTrial


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long come first: at the end no worker is left alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`$LUTHIER_CACHE` for the whole session."""
    before = os.environ.get("LUTHIER_CACHE")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LUTHIER_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["LUTHIER_CACHE"]
    else:
        os.environ["LUTHIER_CACHE"] = before


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`network("vit")` and `network("cnn")`: timm names of tiny local networks."""
    from benchmarks.support.synthetic import write_network

    root = tmp_path_factory.mktemp("networks")
    made: dict[str, str] = {}

    def name(kind: str) -> str:
        if kind not in made:
            made[kind] = f"local-dir:{write_network(kind, root / kind)}"
        return made[kind]

    return name


@pytest.fixture
def make_trial(network: Callable[[str], str], one_thread: None, tmp_path: Path) -> MakeTrial:
    """Short trials of the tiny networks: `make_trial("full", "cnn", lr_backbone=0.01)`."""
    from tests.support.trials import trial_maker

    return trial_maker(network, tmp_path)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """One torch thread, where speed does not matter and the machine is shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
