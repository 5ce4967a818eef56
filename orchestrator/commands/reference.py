"""Reference tables of the study file's fields and of the strategies, generated from the code.

Used by the documents and by `luthier init`. `python -m orchestrator.commands.reference` regenerates the tables of
README.md and docs/study.md; tests compare them.
"""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import search_spaces
import trainables
from orchestrator.planning.plan import range_in_words
from orchestrator.study_file.schema import StrategyEntry, StudySpec
from orchestrator.study_file.yaml_text import scalar

_SIGNS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
"""Bound → its sign, and the attribute that holds its value."""
_TYPES_IN_WORDS = {int: "integer", float: "number", bool: "`true` or `false`", str: "string", Any: "anything"}
_FIELDS = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_STRATEGIES = re.compile(r"(<!-- strategies(?: of (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
DOCUMENTS = ("README.md", "docs/study.md", "docs/segmentation.md")


@dataclass(frozen=True)
class Row:
    """One key of a study file."""

    key: str
    kind: str
    """Type and bounds in words."""
    default: str
    """In YAML; empty = the key is required."""
    meaning: str


def sections() -> dict[str, type[BaseModel]]:
    """The parts of a study file by their key.

    `study` is the top level, `strategies` one entry of that list.
    """
    parts: dict[str, type[BaseModel]] = {"study": StudySpec}
    for key, info in StudySpec.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            parts[key] = info.annotation
        elif key == "strategies":
            parts[key] = StrategyEntry
    return parts


def rows(section: str) -> list[Row]:
    """The keys of one part; of the top level only those that are not sections."""
    model = sections()[section]
    nested = set(sections()) - {"strategies"} if section == "study" else set()
    return [_row(key, info) for key, info in model.model_fields.items() if key not in nested]


def yaml_value(value: Any) -> str:
    """A plain value as one line of YAML.

    >>> yaml_value([1, 0.5, None, True, "photo", "no"])
    "[1, 0.5, null, true, photo, 'no']"
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {yaml_value(item)}' for key, item in value.items())}}}"
    return _yaml_string(str(value))


def table(section: str) -> str:
    """The keys of one part as a Markdown table."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for row in rows(section):
        default = f"`{row.default}`" if row.default else "required"
        lines.append(f"| `{row.key}` | {row.kind} | {default} | {row.meaning} |")
    return "\n".join(lines)


def space_table(task: str) -> str:
    """Searched ranges and sweeps of all strategies for a task, as a Markdown table."""
    lines = ["| strategy | searched: default; range | published sweeps |", "|---|---|---|"]
    for name in trainables.strategies():
        lines.append(f"| `{name}` | {_searched(name, task)} |")
    return "\n".join(lines)


def strategy_table() -> str:
    """All strategies as a Markdown table: summary (first paragraph of the module), searched ranges, sweeps."""
    folder = Path(trainables.__file__).parent
    lines = ["| strategy | what it does | searched: default; range | published sweeps |", "|---|---|---|---|"]
    for name in trainables.strategies():
        text = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) or ""
        # The papers' texts are not part of the repository; their authors' names stay.
        summary = re.sub(r" \(papers/\d+[^)]*\)|, papers/\d+", "", re.sub(r"\s+", " ", text.split("\n\n")[0]))
        lines.append(f"| `{name}` | {summary} | {_searched(name, search_spaces.CLASSIFICATION)} |")
    return "\n".join(lines)


def _searched(name: str, task: str) -> str:
    """Cells of a strategy's ranges and sweeps."""
    ranges = [f"`{key}` {range_in_words(value)}" for key, value in search_spaces.space(name, task).items()]
    presets = [f"`{key}` ({_trials(preset.size)})" for key, preset in search_spaces.presets(name, task).items()]
    return f"{'<br>'.join(ranges) or '–'} | {'<br>'.join(presets) or '–'}"


def filled(document: str) -> str:
    """A Markdown document with regenerated tables.

    Between its `<!-- fields: … -->`, `<!-- strategies -->` and `<!-- strategies of … -->` marks.
    """
    document = _FIELDS.sub(lambda match: f"{match[1]}{table(match[2])}\n{match[3]}", document)
    return _STRATEGIES.sub(
        lambda match: f"{match[1]}{space_table(match[2]) if match[2] else strategy_table()}\n{match[3]}", document
    )


def _row(key: str, info: FieldInfo) -> Row:
    meaning = re.sub(r"\s+", " ", info.description or "").replace("|", "\\|")
    default = "" if info.is_required() else yaml_value(info.get_default(call_default_factory=True))
    if key == "label" and info.is_required():  # an entry without a label gets its strategy's name
        default = "= name"
    return Row(key, _kind(info.annotation, info.metadata), default, meaning)


def _kind(hint: Any, metadata: typing.Sequence[Any] = ()) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        inner, *extra = typing.get_args(hint)
        return _kind(inner, [m for e in extra for m in (getattr(e, "metadata", None) or [e])])
    if hint in _TYPES_IN_WORDS:
        bounds = _bounds(metadata)
        return f"{_TYPES_IN_WORDS[hint]} {bounds}" if bounds else _TYPES_IN_WORDS[hint]
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if typing.get_origin(hint) is list:
        if arguments[0] is str:
            return "list of strings"
        if "Entry" in str(arguments[0]):
            return "list of entries"
        return f"list of: {_kind(arguments[0])}"
    if typing.get_origin(hint) is dict:
        return "mapping"
    return " or ".join(_kind(argument, metadata) for argument in arguments)


def _bounds(metadata: typing.Sequence[Any]) -> str:
    signed = []
    for bound in metadata:
        for type_, (sign, attribute) in _SIGNS.items():
            if isinstance(bound, type_):
                signed.append(f"{sign} {getattr(bound, attribute):g}")
    return ", ".join(signed)


def _yaml_string(value: str) -> str:
    """A string, quoted where YAML 1.1 or 1.2 would read another value."""
    plain = re.fullmatch(r"[A-Za-z0-9_./~][A-Za-z0-9_./:~@+-]*(?<!:)", value) is not None
    try:
        is_same = plain and scalar(value) == value and value.lower() not in ("yes", "no", "on", "off", "y", "n")
    except ValueError:
        is_same = False
    return value if is_same else "'" + value.replace("'", "''") + "'"


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def main(root: Path = Path()) -> None:
    """Regenerate the tables of the documents; run it in the root of the repository."""
    for name in DOCUMENTS:
        file = root / name
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
