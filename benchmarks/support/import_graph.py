"""Imports between modules as a graph, from the syntax alone."""

from __future__ import annotations

import ast


def imported(tree: ast.Module) -> set[str]:
    """Full names of modules, and of names taken out of them, that a module imports anywhere."""
    targets: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            targets |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return targets


def components(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components, each after those that it imports (Tarjan, 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    ordered: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in index:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], index[target])
        if lowest[module] == index[module]:
            component: list[str] = []
            while not component or component[-1] != module:
                component.append(stack.pop())
            ordered.append(component)

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return ordered
