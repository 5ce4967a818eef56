"""The checkout's own source files, parsed: what tests of its structure ask."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sources(*folders: str) -> list[Path]:
    """Python files below the folders, sorted."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def name(file: Path) -> str:
    """Path below the checkout's root, with `/`."""
    return file.relative_to(ROOT).as_posix()


def parsed(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """(name, syntax tree) of every Python file below the folders."""
    for file in sources(*folders):
        yield name(file), _tree(file)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), name(file))


@cache
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """All nodes of a syntax tree, walked once: a dozen tests ask for them."""
    return tuple(ast.walk(tree))


def dotted(node: ast.expr) -> str:
    """`a.b.c` for names and attributes, the source text of any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ast.unparse(node)


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of all imported modules, also of those inside functions and under TYPE_CHECKING."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """(source text of the function, call) of every call."""
    for node in nodes(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node
