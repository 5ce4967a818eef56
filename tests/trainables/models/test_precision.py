"""Which type a trial's forward pass is computed in."""

from __future__ import annotations

import pytest
import torch

from trainables.models.precision import resolve_precision

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("hardware", "expected"), [(True, torch.bfloat16), (False, torch.float32)], ids=["hardware", "emulated"]
)
def test_auto_is_bfloat16_only_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch, hardware: bool, expected: torch.dtype
) -> None:
    """torch counts emulation as support; on a T4 or V100 emulated bfloat16 is slower than float32."""

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or hardware

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert resolve_precision("auto", GPU) == expected
    assert resolve_precision("bfloat16", GPU) == torch.bfloat16
    assert resolve_precision("float32", GPU) == torch.float32


def test_auto_is_float32_on_a_cpu() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32
