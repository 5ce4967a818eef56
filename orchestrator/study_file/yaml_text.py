"""YAML text of study files: strict reading with the line of every value, and writing.

Built on libyaml's event parser instead of PyYAML's constructors, so that a study is read as meant or refused:
numbers and booleans follow YAML 1.2 (`1e-3` is a number, `no` and `1:30` are strings), duplicate keys are errors
(PyYAML keeps the last one), alias expansion is bounded, and tags, which could name Python objects, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import KeyPath, Problem, StudyError

MAX_BYTES = 1_000_000
MAX_VALUES = 20_000
"""Values of one file, with aliases expanded."""
MAX_DEPTH = 20

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})

# PyYAML without libyaml yields the same events, only slower.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Document:
    """A file's data with line numbers."""

    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line (from 1) of the key or list item at each path."""

    def line(self, path: KeyPath) -> int | None:
        """Line of a path, or of its nearest ancestor in the file.

        A missing key has no line of its own.
        """
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def read_yaml(path: str | Path) -> Document:
    """Read one study file.

    Raises:
        StudyError: the file is missing, too large, not UTF-8, not one YAML mapping with string keys, or contains tags,
            duplicate keys, integers with leading zeros, or too many expanded aliases.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            # One byte more than allowed shows that a file is too large, whatever its size.
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _error(file, "there is no such file. `luthier init` writes one for your data.") from None
    except IsADirectoryError:
        raise _error(file, "this is a folder. Give the study file itself, usually study.yaml inside it.") from None
    except OSError as error:
        raise _error(file, f"it cannot be read: {error.strerror or error}.") from None
    if len(content) > MAX_BYTES:
        raise _error(file, f"a study file has at most {MAX_BYTES:,} bytes, but this one has more. Is it a data file?")
    try:
        # `-sig`: editors on Windows begin a file with a byte order mark.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _error(file, "a study file is UTF-8 text, but a byte here is not. Save it as UTF-8.", line) from None
    return parse_yaml(text, str(file))


def parse_yaml(text: str, source: str = "The study") -> Document:
    r"""Parse the text of a study file (errors: see `read_yaml`).

    >>> document = parse_yaml("name: pets\nsearch: {trials: 60}\n")
    >>> document.data
    {'name': 'pets', 'search': {'trials': 60}}
    >>> document.line(("search", "trials"))
    2
    """
    reader = _Reader(text)
    try:
        data = reader.document()
    except _RefusedError as refused:
        raise StudyError([Problem((), refused.message, refused.line)], source) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        rule = f"this is not YAML: {error.problem or error.context}. Check indentation, colons and brackets near here."
        raise StudyError([Problem((), rule, line)], source) from None
    except yaml.YAMLError as error:
        raise StudyError([Problem((), f"this is not YAML: {error}.")], source) from None
    if reader.problems:
        raise StudyError(reader.problems, source)
    if not isinstance(data, dict):
        content = "is empty" if data is None else f"contains {data!r:.40}"
        rule = f"a study file is a mapping that starts with `name: …`, but this one {content}."
        raise StudyError([Problem((), rule, 1)], source)
    return Document(data, reader.lines)


def scalar(value: str) -> Any:
    """Value of an unquoted YAML scalar: None, bool, int, float or str.

    By the core schema of YAML 1.2.

    Raises:
        ValueError: an integer with leading zeros, which is octal in YAML 1.1.

    >>> scalar("1e-3"), scalar("no"), scalar("null"), scalar("true")
    (0.001, 'no', None, True)
    """
    if value in _NULLS:
        return None
    if value in _BOOLEANS:
        return _BOOLEANS[value]
    if _LEADING_ZERO.fullmatch(value):
        raise ValueError(
            f"an integer has no leading zero, but got {value} (octal in YAML 1.1, decimal in YAML 1.2). "
            f"Write {int(value)} for the number or '{value}' for the string."
        )
    if _INTEGER.fullmatch(value):
        return int(value)
    if _BASE.fullmatch(value):
        return int(value, 0)
    if _FLOAT.fullmatch(value) or _NOT_FINITE.fullmatch(value):
        return float(re.sub(r"\.(?=[infaINFA])", "", value))
    return value


class _RefusedError(Exception):
    def __init__(self, message: str, line: int) -> None:
        self.message = message
        self.line = line
        super().__init__(message)


class _Reader:
    """Builds the data of one document in one pass over its events."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._open_anchors: set[str] = set()
        self._values = 0

    def document(self) -> Any:
        data = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self._values:
                    raise _RefusedError("a study file holds one document, but a second one starts here.", _line(event))
                data = self._value(next(self._events), ())
        return data

    def _value(self, event: Any, path: KeyPath) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._count(1, event)
        # "!" makes a scalar a string, and names no type.
        if event.tag is not None and event.tag != "!":
            raise _RefusedError(f"tags are not allowed in a study, but got {event.tag!r}. Remove it.", _line(event))
        if len(path) > MAX_DEPTH:
            raise _RefusedError(f"a study is at most {MAX_DEPTH} levels deep, but this goes deeper.", _line(event))
        # An anchor's size includes its own value: each alias is charged what writing it out would cost.
        before = self._values - 1
        if event.anchor is not None:
            self._open_anchors.add(event.anchor)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(path)
        else:
            value = self._mapping(path)
        if event.anchor is not None:
            self._open_anchors.discard(event.anchor)
            self._anchors[event.anchor] = (value, self._values - before)
        return value

    def _scalar(self, event: Any, path: KeyPath) -> Any:
        plain = event.implicit[0] and event.style in (None, "")
        if not plain:
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            self.problems.append(Problem(path, str(error), _line(event)))
            return event.value

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            self.lines[here] = _line(event)
            items.append(self._value(event, here))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _RefusedError(
                    "a key is a single word, but here it is a list, a mapping or an alias.", _line(event)
                )
            key = self._value(event, path)
            if not isinstance(key, str):
                raise _RefusedError(f"a key is a string, but got {key!r}. Quote it if that is meant.", _line(event))
            if key == "<<":
                raise _RefusedError("merge keys (<<) are not allowed in a study. Write the keys out.", _line(event))
            here = (*path, key)
            if key in values:
                first = self.lines[here]
                self.problems.append(
                    Problem(here, f"this key is given twice, first on line {first}. Keep one of them.", _line(event))
                )
            else:
                self.lines[here] = _line(event)
            values[key] = self._value(next(self._events), here)
        return values

    def _alias(self, event: Any) -> Any:
        if event.anchor in self._open_anchors:
            raise _RefusedError(f"the alias *{event.anchor} lies inside itself.", _line(event))
        if event.anchor not in self._anchors:
            raise _RefusedError(f"the alias *{event.anchor} has no anchor &{event.anchor} before it.", _line(event))
        value, size = self._anchors[event.anchor]
        self._count(size, event)
        return value

    def _count(self, values: int, event: Any) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _RefusedError(
                f"a study has at most {MAX_VALUES:,} values with all aliases written out, but this one has more.",
                _line(event),
            )


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _error(file: Path, message: str, line: int | None = None) -> StudyError:
    return StudyError([Problem((), message, line)], str(file), "cannot be read")


class _Dumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.2 would read as other values.

    Such as `1e3` and `012`, which PyYAML leaves plain.
    """


def _represent_string(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    try:
        is_plain = scalar(value) == value
    except ValueError:
        is_plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if is_plain else '"')


_Dumper.add_representer(str, _represent_string)


def write_yaml(fields: Mapping[str, Any]) -> str:
    """The text of a study file; `parse_yaml` returns the same fields.

    >>> print(write_yaml({"name": "1e3", "search": {"seed": 3}}), end="")
    name: "1e3"
    search:
      seed: 3
    """
    text: str = yaml.dump(dict(fields), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
