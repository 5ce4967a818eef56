"""Every field of the study file in words, from the models themselves: for docs/study.md and `luthier init`.

`python -m orchestrator.reference` writes the tables of docs/study.md anew.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.spec import StrategyEntry, StudySpec

_SIGNS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
_TABLE = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One key of a study file."""

    key: str
    kind: str
    """Type and bounds in words."""
    default: str
    """As it would be written in YAML; empty = the key is required."""
    meaning: str


def sections() -> dict[str, type[BaseModel]]:
    """The parts of a study file by their key; `study` is the top level, `strategies` one entry of that list."""
    parts: dict[str, type[BaseModel]] = {"study": StudySpec}
    for key, info in StudySpec.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            parts[key] = info.annotation
        elif key == "strategies":
            parts[key] = StrategyEntry
    return parts


def rows(section: str) -> list[Row]:
    """The keys of one part; of the top level only those that are not parts themselves."""
    model = sections()[section]
    nested = set(sections()) - {"strategies"} if section == "study" else set()
    return [_row(key, info) for key, info in model.model_fields.items() if key not in nested]


def written(value: Any) -> str:
    """A plain value as it stands in a study file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {written(v)}' for k, v in value.items())}}}"
    return _text(str(value))


def table(section: str) -> str:
    """The keys of one part as a Markdown table."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for row in rows(section):
        default = f"`{row.default}`" if row.default else "required"
        lines.append(f"| `{row.key}` | {row.kind} | {default} | {row.meaning} |")
    return "\n".join(lines)


def filled(document: str) -> str:
    """A Markdown document with the tables between its `<!-- fields: … -->` marks made anew."""
    return _TABLE.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", document)


def _row(key: str, info: FieldInfo) -> Row:
    meaning = re.sub(r"\s+", " ", info.description or "").replace("|", "\\|")
    default = "" if info.is_required() else written(info.get_default(call_default_factory=True))
    return Row(key, _kind(info.annotation, info.metadata), "= name" if key == "label" else default, meaning)


def _kind(hint: Any, metadata: typing.Sequence[Any] = ()) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        inner, *extra = typing.get_args(hint)
        return _kind(inner, [m for e in extra for m in (getattr(e, "metadata", None) or [e])])
    plain = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", Any: "anything"}
    bounds = ", ".join(
        f"{sign} {getattr(m, name):g}" for m in metadata for kind, (sign, name) in _SIGNS.items() if isinstance(m, kind)
    )
    if hint in plain:
        return plain[hint] + (f" {bounds}" if bounds else "")
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if typing.get_origin(hint) is list:
        return "list of entries" if "Entry" in str(arguments[0]) else "list of texts"
    if typing.get_origin(hint) is dict:
        return "mapping"
    return " or ".join(_kind(argument, metadata) for argument in arguments)


def _text(value: str) -> str:
    """A text, quoted where YAML would read something else."""
    from orchestrator.yaml_loader import scalar

    plain = re.fullmatch(r"[A-Za-z0-9_./~][A-Za-z0-9_./:~@+-]*(?<!:)", value) is not None
    try:
        same = plain and scalar(value) == value and value.lower() not in ("yes", "no", "on", "off", "y", "n")
    except ValueError:
        same = False
    return value if same else "'" + value.replace("'", "''") + "'"


def main(path: Path = Path("docs/study.md")) -> None:
    """Write the tables of the study file's documentation anew."""
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
