"""Pydantic's validation errors as user-facing messages: the rule, the value found, the way out."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.errors import KeyPath, Problem, did_you_mean
from orchestrator.study_file.rules import RuleError

_MAPPING = "a mapping of keys to values"
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "finite_number": "a finite number",
}
"""Pydantic's type of error → the expected type."""
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
"""Pydantic's type of error → comparison in words, and the bound's key in the error's context."""
_FIRST_KEYS: dict[str | int, str] = {"data": "root", "model": "name"}
"""Section → the key that a string in its place is most likely meant for."""
_EXAMPLES: dict[str | int, str] = {
    "name": " Give the study (or model, or strategy) a name.",
    "data": " Say where your images are: data: {root: /path/to/images}, or data: {source: digits}.",
    "model": " Name a pretrained network: model: {name: resnet18}.",
    "strategies": " List what should compete: strategies: [linear_probe, full].",
}
"""Required key → the way out where it is missing."""
_MAX_VALUE_LENGTH = 60
"""Characters of a value that a message quotes at most."""


def explain(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every problem of a failed validation of `model`, with its path."""
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        path = tuple(detail["loc"])
        context = detail.get("ctx", {})
        cause = context.get("error")
        if isinstance(cause, RuleError):
            problems += [Problem((*path, *below), message) for below, message in cause.problems]
        elif detail["type"] == "missing" and path[-1] == "label":
            continue  # follows from the entry's missing name, which is reported by itself
        else:
            problems.append(Problem(path, _message(detail["type"], path, detail["input"], context, model)))
    return problems


def wrong_type(expected: str, value: Any) -> str:
    """The message for a value of another type, with the way out of common mistakes.

    >>> wrong_type("an integer", "60")
    "must be an integer, but got the string '60'. Remove the quotes."
    """
    return f"must be {expected}, but got {described(value)}.{_way_out(expected, value)}"


def described(value: Any) -> str:
    """A value with its type, cut to about 60 characters.

    >>> described("resnet18"), described(2.5), described(True), described(None)
    ("the string 'resnet18'", 'the number 2.5', 'true', 'null')
    """
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, bool):
        return str(value).lower()
    types_in_words = {int: "the number", float: "the number", str: "the string", list: "the list"}
    text = repr(value)
    if len(text) > _MAX_VALUE_LENGTH:
        text = text[: _MAX_VALUE_LENGTH - 3] + "…"
    return f"{types_in_words.get(type(value), f'a {type(value).__name__}')} {text}"


def _message(kind: str, path: KeyPath, value: Any, context: Mapping[str, Any], model: type[BaseModel]) -> str:
    """The message for one error that pydantic found itself (`kind` = its type of error)."""
    if kind == "extra_forbidden":
        keys = _keys_of_section(model, path[:-1])
        return f"unknown key.{did_you_mean(path[-1], keys)} Known here: {', '.join(keys)}."
    if kind == "missing":
        return f"is required, but missing.{_EXAMPLES.get(path[-1], '')}"
    if kind in _EXPECTED:
        message = wrong_type(_EXPECTED[kind], value)
        if _EXPECTED[kind] == _MAPPING and isinstance(value, str) and path[-1] in _FIRST_KEYS:
            message += f" Write {{{_FIRST_KEYS[path[-1]]}: {value}}}."
        return message
    if kind in _BOUNDS:
        comparison, key = _BOUNDS[kind]
        return f"must be {comparison} {context[key]:g}, but got {value!r}."
    if kind == "literal_error":
        options = [option for option in typing.get_args(_annotation(model, path)) if isinstance(option, str)]
        return f"must be one of {', '.join(options)}, but got {described(value)}.{did_you_mean(value, options)}"
    if kind == "string_too_short":
        return "must not be empty."
    if kind == "too_short":
        return "must list at least one, but got an empty list."
    return f"{context.get('error', kind)}, got {described(value)}."


def _way_out(expected: str, value: Any) -> str:
    """Way out of a common mistake, with a leading space; else empty.

    Mistakes with quotes, brackets and decimals.
    """
    if expected == "a boolean" and isinstance(value, str):
        return " Write true or false without quotes: YAML 1.2 has no other booleans."
    if expected in ("a number", "an integer") and isinstance(value, str) and _parses(float, value):
        if _parses(int, value) or expected == "an integer":
            return " Remove the quotes."
        return " Remove the quotes. (YAML 1.1 parsers read 1e-3 as a string even without quotes: write 1.0e-3 there.)"
    if expected == "an integer" and isinstance(value, float) and value.is_integer():
        return f" Write {value:.0f}."
    if expected == "a list" and isinstance(value, str):
        return f" Write [{value}]."
    if expected == "a string" and isinstance(value, bool | int | float):
        return " Put quotes around it."
    return ""


def _parses(type_: Callable[[str], object], value: str) -> bool:
    try:
        type_(value)
    except ValueError:
        return False
    return True


def _keys_of_section(model: type[BaseModel], path: KeyPath) -> list[str]:
    section = _annotation(model, path)
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return []


def _annotation(model: type[BaseModel], path: KeyPath) -> Any:
    """The declared type at a path, without `Annotated`, `None` and list."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            current = typing.get_args(current)[0]
        else:
            current = current.model_fields[part].annotation
        current = _bare(current)
    return current


def _bare(hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Annotated:
        return _bare(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return _bare(options[0]) if len(options) == 1 else hint
    return hint
