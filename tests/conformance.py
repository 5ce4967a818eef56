"""What every strategy must keep: inherit `StrategyConformance` and name the strategy.

    class TestConformance(StrategyConformance):
        strategy = "daft"

Traits that differ between strategies, or between tasks, are class attributes, set by the test that inherits; nothing
here asks for a strategy's or a task's name. Every test runs once per network of `networks`, on the images of `data`, so
that a strategy takes seconds on one core. A test that means nothing for a strategy is skipped with the reason.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.support.synthetic import ID_DOMAINS, OOD_DOMAINS
from tests.support.trials import copies, history_of, same_numbers, same_tensors
from trainables import strategy_class
from trainables.engine.contract import Strategy, TrainingConfig
from trainables.engine.trial import Trial
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.storage.checkpoint_format import load_state, save_state

EVERY_UNIT = {
    *("train/loss", "train/acc", "val/acc", "val/nll", "lr/backbone", "lr/head"),
    *("cost/unit_seconds", "cost/images_per_second", "cost/cpu_use", "finished", "unit"),
}
MEASURED = ("acc", "nll", "ece", "ece_scaled", "balanced_acc", "macro_f1", "auroc", "ap", "brier")
DOMAINS = (*(f"ood/{domain}" for domain in OOD_DOMAINS), *(f"id/{domain}" for domain in ID_DOMAINS))
AT_THE_END = {
    *("ood/mean/acc", "ood/worst/acc", "best/val/acc", "best/epoch", "calib/ece", "calib/ece_scaled"),
    *("calib/temperature", *(f"test/{name}" for name in MEASURED if not name.startswith("ece"))),
    *(f"{group}/{name}" for group in DOMAINS for name in MEASURED),
    *(f"distortion/{split}/{name}" for split in ("test", "ood/inverted", "ood/noisy") for name in ("cosine", "l2")),
    *("change/total", "change/head", "change/norm"),
}
DIAGNOSED = ("distortion/", "change/", "ln_shift/", "bn_shift/", "cka/", "grad_norm/")
"""First parts of the names that the base's own diagnostics report; which ones depends on the network."""
ONCE = {
    "cost/parameters", "cost/trainable_parameters", "cost/training_images", "cost/total_seconds",
    "cost/first_batch_seconds",
}  # fmt: skip
WHERE_REPORTED = {"cost/host_bytes", "cost/gpu_use", "cost/gpu_bytes"}
"""Recorded with every unit where the system reports them."""
PEAKS = {"cost/peak_host_bytes", "cost/peak_gpu_bytes"}
"""Recorded once where the system reports them."""

Whole = tuple[Trial, list[dict[str, Any]]]
"""A finished trial and the metrics of its units."""


def batch_norm_buffers(model: nn.Module) -> set[str]:
    """Names of the running statistics of all BatchNorm layers."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    return {f"{name}.{buffer}" for name, layer in layers for buffer, _ in layer.named_buffers(recurse=False)}


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
    task: ClassVar[str] = "classification"
    settings: ClassVar[Mapping[str, Any]] = {"batch_size": 16}
    """Shared settings of the trials."""
    data: ClassVar[str] = "benchmarks.support.synthetic:shapes"
    """Module and function of the images."""
    every_unit: ClassVar[frozenset[str]] = frozenset(EVERY_UNIT)
    """Names that every unit records."""
    at_the_end: ClassVar[frozenset[str]] = frozenset(AT_THE_END)
    """Names that the last unit records as well."""
    reports: ClassVar[frozenset[str]] = frozenset()
    """Names that `prepare`, `solve` or `finalize` may add to the metrics; `*` at the end matches anything."""

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """One case per network."""
        if "kind" in metafunc.fixturenames and metafunc.cls is not None:
            metafunc.parametrize("kind", metafunc.cls.networks)

    @pytest.fixture(scope="class")
    @classmethod
    def caches(cls, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Whole]]:
        """The trials' cache folder and the whole trials, shared by the tests of one class."""
        return tmp_path_factory.mktemp("conformance"), {}

    @pytest.fixture(autouse=True)
    def _small(
        self,
        one_thread: None,
        network: Callable[[str], str],
        caches: tuple[Path, dict[str, Whole]],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        self._network = network
        self._cache, self._whole = caches
        self._folder = tmp_path_factory.mktemp("trial")

    def spec(self, kind: str, **hparams: Any) -> TrialSpec:
        """A short trial on one of the tiny networks."""
        shared = SharedTrialSettings(
            store="memory",
            model=ModelSpec(name=self._network(kind)),
            epochs=self.epochs,
            cache=str(self._cache),
            task=self.task,
            **self.settings,
        )
        return TrialSpec(shared=shared, strategy=self.strategy, hparams={**self.hparams, **hparams}, seed=3)

    def trial(self, spec: TrialSpec) -> Trial:
        """A trial on the CPU, where the same numbers are the same bits."""
        module, _, function = self.data.partition(":")
        store = getattr(importlib.import_module(module), function)()
        return Trial(spec, store=store, device="cpu")

    def whole(self, kind: str) -> Whole:
        """The uninterrupted trial at the default point, computed once per class. Read it; do not change it."""
        if kind not in self._whole:
            run = self.trial(self.spec(kind))
            self._whole[kind] = run, history_of(run)
        return self._whole[kind]

    def strategy_class(self) -> type[Strategy]:
        """The strategy's class for the task."""
        return strategy_class(self.strategy, self.task)

    def solved_units(self) -> set[int]:
        """Units (from 0) in closed form, which have no optimiser steps."""
        strategy = self.strategy_class().from_hparams(self.hparams)
        phases = strategy.phases(self.epochs)
        kinds = [phase.solve is not None for phase in phases for _ in range(phase.units)]
        return {unit for unit, solved in enumerate(kinds) if solved}

    def test_the_default_config_is_valid_and_the_search_space_holds_only_its_fields(self) -> None:
        search_spaces = pytest.importorskip("search_spaces", reason="a machine for training alone may lack Optuna")
        cls = self.strategy_class()
        fields = {f.name for f in dataclasses.fields(cls.Config())}
        assert set(search_spaces.space(self.strategy, self.task)) <= fields
        default = search_spaces.default_point(self.strategy, task=self.task)
        config = cls.from_hparams(default).config
        assert {name: getattr(config, name) for name in default} == default

    def test_an_unknown_hyperparameter_is_rejected_with_its_name(self) -> None:
        with pytest.raises(ValueError) as error:
            Trial(self.spec(self.networks[0], no_such_knob=1))
        fields = ", ".join(f.name for f in dataclasses.fields(self.strategy_class().Config))
        assert str(error.value) == f"{self.strategy} has no hyperparameter 'no_such_knob'. It has {fields}."

    def test_one_seed_gives_one_result_whatever_else_the_process_did(self, kind: str) -> None:
        _, first = self.whole(kind)
        torch.manual_seed(99)
        torch.rand(7)
        before = torch.random.get_rng_state()
        second = history_of(self.trial(self.spec(kind)))
        assert same_numbers(first, second)
        assert torch.equal(torch.random.get_rng_state(), before)

    @pytest.mark.thorough
    def test_a_fresh_process_gives_the_same_result(self) -> None:
        spec = self.spec(self.networks[0])
        module, _, function = self.data.partition(":")
        _, here = self.whole(self.networks[0])
        script = (
            "import json, sys, torch; torch.set_num_threads(1)\n"
            f"from {module} import {function} as images\n"
            "from trainables.engine.trial import Trial\n"
            "from trainables.specs.trial_spec import TrialSpec\n"
            "run, history = Trial(TrialSpec.from_dict(json.load(sys.stdin)), store=images(), device='cpu'), []\n"
            "while not run.finished: history.append(run.step())\n"
            "print(json.dumps(history))"
        )
        root = str(Path(__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(spec.to_dict()), capture_output=True, text=True, check=True, cwd=root,
        )  # fmt: skip
        assert same_numbers(here, json.loads(done.stdout.splitlines()[-1]))

    def test_only_parameters_of_the_groups_change_and_the_rest_is_equal_bit_for_bit(self, kind: str) -> None:
        """Buffers too: running statistics of BatchNorm may follow the data under `bn_mode: train` alone."""
        run = self.trial(self.spec(kind, **self.learning))
        model = run.model
        moving = {id(p) for group in run.param_groups() for p in group.parameters}
        before = copies(model)
        last = max(1, self.epochs - 1)  # the last of several units ends with `finalize`, which may merge
        while not run.finished and run.unit < last:
            run.step()
        after = run.model.state_dict()
        assert after.keys() == before.keys()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        allowed = {name for name, p in model.named_parameters() if id(p) in moving}
        of_head = {name for name in batch_norm_buffers(model) if name.startswith("head.")}
        allowed |= of_head
        if getattr(run.strategy.config, "bn_mode", "eval") == "train":
            allowed |= batch_norm_buffers(model)
        assert changed <= allowed
        assert changed, "the strategy trained nothing"

    def test_the_result_has_the_structure_and_the_names_of_the_pretrained_network(self, kind: str) -> None:
        run, _ = self.whole(kind)
        modules = [(name, type(module)) for name, module in run.model.backbone.named_modules()]
        assert modules == [(name, type(module)) for name, module in self.pretrained(run).named_modules()]
        assert run.model.backbone.state_dict().keys() == run.data.reference.state_dict().keys()

    def pretrained(self, run: Trial) -> nn.Module:
        """The pretrained network as the task reads it."""
        return run.data.reference

    def test_the_loss_falls_on_sixty_four_images(self, kind: str) -> None:
        run = self.trial(self.spec(kind, **self.learning))
        before = self.training_loss(run)
        history_of(run)
        after = self.training_loss(run)
        assert after < before

    def training_loss(self, run: Trial) -> float:
        """Mean loss over the training images in eval mode."""
        with torch.no_grad():
            model = run.model.eval()
            images, targets = next(run.data.batches("train", batch_size=64))
            return float(run.task.loss(model(images), targets))

    def test_a_resumed_trial_continues_bit_for_bit(self, kind: str) -> None:
        """From the state after every unit; after the last one it is finished, with the same weights."""
        spec = self.spec(kind)
        whole, history = self.whole(kind)
        for units in range(1, len(history) + 1):
            first = self.trial(spec)
            start = [first.step() for _ in range(units)]
            save_state(self._folder / f"{kind}-{units}", first.state())
            second = self.trial(spec)
            second.load_state(load_state(self._folder / f"{kind}-{units}"))
            assert second.finished is (units == len(history))
            rest = history_of(second)
            assert same_numbers(history, start + rest), f"after unit {units}"
            assert same_tensors(whole.model.state_dict(), second.model.state_dict())

    @pytest.mark.parametrize("position", ["first", "last"])
    def test_p28_a_trial_cut_off_in_the_middle_of_a_unit_continues_bit_for_bit(self, kind: str, position: str) -> None:
        spec = self.spec(kind)
        whole, history = self.whole(kind)
        unit, step = (0, 2) if position == "first" else (len(history) - 1, 3)
        if unit in self.solved_units():
            pytest.skip(f"unit {unit + 1} is solved in closed form: it has no optimiser step to be cut off after")
        folder = self._folder / f"{kind}-{unit}-{step}"
        first = self.trial(spec)
        start = [first.step() for _ in range(unit)]
        self.save_after_step(first, step, folder)
        torch.rand(7)  # the process draws numbers of its own in between
        second = self.trial(spec)
        second.load_state(load_state(folder))
        rest = history_of(second)
        assert len(start) + len(rest) == len(history)
        assert same_numbers(history, start + rest)
        assert same_tensors(whole.model.state_dict(), second.model.state_dict())

    def save_after_step(self, run: Trial, step: int, folder: Path) -> None:
        """Do one more unit, and save the state after `step` of its optimiser steps."""
        steps = 0

        def save() -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                save_state(folder, run.state())

        run.after_step = save
        run.step()
        assert steps >= step, f"the unit had {steps} steps"

    def test_a_recipe_that_converts_batch_norm_is_followed(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        config = self.strategy_class().Config
        if not issubclass(config, TrainingConfig):
            pytest.skip(f"{self.strategy} has no `bn_conversion`: nothing of its network is trained by gradients")
        converted: list[object] = []

        def convert(model: object, data: object) -> dict[str, float]:
            converted.append(model)
            return {}

        monkeypatch.setattr("trainables.engine.contract.convert_on_training_data", convert)
        for asked in (False, True):
            converted.clear()
            run = self.trial(self.spec(kind, bn_conversion=asked))
            assert converted == ([run.model] if asked else [])

    def test_the_features_at_the_start_are_those_of_the_pretrained_network(self, kind: str) -> None:
        run = self.trial(self.spec(kind))
        with torch.no_grad():
            model = run.model.eval()
            images, _ = next(run.data.batches("test", batch_size=32))
            expected = self.pretrained_features(run, images)
            for features, pretrained in zip(self.listed(model.features(images)), self.listed(expected), strict=True):
                difference = float((features - pretrained).abs().max()) if pretrained.numel() else 0.0
                assert difference <= 1e-4 * max(1.0, float(pretrained.abs().max()) if pretrained.numel() else 1.0)

    def pretrained_features(self, run: Trial, images: Tensor) -> Any:
        """What the head sees of the pretrained network: its pooled output."""
        return run.data.backbone.module.eval()(images)

    def listed(self, features: Any) -> list[Tensor]:
        """Pooled features, or a list of maps, as a list."""
        return [features] if isinstance(features, Tensor) else list(features)

    def test_metric_names_are_those_of_the_contract(self, kind: str) -> None:
        _, history = self.whole(kind)
        for number, unit in enumerate(history, 1):
            last = number == len(history)
            expected = self.every_unit | (self.at_the_end if last else set())
            assert expected <= unit.keys()
            extra = (
                unit.keys() - expected - {"curves"} - WHERE_REPORTED - (ONCE | PEAKS if last or number == 1 else set())
            )
            assert {n for n in extra if not self.is_declared(n) and not n.startswith(DIAGNOSED)} == set()
            assert unit["unit"] == number
            assert unit["finished"] is last
            assert all(isinstance(v, float) for k, v in unit.items() if k not in ("finished", "unit", "curves"))
        assert history[-1].keys() >= ONCE

    def is_declared(self, name: str) -> bool:
        """Whether the strategy's test lists a report of this name."""
        return any(name == r or (r.endswith("*") and name.startswith(r[:-1])) for r in self.reports)
