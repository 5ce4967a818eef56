"""Measures of the code's structure, of this checkout or of two side by side.

    python -m benchmarks.structure                     this checkout
    python -m benchmarks.structure --before OTHER      OTHER checkout's figures beside

Counted over `orchestrator`, `trainables`, `search_spaces` and `luthier`, from the syntax alone: nothing is imported.
"Floors" are the longest chain of imports, circles counted as one floor; "arrows" are imports between
modules of one package.
"""

from __future__ import annotations

import argparse
import ast
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.support.import_graph import components, imported

PACKAGES = ("orchestrator", "trainables", "search_spaces", "luthier")
METRIC_TABLE = "trainables/specs/metrics.py"
METRIC_NAME = re.compile(r"^(best/)?(val|test|train|calib|held_out|ood/(mean|worst|\{\}))/(acc|nll|ece|loss)$")
PRIVATE_IMPORT = re.compile(r"^(ray|mlflow|timm|torch|optuna|peft)(\..*)?\._|^ray\._")
LIBRARIES = frozenset({"ray", "mlflow", "timm", "torch", "optuna", "peft"})


@dataclass
class Module:
    """One parsed source file."""

    name: str
    path: str
    text: str
    tree: ast.Module
    imports: set[str] = field(default_factory=set)


def modules(root: Path) -> list[Module]:
    """All modules of the packages below `root`."""
    parsed = []
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root).as_posix()
            name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            text = file.read_text(encoding="utf-8")
            parsed.append(Module(name, path, text, ast.parse(text, path)))
    names = {module.name for module in parsed}
    for module in parsed:
        module.imports = (imported(module.tree) & names) - {module.name}
    return parsed


def floors(graph: dict[str, set[str]]) -> int:
    """Modules on the longest chain of imports, a circle counted once."""
    floor: dict[str, int] = {}
    for component in components(graph):
        below = [floor[t] for module in component for t in graph[module] if t not in component]
        for module in component:
            floor[module] = 1 + max(below, default=0)
    return max(floor.values(), default=0)


def nodes(parsed: list[Module], kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[Module, ast.AST]]:
    """Every syntax node of a kind, with its module."""
    for module in parsed:
        for node in ast.walk(module.tree):
            if isinstance(node, kind):
                yield module, node


def nested_conditionals(parsed: list[Module]) -> int:
    """Conditional expressions directly inside a branch of another."""
    count = 0
    for _, node in nodes(parsed, ast.IfExp):
        assert isinstance(node, ast.IfExp)
        count += sum(isinstance(branch, ast.IfExp) for branch in (node.body, node.orelse, node.test))
    return count


def parallel_assignments(parsed: list[Module]) -> int:
    """`a, b = x, y`: a tuple display assigned to a tuple of names."""
    return sum(
        isinstance(node.value, ast.Tuple) and any(isinstance(target, ast.Tuple) for target in node.targets)
        for _, node in nodes(parsed, ast.Assign)
        if isinstance(node, ast.Assign)
    )


def function_imports(parsed: list[Module]) -> int:
    """Import statements inside functions."""
    return sum(
        isinstance(inner, ast.Import | ast.ImportFrom)
        for _, node in nodes(parsed, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    )


def comment_lines(parsed: list[Module], root: Path) -> int:
    """Comments that say something to a reader: directives for tools (`type:`, `noqa`, `fmt:`) are left out."""
    count = 0
    for module in parsed:
        with tokenize.open(root / module.path) as file:
            for token in tokenize.generate_tokens(file.readline):
                is_comment = token.type == tokenize.COMMENT
                count += is_comment and not re.match(r"#\s*(type:|noqa|fmt:|pragma|!)", token.string)
    return count


def docstring_examples(parsed: list[Module]) -> int:
    """Docstrings that hold a `>>>` example."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(">>> " in (ast.get_docstring(node) or "") for _, node in nodes(parsed, kinds))  # type: ignore[arg-type]


def metric_literals(parsed: list[Module]) -> int:
    """String literals outside the metric table that are a recorded metric name."""
    count = 0
    for module in parsed:
        if module.path == METRIC_TABLE:
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                count += METRIC_NAME.match(node.value) is not None
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                count += METRIC_NAME.match("".join(map(str, parts))) is not None
    return count


def private_uses(parsed: list[Module]) -> set[tuple[str, str]]:
    """(module, private name): private attributes of other libraries' modules and private names imported from them."""
    uses = set()
    for module in parsed:
        aliases: set[str] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in LIBRARIES:
                        aliases.add((alias.asname or alias.name).split(".")[0])
                        if any(part.startswith("_") for part in alias.name.split(".")):
                            uses.add((module.path, alias.name))
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
                for alias in node.names:
                    aliases.add(alias.asname or alias.name)
                    path = f"{node.module}.{alias.name}"
                    if any(part.startswith("_") and part != "__future__" for part in path.split(".")):
                        uses.add((module.path, path))
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                owner = ast.unparse(node.value).split(".")[0].split("(")[0]
                if owner in aliases:
                    uses.add((module.path, ast.unparse(node)))
    return uses


def measure(root: Path) -> dict[str, float | str]:
    """All measures of one checkout, by the name of their row."""
    parsed = modules(root)
    lines = sum(len(module.text.splitlines()) for module in parsed)
    thousands = lines / 1000
    rows: dict[str, float | str] = {"files": len(parsed), "lines": lines}
    lengths = sorted(len(module.text.splitlines()) for module in parsed)
    rows["lines per file: median / longest"] = f"{lengths[len(lengths) // 2]} / {lengths[-1]}"
    for package in PACKAGES:
        package_modules = [module for module in parsed if module.name.split(".")[0] == package]
        if not package_modules:
            continue
        names = {module.name for module in package_modules}
        graph = {module.name: module.imports & names for module in package_modules}
        arrows = sum(map(len, graph.values()))
        rows[f"{package}: files / floors / arrows"] = f"{len(package_modules)} / {floors(graph)} / {arrows}"
    whole = {module.name: module.imports for module in parsed}
    rows["import circles"] = sum(len(component) > 1 for component in components(whole))
    private = private_uses(parsed)
    rows["private names of libraries"] = len(private)
    rows["files that use them"] = len({path for path, _ in private})
    rows["metric names as literals"] = metric_literals(parsed)
    rows["nested conditional expressions"] = nested_conditionals(parsed)
    rows["parallel assignments per 1000 lines"] = round(parallel_assignments(parsed) / thousands, 1)
    rows["imports inside functions"] = function_imports(parsed)
    rows["comment lines per 1000 lines"] = round(comment_lines(parsed, root) / thousands, 1)
    rows["docstrings with an example"] = docstring_examples(parsed)
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, whose figures stand in the first column")
    arguments = parser.parse_args()
    columns = {"now": measure(Path(__file__).resolve().parent.parent)}
    if arguments.before is not None:
        columns = {"before": measure(arguments.before), **columns}
    width = max(len(row) for figures in columns.values() for row in figures)
    print(f"{'':{width}}  " + "  ".join(f"{name:>18}" for name in columns))
    for row in dict.fromkeys(row for figures in columns.values() for row in figures):
        print(f"{row:{width}}  " + "  ".join(f"{figures.get(row, '-')!s:>18}" for figures in columns.values()))


if __name__ == "__main__":
    main()
