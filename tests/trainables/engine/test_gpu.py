"""Trials on a real GPU: their device, their generators, and that they continue. Skipped where there is none.

Bits are not compared: cuDNN's sums come in any order. What must be exact is compared on the CPU, in the other modules.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.support.synthetic import shapes
from tests.support.trials import history_of
from trainables.engine.rng_state import isolated_randomness
from trainables.engine.trial import Trial
from trainables.models.precision import resolve_precision
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.storage.checkpoint_format import load_state, save_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="this machine has no GPU"),
]

ON_BOTH = ("full", "lp_ft", "daft", "bitfit", "linear_probe")
ON_TRANSFORMERS = ("layernorm", "components", "lora")
CASES = [(name, kind) for name in ON_BOTH for kind in ("vit", "cnn")] + [(name, "vit") for name in ON_TRANSFORMERS]

MakeSpec = Callable[..., TrialSpec]


@pytest.fixture
def spec(network: Callable[[str], str], tmp_path: Path) -> MakeSpec:
    """`spec("full", "cnn", precision="float32")`: two epochs on a tiny network."""

    def make(strategy: str, kind: str, precision: str = "auto") -> TrialSpec:
        model = ModelSpec(name=network(kind))
        cache = str(tmp_path / "cache")
        task = SharedTrialSettings(
            store="memory", model=model, epochs=2, batch_size=16, cache=cache, precision=precision
        )
        return TrialSpec(shared=task, strategy=strategy, seed=3)

    return make


def test_a_trial_runs_on_the_gpu_unless_it_is_configured_otherwise(spec: MakeSpec) -> None:
    trial = Trial(spec("full", "cnn"), store=shapes())
    assert trial.device.type == "cuda"
    trial.step()
    assert {tensor.device.type for tensor in trial.model.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize(("strategy", "kind"), CASES)
def test_in_float32_a_trial_learns_as_on_the_cpu(spec: MakeSpec, strategy: str, kind: str) -> None:
    """To a few per cent: the first unit's loss, before the two paths of rounding have gone far apart."""
    there = Trial(spec(strategy, kind, "float32"), store=shapes(), device="cuda").step()
    here = Trial(spec(strategy, kind, "float32"), store=shapes(), device="cpu").step()
    assert there["train/loss"] == pytest.approx(here["train/loss"], rel=0.05)
    assert there["val/nll"] == pytest.approx(here["val/nll"], rel=0.1)


@pytest.mark.parametrize(("strategy", "kind"), CASES)
def test_a_trial_in_the_default_precision_continues_from_its_checkpoint(
    spec: MakeSpec, strategy: str, kind: str, tmp_path: Path
) -> None:
    whole = history_of(Trial(spec(strategy, kind), store=shapes(), device="cuda"))
    first = Trial(spec(strategy, kind), store=shapes(), device="cuda")
    start = [first.step()]
    save_state(tmp_path / "state", first.state())
    second = Trial(spec(strategy, kind), store=shapes(), device="cuda")
    second.load_state(load_state(tmp_path / "state"))
    continued = start + history_of(second)
    assert [unit["unit"] for unit in continued] == [unit["unit"] for unit in whole]
    assert continued[-1]["train/loss"] == pytest.approx(whole[-1]["train/loss"], rel=0.1)
    assert continued[-1].keys() == whole[-1].keys()


def test_the_generator_of_the_gpu_comes_back() -> None:
    device = torch.device("cuda")
    torch.cuda.manual_seed(1)
    undisturbed = torch.rand(3, device=device)
    torch.cuda.manual_seed(1)
    with isolated_randomness(2**62 + 5, device):
        first = torch.rand(3, device=device)
    assert torch.equal(torch.rand(3, device=device), undisturbed)
    with isolated_randomness(2**62 + 5, device):
        assert torch.equal(torch.rand(3, device=device), first)


def test_a_trial_on_the_cpu_leaves_the_generator_of_the_gpu_alone() -> None:
    torch.cuda.manual_seed(1)
    undisturbed = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(1)
    with isolated_randomness(5, torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.rand(3, device="cuda"), undisturbed)


def test_auto_precision_is_bfloat16_where_the_gpu_has_it() -> None:
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    assert resolve_precision("auto", torch.device("cuda")) == expected
