"""The public interface: its names, what they are, and that importing it is cheap."""

from __future__ import annotations

import doctest
import subprocess
import sys
from importlib.metadata import version

import pytest

import luthier
from orchestrator.export.model import Model, load
from orchestrator.export.segmentation_model import SegmentationModel
from orchestrator.results.study_results import Results
from orchestrator.study import Study
from tests.support.source_tree import ROOT, imported, parsed
from trainables.engine.contract import Strategy

HEAVY = ("torch", "ray", "mlflow", "optuna", "pandas", "numpy", "timm", "sklearn", "pyarrow", "pydantic")


def test_the_names_are_those_of_the_packages_below() -> None:
    assert luthier.__all__ == ["Model", "Results", "SegmentationModel", "Strategy", "Study", "__version__", "load"]
    assert (luthier.Study, luthier.Results, luthier.Strategy) == (Study, Results, Strategy)
    assert (luthier.Model, luthier.load) == (Model, load)
    assert luthier.SegmentationModel is SegmentationModel
    assert set(luthier.__all__) <= set(dir(luthier))


def test_the_version_is_that_of_the_distribution() -> None:
    assert luthier.__version__ == version("luthier")


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names() -> None:
    with pytest.raises(AttributeError, match=r"^module 'luthier' has no attribute 'study'\. It has Model, Results"):
        luthier.study  # noqa: B018


def test_importing_it_takes_no_heavy_library() -> None:
    code = f"import luthier, sys; luthier.__version__; dir(luthier); print(set({HEAVY}) & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout == "set()\n"


def test_from_luthier_import_study_takes_pydantic_alone() -> None:
    code = f"from luthier import Study; import sys; print(set({HEAVY}) & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout == "{'pydantic'}\n"  # which validates the fields


def test_the_example_of_its_docstring() -> None:
    failed, attempted = doctest.testmod(luthier)
    assert attempted >= 2
    assert failed == 0


def test_no_package_imports_it() -> None:
    """It is the top layer."""
    importing = [
        file
        for file, tree in parsed("orchestrator", "trainables", "search_spaces")
        for module in imported(tree)
        if module.split(".")[0] == "luthier"
    ]
    assert importing == []


def test_the_command_as_a_module() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "luthier", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ended.stdout == f"luthier {version('luthier')}\n"
