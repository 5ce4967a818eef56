"""What every strategy must keep, whatever it does: inherit `StrategyConformance` and name the strategy.

    class TestConformance(StrategyConformance):
        strategy = "daft"

Traits that differ between strategies are class attributes, set by the strategy's own test; nothing here asks for a
strategy's name. Networks and images are those of `tests.synthetic`, so that a strategy takes seconds on one core.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import search_spaces
from tests.synthetic import OOD_DOMAINS, shapes
from trainables import strategy_class
from trainables.engine.contract import TrainingConfig
from trainables.engine.trial import Run
from trainables.specs.trial_spec import ModelSpec, Task, TrialSpec
from trainables.storage.checkpoint_format import load_state, save_state

CLOCK = ("cost/unit_seconds", "cost/images_per_second", "cost/total_seconds", "cost/first_batch_seconds")
"""Metrics that measure time: the only ones that may differ between two runs of one trial."""

EVERY_UNIT = {
    *("train/loss", "train/acc", "val/acc", "val/nll", "lr/backbone", "lr/head"),
    *("cost/unit_seconds", "cost/images_per_second", "finished", "unit"),
}
AT_THE_END = {
    *("test/acc", "test/nll", "calib/ece", "ood/mean/acc", "ood/worst/acc", "best/val/acc", "best/epoch"),
    *(f"ood/{domain}/{name}" for domain in OOD_DOMAINS for name in ("acc", "nll", "ece")),
    *(f"distortion/{split}/{name}" for split in ("test", "ood/inverted", "ood/noisy") for name in ("cosine", "l2")),
    *("change/total", "change/head", "change/norm"),
}
DIAGNOSED = ("distortion/", "change/", "ln_shift/", "bn_shift/", "cka/", "grad_norm/")
"""First parts of the names that the base's own diagnostics report; which ones depends on the network."""
ONCE = {"cost/trainable_parameters", "cost/training_images", "cost/total_seconds", "cost/first_batch_seconds"}


def same_numbers(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    """Bit equality of two histories, clocks aside."""
    first, second = ([{k: v for k, v in unit.items() if k not in CLOCK} for unit in history] for history in (a, b))
    return first == second


class StrategyConformance:
    """Inherited by the test of every strategy."""

    strategy: ClassVar[str]
    networks: ClassVar[tuple[str, ...]] = ("vit", "cnn")
    """Kinds of network that the strategy means something for."""
    hparams: ClassVar[Mapping[str, Any]] = {}
    """What the tiny problem needs beside the defaults."""
    learning: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters with which the loss must fall on 64 images within `epochs`."""
    epochs: ClassVar[int] = 3
    reports: ClassVar[frozenset[str]] = frozenset()
    """Names that `prepare`, `solve` or `finalize` may add to the metrics; `*` at the end matches anything."""

    @pytest.fixture(autouse=True)
    def _small(self, one_thread: None, network: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> None:
        self._network = network
        self._folder = tmp_path_factory.mktemp("trial")

    def spec(self, kind: str, **hparams: Any) -> TrialSpec:
        """A short trial on one of the tiny networks."""
        task = Task(
            store="memory",
            model=ModelSpec(name=self._network(kind)),
            epochs=self.epochs,
            batch_size=16,
            cache=str(self._folder / "cache"),
        )
        return TrialSpec(task=task, strategy=self.strategy, hparams={**self.hparams, **hparams}, seed=3)

    def run(self, spec: TrialSpec) -> tuple[Run, list[dict[str, Any]]]:
        """All units of one trial."""
        run, history = Run(spec, store=shapes(), device="cpu"), []
        while not run.finished:
            history.append(run.step())
        return run, history

    def kinds(self) -> tuple[str, ...]:
        """The networks, each checked on its own in the tests below."""
        return self.networks

    def test_the_default_config_is_valid_and_the_search_space_holds_only_its_fields(self) -> None:
        cls = strategy_class(self.strategy)
        fields = {f.name for f in dataclasses.fields(cls.Config())}
        assert set(search_spaces.space(self.strategy)) <= fields
        cls.from_hparams(search_spaces.default_point(self.strategy))

    def test_an_unknown_hyperparameter_is_rejected_with_its_name(self) -> None:
        with pytest.raises(ValueError) as error:
            Run(self.spec(self.networks[0], no_such_knob=1))
        known = ", ".join(f.name for f in dataclasses.fields(strategy_class(self.strategy).Config))
        assert str(error.value) == f"{self.strategy} has no hyperparameter 'no_such_knob'. It has {known}."

    def test_one_seed_gives_one_result_whatever_else_the_process_did(self) -> None:
        for kind in self.kinds():
            _, first = self.run(self.spec(kind))
            torch.manual_seed(99)
            torch.rand(7)
            before = torch.random.get_rng_state()
            _, second = self.run(self.spec(kind))
            assert same_numbers(first, second)
            assert torch.equal(torch.random.get_rng_state(), before)

    def test_a_fresh_process_gives_the_same_result(self) -> None:
        spec = self.spec(self.networks[0])
        _, here = self.run(spec)
        script = (
            "import json, sys, torch; torch.set_num_threads(1)\n"
            "from tests.synthetic import shapes\n"
            "from trainables.engine.trial import Run\n"
            "from trainables.specs.trial_spec import TrialSpec\n"
            "run, history = Run(TrialSpec.from_dict(json.load(sys.stdin)), store=shapes(), device='cpu'), []\n"
            "while not run.finished: history.append(run.step())\n"
            "print(json.dumps(history))"
        )
        root = str(Path(__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(spec.to_dict()), capture_output=True, text=True, check=True, cwd=root,
        )  # fmt: skip
        assert same_numbers(here, json.loads(done.stdout.splitlines()[-1]))

    def test_only_parameters_of_the_groups_change_and_the_rest_is_equal_bit_for_bit(self) -> None:
        for kind in self.kinds():
            run = Run(self.spec(kind, **self.learning), store=shapes(), device="cpu")
            model = run.model
            moving = {id(p) for group in run.strategy.param_groups(model) for p in group.parameters}
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            while (
                not run.finished and run.unit < self.epochs - 1
            ):  # the last unit ends with `finalize`, which may merge
                run.step()
            changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
            allowed = {name for name, p in model.named_parameters() if id(p) in moving}
            assert changed <= allowed
            assert changed, "the strategy trained nothing"

    def test_the_result_has_the_structure_and_the_names_of_the_pretrained_network(self) -> None:
        for kind in self.kinds():
            run, _ = self.run(self.spec(kind))
            modules = [(name, type(module)) for name, module in run.model.backbone.named_modules()]
            assert modules == [(name, type(module)) for name, module in run.data.reference.named_modules()]
            assert run.model.backbone.state_dict().keys() == run.data.reference.state_dict().keys()

    def test_the_loss_falls_on_sixty_four_images(self) -> None:
        for kind in self.kinds():
            run = Run(self.spec(kind, **self.learning), store=shapes(), device="cpu")
            before = self.training_loss(run)
            while not run.finished:
                run.step()
            after = self.training_loss(run)
            assert after < before, f"{kind}: {before} -> {after}"

    def training_loss(self, run: Run) -> float:
        """Mean cross-entropy over the training images in eval mode."""
        with torch.no_grad():
            model = run.model.eval()
            images, labels = next(run.data.batches("train", batch_size=64))
            return float(torch.nn.functional.cross_entropy(model(images), labels))

    def test_a_resumed_trial_continues_bit_for_bit(self) -> None:
        for kind in self.kinds():
            spec = self.spec(kind)
            whole, history = self.run(spec)
            for units in range(1, len(history)):
                first = Run(spec, store=shapes(), device="cpu")
                start = [first.step() for _ in range(units)]
                save_state(self._folder / f"{kind}-{units}", first.state())
                second = Run(spec, store=shapes(), device="cpu")
                second.load_state(load_state(self._folder / f"{kind}-{units}"))
                rest = []
                while not second.finished:
                    rest.append(second.step())
                assert same_numbers(history, start + rest), f"{kind} after unit {units}"
                assert same_tensors(whole.model.state_dict(), second.model.state_dict())

    def test_p28_a_trial_cut_off_in_the_middle_of_a_unit_continues_bit_for_bit(self) -> None:
        for kind in self.kinds():
            spec = self.spec(kind)
            whole, history = self.run(spec)
            for unit, step in ((0, 2), (len(history) - 1, 3)):
                folder = self._folder / f"{kind}-{unit}-{step}"
                first = Run(spec, store=shapes(), device="cpu")
                start = [first.step() for _ in range(unit)]
                left = self.left_at(first, step, folder)
                if not left:
                    continue  # a unit in closed form has no steps
                torch.rand(7)  # whatever else happens in the process
                second = Run(spec, store=shapes(), device="cpu")
                second.load_state(load_state(folder))
                rest = [second.step() for _ in range(len(history) - unit)]
                assert same_numbers(history, start + rest), f"{kind}, unit {unit + 1}, step {step}"
                assert same_tensors(whole.model.state_dict(), second.model.state_dict())

    def left_at(self, run: Run, step: int, folder: Path) -> bool:
        """Do one more unit, keeping the state after `step` of its steps; whether it has steps at all."""
        steps = 0

        def keep() -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                save_state(folder, run.state())

        run.after_step = keep
        run.step()
        return steps > 0

    def test_a_recipe_that_converts_batch_norm_is_followed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not issubclass(strategy_class(self.strategy).Config, TrainingConfig):
            return  # it has no such recipe
        converted: list[object] = []

        def convert(model: object, data: object) -> dict[str, float]:
            converted.append(model)
            return {}

        monkeypatch.setattr("trainables.engine.contract.convert_on_training_data", convert)
        for kind in self.kinds():
            for asked in (False, True):
                converted.clear()
                run = Run(self.spec(kind, bn_conversion=asked), store=shapes(), device="cpu")
                assert converted == ([run.model] if asked else [])

    def test_the_features_at_the_start_are_those_of_the_pretrained_network(self) -> None:
        cls = strategy_class(self.strategy)
        for kind in self.kinds():
            run = Run(self.spec(kind), store=shapes(), device="cpu")
            with torch.no_grad():
                model = run.model.eval()
                images, _ = next(run.data.batches("test", batch_size=32))
                pretrained = run.data.backbone.module.eval()(images)
                difference = float((model.features(images) - pretrained).abs().max())
            scale = float(pretrained.abs().max())
            if cls.identity_at_start:
                assert difference <= 1e-4 * max(1.0, scale)
            else:
                assert difference > 0

    def test_metric_names_are_those_of_the_contract(self) -> None:
        for kind in self.kinds():
            _, history = self.run(self.spec(kind))
            for number, unit in enumerate(history, 1):
                last = number == len(history)
                expected = EVERY_UNIT | (AT_THE_END if last else set())
                assert expected <= unit.keys()
                extra = unit.keys() - expected - {"curves"} - (ONCE if last or number == 1 else set())
                assert {n for n in extra if not self.is_declared(n) and not n.startswith(DIAGNOSED)} == set()
                assert unit["unit"] == number
                assert unit["finished"] is last
                assert all(isinstance(v, float) for k, v in unit.items() if k not in ("finished", "unit", "curves"))
            assert history[-1].keys() >= ONCE

    def is_declared(self, name: str) -> bool:
        """Whether the strategy's test lists a report of this name."""
        return any(name == r or (r.endswith("*") and name.startswith(r[:-1])) for r in self.reports)


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit equality of two state dicts."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
