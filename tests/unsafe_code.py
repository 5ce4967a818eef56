"""What a source file uses that can turn data into running code, whatever name it was imported by."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support.source_tree import dotted, nodes

MODULES = frozenset({
    "pickle", "_pickle", "cloudpickle", "ray.cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "runpy",
    "torch.package", "torch.hub", "mlflow.pyfunc", "mlflow.pytorch", "mlflow.sklearn",
})  # fmt: skip
"""Modules whose purpose it is to make objects or run code from bytes."""
NAMES = frozenset({
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile",
    "builtins.__import__", "os.system", "os.popen", "pkgutil.resolve_name", "pydoc.locate",
    "importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader", "yaml.CFullLoader", "yaml.CUnsafeLoader",
    "torch.save", "torch.jit.load", "torch.hub.load", "torch.export.load", "torch.serialization.load",
    "pandas.read_pickle", "timm.models.load_checkpoint", "timm.models.resume_checkpoint",
    "optuna.storages.JournalStorage", "optuna.samplers.CmaEsSampler",
})  # fmt: skip
"""Functions and classes that do so, in modules that have other uses (Optuna's two unpickle what they stored)."""
IMPORTS_BY_STRING = frozenset({"importlib.import_module", "importlib.__import__"})
GUARDED = {
    "torch.load": ("weights_only", "True"),
    "timm.models.load_state_dict": ("weights_only", "True"),
    "numpy.load": ("allow_pickle", "False"),
}
"""Functions that are safe with one argument, which has to be there in so many words."""


def unsafe(tree: ast.Module, registry: bool = False) -> Iterator[str]:
    """`<line>: <what>` for every use.

    Args:
        registry: the file may import modules by a string.
    """
    names = _imported(tree)
    errors_only = _names_errors_only(tree)
    for node in nodes(tree):
        for module in _modules(node):
            if _within(module, MODULES) and not errors_only:
                yield f"{node.lineno}: import {module}"  # type: ignore[attr-defined]
        name = _name(node, names)
        if name in NAMES or (name in IMPORTS_BY_STRING and not registry) or name.endswith(".load_model"):
            yield f"{node.lineno}: {name}"  # type: ignore[attr-defined]
    yield from _unguarded(tree, names)
    for node in nodes(tree):
        if isinstance(node, ast.keyword) and node.arg == "shell" and ast.unparse(node.value) != "False":
            yield f"{node.value.lineno}: shell="
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"{node.value.lineno}: allow_pickle={ast.unparse(node.value)}"


def _unguarded(tree: ast.Module, names: dict[str, str]) -> Iterator[str]:
    """Uses of a guarded function other than a call with its guard."""
    safe = set()
    for node in nodes(tree):
        if isinstance(node, ast.Call):
            guard = GUARDED.get(_name(node.func, names))
            if guard in {(keyword.arg, ast.unparse(keyword.value)) for keyword in node.keywords}:
                safe.add(id(node.func))
    for node in nodes(tree):
        name = _name(node, names)
        if name in GUARDED and id(node) not in safe:
            yield f"{node.lineno}: {name} without {'='.join(GUARDED[name])}"  # type: ignore[attr-defined]


def _imported(tree: ast.Module) -> dict[str, str]:
    """Name in the file → what was imported under it."""
    names: dict[str, str] = {}
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                      for a in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _name(node: ast.AST, names: dict[str, str]) -> str:
    """The full name of what an expression refers to; empty if it is nothing of the kind."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = _name(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    if isinstance(node, ast.Call) and dotted(node.func) == "getattr" and len(node.args) > 1:
        owner = _name(node.args[0], names)
        attribute = node.args[1]
        return f"{owner}.{attribute.value!s}" if owner and isinstance(attribute, ast.Constant) else ""
    return ""


def _within(module: str, forbidden: frozenset[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[:end]) in forbidden for end in range(1, len(parts) + 1))


def _names_errors_only(tree: ast.Module) -> bool:
    """Whether pickle is used for the name of its own error alone, which torch raises for a damaged weight file."""
    used = [node for node in nodes(tree) if isinstance(node, ast.Name) and node.id == "pickle"]
    named = [n for n in nodes(tree) if isinstance(n, ast.Attribute) and dotted(n) == "pickle.UnpicklingError"]
    modules = {module for node in nodes(tree) for module in _modules(node) if _within(module, MODULES)}
    return len(used) == len(named) and modules == {"pickle"}
