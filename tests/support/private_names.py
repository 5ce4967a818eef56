"""Finds private names of other libraries in a module: what a release of theirs may change without notice."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping

from tests.support.source_tree import nodes

OURS = ("orchestrator", "trainables", "search_spaces", "luthier", "tests", "benchmarks")
INNER_MODULES = ("ray.tune.execution", "ray.tune.tune", "ray.air.execution")
"""Modules without an underscore that their library does not document."""
STANDARD = {"_exit", "_replace", "_asdict", "_fields", "_make"}
"""Private by name only: `os._exit`, named tuples."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Members = Mapping[str, frozenset[str]]
"""Class of the module → the names that it and its bases in the module define."""


def private_names(tree: ast.Module) -> Iterator[str]:
    """`line: name` of every private name of another library that a module imports or touches.

    An attribute with a leading underscore counts unless it is read from an object of this very module whose class, or
    a base of it in the module, defines one of that name: as a method, a variable, a field, or by assigning it. Objects
    of the module are `self` and `cls`, its classes, and variables whose annotation or construction names one of them.
    Attribute names in `getattr`, `setattr`, `hasattr` and `delattr` count likewise; imports for types alone do not.
    """
    members = _members(tree)
    types_only = {id(inner) for node in nodes(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    for node, classes in _with_classes(tree, {name: name for name in members}, members):
        if id(node) in types_only:
            continue
        for owner, name in _named(node):
            parts = name.split(".")
            private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
            if isinstance(node, ast.Import | ast.ImportFrom):
                if parts[0] not in OURS and (private or name.startswith(INNER_MODULES)):
                    yield f"{node.lineno}: {name}"
            elif private and name not in STANDARD and name not in members.get(_class_of(owner, classes) or "", ()):
                yield f"{node.lineno}: {name}"  # type: ignore[attr-defined]


def _named(node: ast.AST) -> Iterator[tuple[ast.expr | None, str]]:
    """(object, name) of every name that a node takes from an object or a module."""
    if isinstance(node, ast.Import):
        yield from ((None, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
        yield from ((None, f"{node.module}.{alias.name}") for alias in node.names)
    elif isinstance(node, ast.Attribute):
        yield node.value, node.attr
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        name = node.args[1]
        if node.func.id in ("getattr", "setattr", "hasattr", "delattr") and isinstance(name, ast.Constant):
            yield node.args[0], str(name.value)


def _members(tree: ast.Module) -> Members:
    classes = {node.name: node for node in nodes(tree) if isinstance(node, ast.ClassDef)}

    def defined(node: ast.ClassDef, visited: frozenset[str]) -> frozenset[str]:
        names = frozenset(_defined(node))
        for base in _names(node.bases):
            if base in classes and base not in visited:
                names |= defined(classes[base], visited | {base})
        return names

    return {name: defined(node, frozenset({name})) for name, node in classes.items()}


def _defined(class_: ast.ClassDef) -> Iterator[str]:
    """Names that a class defines in its body, or on objects of its own in its methods."""
    for statement in class_.body:
        if isinstance(statement, Function | ast.ClassDef):
            yield statement.name
        for node in ast.walk(statement) if not isinstance(statement, Function) else ():
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
    for node in ast.walk(class_):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _with_classes(
    node: ast.AST, classes: dict[str, str], members: Members
) -> Iterator[tuple[ast.AST, Mapping[str, str]]]:
    """Every node with the variables in its scope that hold an object of a class of the module, or the class itself."""
    yield node, classes
    if isinstance(node, ast.ClassDef):
        classes = classes | {"self": node.name, "cls": node.name}
    elif isinstance(node, Function):
        classes = classes | _locals(node, classes, members)
    for child in ast.iter_child_nodes(node):
        yield from _with_classes(child, classes, members)


def _locals(function: Function, classes: Mapping[str, str], members: Members) -> dict[str, str]:
    """Variable → class of the module, from the function's annotations and from what is constructed in it."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotated = [(argument.arg, argument.annotation) for argument in arguments]
    variables: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotated.append((node.target.id, node.annotation))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            class_ = _class_of(node.value, classes)
            variables |= {name: class_ for name in _names(node.targets) if class_ is not None}
    for name, annotation in annotated:
        for part in ast.walk(annotation) if annotation else ():
            if isinstance(part, ast.Name) and part.id in members:
                variables[name] = part.id
    return variables


def _class_of(value: ast.expr | None, classes: Mapping[str, str]) -> str | None:
    """Class of the module that a variable holds, or that a call constructs: `A(…)`, `cls(…)`, `cls.__new__(cls)`."""
    if isinstance(value, ast.Name):
        return classes.get(value.id)
    if isinstance(value, ast.Call):
        is_new = isinstance(value.func, ast.Attribute) and value.func.attr == "__new__"
        return _class_of(value.func.value if is_new else value.func, classes)  # type: ignore[attr-defined]
    return None


def _is_self(owner: ast.expr) -> bool:
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls")


def _names(expressions: Iterable[ast.expr]) -> list[str]:
    return [expression.id for expression in expressions if isinstance(expression, ast.Name)]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
