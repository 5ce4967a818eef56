"""The structure that everything stands on: three files per strategy, one-way imports, small files, no unsafe reads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import search_spaces
import trainables
from benchmarks.support.import_graph import components
from benchmarks.support.import_graph import imported as names_imported
from tests.conftest import THOROUGH
from tests.support.private_names import private_names
from tests.support.source_tree import ROOT, calls, dotted, imported, name, nodes, parsed, sources
from tests.unsafe_code import unsafe

PACKAGES = ("luthier", "orchestrator", "trainables", "search_spaces")
MAY_IMPORT_RAY = ("trainables/engine/tune_trainable.py", "trainables/engine/ray_internals.py")
MAY_READ_WEIGHTS = "trainables/models/weights.py"
"""The one module that reads `.pth` weight files, with `weights_only=True`."""
LAYERS = (
    "wording", "errors", "ray_internals", "cluster", "ingest", "record", "export", "study_file", "tracking", "search",
    "results", "report", "planning", "running", "study", "commands", "cli",
)  # fmt: skip
"""The parts of `orchestrator`; each may import those before it. Tracking is handed the summaries of results."""
TRAINABLES_LAYERS = ("specs", "storage", "demo", "models", "data", "tasks", "diagnostics", "engine")
"""The packages of `trainables`; each may import those before it. The strategies, at its root, may import all."""
PRIVATE_NAMES = {
    "orchestrator/ray_internals.py", "orchestrator/tracking/mlflow_internals.py",
    "trainables/models/torch_internals.py",
}  # fmt: skip
"""May use names that another library keeps private, each with a contract test. Conventions of timm and of Ray's logs
that are no names are in `trainables/models/timm_internals.py` and `trainables/engine/ray_internals.py`."""
READ_BACK = {
    ("orchestrator/export/formats.py", "mlflow.pyfunc.load_model"),
    ("orchestrator/export/formats.py", "torch.export.load"),
}
"""(file, function) that reads a format which may hold code: only what the same process has just written, to compare it.
`luthier.load` and `luthier predict` read neither format."""
LAZY_BOUNDARIES = {
    # The command and the facades answer before torch, ray and mlflow are loaded.
    "luthier/__init__.py", "orchestrator/__init__.py", "orchestrator/cli.py", "orchestrator/commands/console.py",
    "orchestrator/commands/data.py", "orchestrator/study.py", "orchestrator/study_file/entries.py",
    "trainables/__init__.py",
    # Only the tracking process loads mlflow and the summaries; matplotlib where something is drawn, timm where a model
    # is restored.
    "orchestrator/results/curves.py", "orchestrator/results/study_results.py",
    "orchestrator/running/tracking_process.py", "orchestrator/tracking/client.py",
    "orchestrator/tracking/local_database.py", "orchestrator/tracking/model_registry.py",
    "orchestrator/tracking/writer.py",
    # A private name that a release has moved breaks the one function that uses it.
    "orchestrator/ray_internals.py", "orchestrator/tracking/mlflow_internals.py",
    # Probes of a cluster take milliseconds without Ray; a decoder process takes pyarrow for Parquet only.
    "orchestrator/cluster/auth.py", "orchestrator/ingest/worker.py",
    # A machine for training alone may lack pyarrow, torchmetrics, peft, scikit-learn and matplotlib; the driver's
    # side of fault injection takes no torch.
    "trainables/data/store.py", "trainables/demo/digits.py", "trainables/demo/scenes.py", "trainables/lora.py",
    "trainables/specs/fault_injection.py", "trainables/storage/kept_predictions.py",
    "trainables/tasks/classification_metrics.py",
    # Libraries of one format of exports each, two of them optional.
    "orchestrator/export/formats.py", "orchestrator/export/segmentation_formats.py",
}  # fmt: skip
"""The only modules with imports inside functions; everywhere else imports stand at the top."""
REGISTRIES = (
    "orchestrator/cluster/shipping.py",
    "search_spaces/__init__.py",
    "trainables/engine/registry.py",
    "trainables/tasks/registry.py",
)
"""Import modules of this package by name, each after a look at the list of those that there are."""

METRIC_TABLE = "trainables/specs/metrics.py"
METRIC_NAME = re.compile(r"(best/)?(train|val|test|held_out|calib|ood/[^/]+)/[^/\s]*|(cost|best|calib)/\S*")
"""A recorded name, or the beginning of one, with `{}` for what an f-string fills in. `ood/{}` alone is a split of the
data store, not a metric."""
NO_METRIC_NAMES = {("trainables/engine/trial_state.py", "best/{}")}
"""(file, literal) of names that only look like those of metrics: the tensors of the best weights in a checkpoint."""

UNFINISHED = ("TO" + "DO", "FIX" + "ME", "dum" + "my", "place" + "holder")


def import_graph(*folders: str) -> dict[str, set[str]]:
    """Module → modules of the same folders that it imports anywhere."""
    trees = {
        file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree for file, tree in parsed(*folders)
    }
    return {module: (names_imported(tree) & set(trees)) - {module} for module, tree in trees.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module, each sorted."""
    return sorted(sorted(component) for component in components(graph) if len(component) > 1)


def literals(tree: ast.Module) -> Iterator[str]:
    """String literals but docstrings; of f-strings with `{}` for the expressions."""
    documentation = {id(node.value) for node in nodes(tree) if isinstance(node, ast.Expr)}
    parts = {id(value) for node in nodes(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    for node in nodes(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation | parts:
            yield node.value


def metric_literals(tree: ast.Module) -> list[str]:
    """Literals that name a recorded metric."""
    return [text for text in literals(tree) if METRIC_NAME.fullmatch(text)]


class TestOneStrategyIsThreeFiles:
    def test_every_strategy_has_its_search_space_and_no_space_lacks_its_strategy(self) -> None:
        assert trainables.strategies() == search_spaces.names()
        assert trainables.strategies(), "the folder is the registry, and it is empty"

    def test_every_strategy_has_its_test(self) -> None:
        tests = {file.stem.removeprefix("test_") for file in (ROOT / "tests/trainables").glob("test_*.py")}
        assert set(trainables.strategies()) <= tests

    @pytest.mark.parametrize("strategy", trainables.strategies())
    def test_the_names_of_the_space_are_those_of_the_config(self, strategy: str) -> None:
        fields = set(trainables.strategy_class(strategy).Config.__dataclass_fields__)
        assert set(search_spaces.space(strategy)) <= fields
        for preset in search_spaces.presets(strategy).values():
            assert preset.swept | set(preset.fixed) <= fields

    @pytest.mark.parametrize("strategy", trainables.strategies())
    def test_its_test_inherits_the_conformance_suite(self, strategy: str) -> None:
        text = (ROOT / f"tests/trainables/test_{strategy}.py").read_text(encoding="utf-8")
        assert "tests.conformance" in text


class TestImports:
    @pytest.mark.parametrize(
        ("folder", "forbidden"),
        [
            ("search_spaces", {"orchestrator", "trainables", "ray", "mlflow", "torch", "timm", "pandas", "numpy"}),
            ("trainables", {"orchestrator", "search_spaces", "ray", "mlflow", "optuna"}),
        ],
    )
    def test_leaves_import_nothing_back(self, folder: str, forbidden: set[str]) -> None:
        violations = [
            f"{file} imports {module}"
            for file, tree in parsed(folder)
            for module in imported(tree)
            if module.partition(".")[0] in forbidden and not (file in MAY_IMPORT_RAY and module.startswith("ray"))
        ]
        assert violations == []

    def test_the_parts_of_the_orchestrator_import_downwards_only(self) -> None:
        """Also inside functions and for types alone."""
        there = {file.stem for file in (ROOT / "orchestrator").iterdir()}
        assert there - {"__init__", "__pycache__", "py"} == set(LAYERS)
        parts = [(file, file.split("/")[1].removesuffix(".py"), tree) for file, tree in parsed("orchestrator")]
        violations = [
            f"{file} imports {module}"
            for file, part, tree in parts
            for module in imported(tree)
            if part in LAYERS and module.startswith("orchestrator.")
            if LAYERS.index(module.split(".")[1]) > LAYERS.index(part)
        ]
        assert violations == []

    def test_tracking_and_results_do_not_import_each_other(self) -> None:
        """A summary is handed to tracking by `orchestrator.running.tracking_process`."""
        between = {
            f"{folder} imports {module}"
            for folder, others in (("tracking", ("results", "report")), ("results", ("tracking",)))
            for _, tree in parsed(f"orchestrator/{folder}")
            for module in imported(tree)
            if module.startswith(tuple(f"orchestrator.{other}" for other in others))
        }
        assert between == set()

    def test_the_layers_of_trainables_import_downwards_only(self) -> None:
        """Also inside functions and for types alone; the package's own `__init__` is the registry's front."""
        packages = {file.parent.name for file in (ROOT / "trainables").glob("*/__init__.py")}
        assert packages == set(TRAINABLES_LAYERS)
        strategies = set(trainables.strategies())
        upwards = []
        for file, tree in parsed("trainables"):
            layer = file.split("/")[1]
            if layer not in TRAINABLES_LAYERS:
                continue
            for module in imported(tree):
                root, _, rest = module.partition(".")
                part = rest.partition(".")[0]
                if root != "trainables":
                    continue
                if part in strategies or not part or TRAINABLES_LAYERS.index(part) > TRAINABLES_LAYERS.index(layer):
                    upwards.append(f"{file} imports {module}")
        assert upwards == []

    def test_no_module_is_part_of_an_import_circle(self) -> None:
        """Over all modules of all packages, also inside functions and for types alone."""
        assert circles(import_graph(*PACKAGES)) == []

    def test_imports_inside_functions_stand_in_the_lazy_boundaries_only(self) -> None:
        files = {
            file
            for file, tree in parsed(*PACKAGES)
            for function in nodes(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(function))
        }
        assert files == LAZY_BOUNDARIES

    def test_nothing_outside_the_tests_imports_them(self) -> None:
        violations = [
            file for file, tree in parsed(*PACKAGES) for module in imported(tree) if module.startswith("tests")
        ]
        assert violations == []

    def test_the_command_loads_neither_torch_nor_ray(self) -> None:
        code = "import orchestrator, orchestrator.cli, sys; print(*sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        heavy = {"torch", "ray", "mlflow", "optuna", "timm", "pandas", "numpy", "sklearn", "pyarrow"}
        assert heavy & set(loaded.stdout.split()) == set()

    def test_the_tracking_process_loads_no_torch(self) -> None:
        """It runs beside every study; torch alone would be 400 MiB."""
        code = "import sys; from orchestrator.running import tracking_process as t; t.summarizer(); print(*sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert {"torch", "timm", "ray"} & set(loaded.stdout.split()) == set()

    def test_the_training_core_needs_only_torch_and_timm(self) -> None:
        """A bare GPU box without ray, mlflow, optuna and pyarrow can still run the loop."""
        code = (
            "import sys\n"
            "for name in ('ray', 'mlflow', 'optuna', 'pyarrow', 'orchestrator', 'search_spaces'):\n"
            "    sys.modules[name] = None\n"
            "import trainables.engine.loop, trainables.engine.optim, trainables.engine.contract\n"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert ended.returncode == 0, ended.stderr

    @pytest.mark.parametrize("package", PACKAGES)
    def test_packages_are_typed(self, package: str) -> None:
        assert (ROOT / package / "py.typed").exists()


class TestPrivateNames:
    def test_private_names_of_other_libraries_are_in_one_module_each(self) -> None:
        outside = [
            f"{file}:{use}"
            for file, tree in parsed(*PACKAGES)
            if file not in PRIVATE_NAMES
            for use in private_names(tree)
        ]
        assert outside == []

    @pytest.mark.parametrize(
        ("code", "use"),
        [
            ("from ray._private import services", "1: ray._private.services"),
            ("import ray._raylet", "1: ray._raylet"),
            ("from ray.tune.execution.tune_controller import TuneController", None),
            ("from torch.nn.modules.batchnorm import _BatchNorm", "1: torch.nn.modules.batchnorm._BatchNorm"),
            ("from mlflow.store.db import _helper as helper", "1: mlflow.store.db._helper"),
            ("import torch\ntorch._foreach_norm([])", "2: _foreach_norm"),
            ("actor._actor_id.hex()", "1: _actor_id"),
            ("trial._storage = None", "1: _storage"),
            ("getattr(client, '_server_ray_version', None)", "1: _server_ray_version"),
            ("class A(Base):\n    def f(self):\n        return self._metric", "3: _metric"),
            ("class A:\n    _storage: int\n    def f(self, trial):\n        return trial._storage", "4: _storage"),
            ("class A:\n    _x: int\nclass B(Base):\n    def f(self):\n        return self._x", "5: _x"),
            ("def _helper(): ...\nlibrary._helper()", "2: _helper"),
            ("class A:\n    def _f(self): ...\n    def g(self, b):\n        getattr(b, '_f')", "4: _f"),
        ],
    )
    def test_what_would_be_found(self, code: str, use: str | None) -> None:
        names = list(private_names(ast.parse(code)))
        assert names == [use] if use else names, code

    @pytest.mark.parametrize(
        "code",
        [
            "class A:\n    def __init__(self):\n        self._x = 1\n    def f(self):\n        return self._x",
            "class A:\n    def _f(self): ...\n    def g(self):\n        self._f()",
            "class A:\n    _x: int\n    def f(self):\n        return self._x",
            "class A:\n    _x: int\nclass B(A):\n    def f(self):\n        return self._x",
            "class A:\n    _x: int\n    def __eq__(self, other: A):\n        return other._x",
            "class A:\n    @classmethod\n    def f(cls):\n        a = cls.__new__(cls)\n        a._x = 1\n    _x: int",
            "class A:\n    _x = 1\ndef f():\n    return A._x, A()._x",
            "def _helper(): ...\n_helper()",
            "from trainables.data.store import _Meta",
            "pair._replace(left=1)",
            "value.__class__.__name__",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
            "    from ray.tune.execution.tune_controller import TuneController",
        ],
    )
    def test_what_is_let_through(self, code: str) -> None:
        assert list(private_names(ast.parse(code))) == [], code


class TestFiles:
    def test_every_file_has_an_owner(self) -> None:
        assert [name(f) for f in sources(*PACKAGES) if f.stem in ("utils", "helpers", "common", "misc")] == []

    def test_nothing_is_left_unfinished(self) -> None:
        violations = [
            f"{name(file)}: {word}"
            for file in sources(*PACKAGES, "benchmarks", "tests")
            for word in UNFINISHED
            if word in file.read_text(encoding="utf-8")
        ]
        assert violations == []


class TestMetricNames:
    """Every recorded name comes from the metric table, so that a metric or a task is added in one place."""

    def test_no_metric_name_is_a_literal(self) -> None:
        written = [
            (file, name) for file, tree in parsed(*PACKAGES) if file != METRIC_TABLE for name in metric_literals(tree)
        ]
        assert [pair for pair in written if pair not in NO_METRIC_NAMES] == []

    @pytest.mark.parametrize(
        "code",
        [
            "record.metric('best/val/acc')", "{'val/acc': 1.0}", "use(f'ood/{domain}/acc')", "use(f'test/{key}')",
            "name.startswith('cost/')", "use(f'best/{name}')", "use('calib/ece')", "use('train/loss')",
            "name.startswith('test/')",
        ],
    )  # fmt: skip
    def test_what_would_be_found(self, code: str) -> None:
        assert metric_literals(ast.parse(code))

    @pytest.mark.parametrize(
        "code",
        [
            "use(f'ood/{domain}')", "split.startswith('ood/')", "use('val')", "use('ood/<domain>/<class>/<image>')",
            "use('a test/b case')", "def f():\n    'best/val/acc'",
        ],
    )  # fmt: skip
    def test_what_is_let_through(self, code: str) -> None:
        assert metric_literals(ast.parse(code)) == []


class TestSafeReads:
    def test_no_code_from_data(self) -> None:
        violations = [
            f"{file}:{use}"
            for file, tree in parsed(*PACKAGES, "benchmarks")
            for use in unsafe(tree, registry=file in REGISTRIES)
        ]
        outside = [use for use in violations if (use.partition(":")[0], use.rpartition(" ")[2]) not in READ_BACK]
        assert outside == []

    def test_weight_files_are_read_by_one_module(self) -> None:
        violations = {
            file
            for file, tree in parsed(*PACKAGES)
            for node in nodes(tree)
            if isinstance(node, ast.Attribute) and dotted(node) in ("torch.load", "timm.models.load_state_dict")
        }
        assert violations == {MAY_READ_WEIGHTS}

    @pytest.mark.parametrize(
        "code",
        [
            "import pickle\npickle.loads(b)",
            "from pickle import loads",
            "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pickle.load(f)",
            "from ray import cloudpickle",
            "import ray.cloudpickle as fast",
            "import joblib",
            "eval(text)",
            "map(exec, texts)",
            "import builtins\nbuiltins.eval(text)",
            "__import__(name)",
            "import importlib\nimportlib.import_module(name)",
            "from importlib import import_module as get\nget(name)",
            "import pydoc\npydoc.locate(name)",
            "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
            "import yaml\nyaml.parse(text, Loader=yaml.UnsafeLoader)",
            "from yaml import full_load as read\nread(text)",
            "import torch\ntorch.load(file)",
            "import torch\ntorch.load(file, weights_only=False)",
            "import torch as t\nread = t.load",
            "from torch import load\nload(file)",
            "import torch\ngetattr(torch, 'load')(file)",
            "import torch\ntorch.save(model, file)",
            "import torch\ntorch.jit.load(file)",
            "import timm\ntimm.models.load_state_dict(file)",
            "import numpy as np\nnp.load(file)",
            "import numpy as np\nnp.load(file, None, True)",
            "import numpy as np\nnp.lib.format.read_array(file, allow_pickle=True)",
            "import pandas as pd\npd.read_pickle(file)",
            "import mlflow\nmlflow.pyfunc.load_model(uri)",
            "import optuna\noptuna.samplers.CmaEsSampler()",
            "from optuna.storages import JournalStorage\nJournalStorage(file)",
            "import os\nos.system(text)",
            "import subprocess\nsubprocess.run(text, shell=True)",
        ],
    )
    def test_what_would_be_found(self, code: str) -> None:
        assert list(unsafe(ast.parse(code))), code

    @pytest.mark.parametrize(
        "code",
        [
            "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass",
            "import torch\ntorch.load(file, weights_only=True)",
            "import numpy as np\nnp.load(file, allow_pickle=False)",
            "import re\nre.compile(text)",
            "import json\njson.loads(text)",
            "model.eval()\nmodel.load_state_dict(state)",
            "import yaml\nyaml.safe_load(text)",
        ],
    )
    def test_what_is_let_through(self, code: str) -> None:
        assert list(unsafe(ast.parse(code))) == [], code


class TestTests:
    def test_they_never_sleep(self) -> None:
        assert [file for file, tree in parsed("tests") for called, _ in calls(tree) if called == "time.sleep"] == []


class TestSharing:
    """What tests and benchmarks take from each other."""

    def test_benchmarks_import_no_tests(self) -> None:
        violations = [f"{file}: {module}" for file, tree in parsed("benchmarks") for module in mentioned(tree, "tests")]
        assert violations == []

    def test_tests_import_no_private_names_of_benchmarks(self) -> None:
        violations = []
        for file, tree in parsed("tests"):
            for node in nodes(tree):
                if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("benchmarks"):
                    continue
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                violations += [f"{file}: {node.module}" for part in names if part.startswith("_")]
        assert violations == []

    def test_test_modules_import_no_test_modules(self) -> None:
        """Also in the code of processes that they start."""
        violations = {
            file
            for file, tree in parsed("tests")
            for module in mentioned(tree, "tests")
            if module.rpartition(".")[2].startswith("test_")
        }
        assert violations == set()


class TestTiers:
    def test_what_is_left_out_of_the_fast_tests_exists(self) -> None:
        tests = []
        for file, tree in parsed("tests"):
            for node in tree.body:
                tests.append(f"{file}::{getattr(node, 'name', '')}")
                if isinstance(node, ast.ClassDef):
                    methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
                    tests += [f"{file}::{node.name}::{method.name}" for method in methods]
        assert [beginning for beginning in THOROUGH if not any(test.startswith(beginning) for test in tests)] == []


_IMPORT = re.compile(r"^\s*(?:from|import) +([\w.]+)", re.MULTILINE)


def mentioned(tree: ast.Module, package: str) -> list[str]:
    """Modules of `package` that are imported, or stand in import lines of a text in the code."""
    texts = [node.value for node in nodes(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    inside = [module for text in texts for module in _IMPORT.findall(text)]
    # `from package import module` imports a module, too.
    members = [
        f"{node.module}.{alias.name}"
        for node in nodes(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return [module for module in [*imported(tree), *members, *inside] if module.partition(".")[0] == package]
