"""What travels to a cluster: code, and not too much of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.cluster import shipping
from orchestrator.cluster.shipping import ShippingError


def test_only_code_travels(tmp_path: Path) -> None:
    size = shipping.copy_packages(tmp_path / "job")
    names = {str(file.relative_to(tmp_path / "job")) for file in (tmp_path / "job").rglob("*") if file.is_file()}
    assert {"orchestrator/commands/submit.py", "trainables/__init__.py", "search_spaces/py.typed"} <= names
    assert not [name for name in names if "__pycache__" in name or "/." in name]
    assert size == sum(f.stat().st_size for f in (tmp_path / "job").rglob("*") if f.is_file()) < 5 * 2**20


def test_too_large(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(bytes(3 * 2**20))
    (tmp_path / "model.py").write_text("x")
    with pytest.raises(ShippingError) as caught:
        shipping.check_size([tmp_path / "weights.safetensors", tmp_path / "model.py"], limit_bytes=2 * 2**20)
    assert str(caught.value) == (
        "Luthier's packages must stay below 2 MiB to be sent to a cluster, but they hold 3 MiB. The largest files: "
        f"{tmp_path}/weights.safetensors (3 MiB), {tmp_path}/model.py (0 MiB). "
        "Move data and weights out of the packages; studies name them by path."
    )
