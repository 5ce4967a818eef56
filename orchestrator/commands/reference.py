"""Every field of the study file and every strategy in words, from the code itself: for documents and `luthier init`.

`python -m orchestrator.commands.reference` writes the tables of README.md and docs/study.md anew; tests compare them.
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

from orchestrator.study_file.spec import StrategyEntry, StudySpec

_SIGNS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
_FIELDS = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_STRATEGIES = re.compile(r"(<!-- strategies -->\n).*?(<!-- end -->)", re.DOTALL)
DOCUMENTS = ("README.md", "docs/study.md")


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


def strategy_table() -> str:
    """All strategies as a Markdown table: what each is (the first line of its module), searched ranges, sweeps."""
    import ast

    import search_spaces
    import trainables
    from orchestrator.planning.plan import law_in_words

    folder = Path(trainables.__file__).parent
    lines = ["| strategy | what it does | searched: default; range | published sweeps |", "|---|---|---|---|"]
    for name in trainables.strategies():
        text = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) or ""
        # The papers' texts are not part of the repository; their authors' names stay.
        summary = re.sub(r" \(papers/\d+[^)]*\)|, papers/\d+", "", re.sub(r"\s+", " ", text.split("\n\n")[0]))
        laws = [f"`{key}` {law_in_words(law)}" for key, law in search_spaces.space(name).items()]
        presets = [f"`{key}` ({_trials(preset.size)})" for key, preset in search_spaces.presets(name).items()]
        lines.append(f"| `{name}` | {summary} | {'<br>'.join(laws) or '–'} | {'<br>'.join(presets) or '–'} |")
    return "\n".join(lines)


def filled(document: str) -> str:
    """A Markdown document with the tables between its `<!-- fields: … -->` and `<!-- strategies -->` marks anew."""
    document = _FIELDS.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", document)
    return _STRATEGIES.sub(lambda found: f"{found[1]}{strategy_table()}\n{found[2]}", document)


def _row(key: str, info: FieldInfo) -> Row:
    meaning = re.sub(r"\s+", " ", info.description or "").replace("|", "\\|")
    default = "" if info.is_required() else written(info.get_default(call_default_factory=True))
    if key == "label" and info.is_required():  # of an entry, which is given its name
        default = "= name"
    return Row(key, _kind(info.annotation, info.metadata), default, meaning)


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
        if arguments[0] is str:
            return "list of texts"
        return "list of entries" if "Entry" in str(arguments[0]) else f"list of: {_kind(arguments[0], [])}"
    if typing.get_origin(hint) is dict:
        return "mapping"
    return " or ".join(_kind(argument, metadata) for argument in arguments)


def _text(value: str) -> str:
    """A text, quoted where YAML would read something else."""
    from orchestrator.study_file.yaml_loader import scalar

    plain = re.fullmatch(r"[A-Za-z0-9_./~][A-Za-z0-9_./:~@+-]*(?<!:)", value) is not None
    try:
        same = plain and scalar(value) == value and value.lower() not in ("yes", "no", "on", "off", "y", "n")
    except ValueError:
        same = False
    return value if same else "'" + value.replace("'", "''") + "'"


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def main(root: Path = Path()) -> None:
    """Write the generated tables of the documents anew; run it in the root of the repository."""
    for name in DOCUMENTS:
        file = root / name
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
