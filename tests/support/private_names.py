"""Finds private names of other libraries in a module: what a release of theirs may change without notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator

OURS = ("orchestrator", "trainables", "search_spaces", "luthier", "tests", "benchmarks")
INNER_MODULES = ("ray.tune.execution", "ray.tune.tune", "ray.air.execution")
"""Modules without an underscore that their library does not document."""
STANDARD = {"_exit", "_replace", "_asdict", "_fields", "_make"}
"""Private by name only: `os._exit`, named tuples."""


def private_names(tree: ast.Module) -> Iterator[str]:
    """`line: name` of every private name of another library that a module imports or touches.

    An attribute with a leading underscore counts unless this very module defines one of that name: as a function, a
    class, a variable, a field, or by assigning it to `self` or `cls`. Attribute names in `getattr`, `setattr`,
    `hasattr`, `delattr` and `vars(…)[…]` count likewise; imports for types alone do not.
    """
    defined = set(_defined(tree)) | STANDARD
    types_only = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        for name in _named(node):
            parts = name.split(".")
            private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
            if isinstance(node, ast.Import | ast.ImportFrom):
                if parts[0] not in OURS and (private or name.startswith(INNER_MODULES)):
                    yield f"{node.lineno}: {name}"
            elif private and name not in defined:
                yield f"{node.lineno}: {name}"  # type: ignore[attr-defined]


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        name = node.args[1]
        if node.func.id in ("getattr", "setattr", "hasattr", "delattr") and isinstance(name, ast.Constant):
            yield str(name.value)


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            yield node.attr


def _is_own(owner: ast.expr) -> bool:
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
