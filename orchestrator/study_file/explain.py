"""Pydantic's findings in words for a person: the rule, the value got, the way out."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.errors import Path as KeyPath
from orchestrator.errors import Problem, did_you_mean
from orchestrator.study_file.rules import RuleError

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def explain(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every problem of a failed validation of `model`, with its path."""
    problems: list[Problem] = []
    for found in error.errors(include_url=False):
        path = tuple(found["loc"])
        context = found.get("ctx", {})
        cause = context.get("error")
        if isinstance(cause, RuleError):
            problems += [Problem((*path, *below), message) for below, message in cause.problems]
        elif found["type"] != "missing" or path[-1] != "label":
            problems.append(Problem(path, _message(found["type"], path, found["input"], context, model)))
    return problems


def wrong_type(wanted: str, value: Any) -> str:
    """`must be a number, but got the text '1e-3'. …`, with the way out where the mistake is a common one."""
    return f"must be {wanted}, but got {described(value)}.{_way_out(wanted, value)}"


def described(value: Any) -> str:
    """A value with the name of its kind, at most about 60 characters."""
    kinds = {bool: "", int: "the number ", float: "the number ", str: "the text ", list: "the list "}
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return kinds.get(type(value), f"a {type(value).__name__} ") + (shown if len(shown) <= 60 else shown[:57] + "…")


def _message(kind: str, path: KeyPath, value: Any, context: Mapping[str, Any], model: type[BaseModel]) -> str:
    if kind == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        return f"unknown key.{did_you_mean(path[-1], known)} Known here: {', '.join(known)}."
    if kind == "missing":
        return f"is required, but missing.{_EXAMPLES.get(path[-1], '')}"
    if kind in _WANTED:
        inner = _FIRST_KEYS.get(path[-1]) if isinstance(value, str) and kind in ("dict_type", "model_type") else None
        return wrong_type(_WANTED[kind], value) + (f" Write {{{inner}: {value}}}." if inner else "")
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {context[key]:g}, but got {value!r}."
    if kind == "literal_error":
        choices = [c for c in _choices(model, path) if isinstance(c, str)]
        return f"must be one of {', '.join(choices)}, but got {described(value)}.{did_you_mean(value, choices)}"
    if kind == "string_too_short":
        return "must not be empty."
    if kind == "too_short":
        return "must list at least one, but got an empty list."
    return f"{context.get('error', kind)}, got {described(value)}."


_FIRST_KEYS: dict[str | int, str] = {"data": "root", "model": "name"}
"""What a text in place of a section is meant for."""
_EXAMPLES: dict[str | int, str] = {
    "name": " Give the study (or model, or strategy) a name.",
    "data": " Say where your images are: data: {root: /path/to/images}, or data: {source: digits}.",
    "model": " Name a pretrained network: model: {name: resnet18}.",
    "strategies": " List what should compete: strategies: [linear_probe, full].",
}


def _way_out(wanted: str, value: Any) -> str:
    if wanted == "true or false" and isinstance(value, str):
        return " YAML 1.2 has no other words for them, and they take no quotes."
    if wanted in ("a number", "a whole number") and isinstance(value, str) and _parses(float, value):
        if _parses(int, value) or wanted == "a whole number":
            return " Remove the quotes."
        return " Remove the quotes. (YAML 1.1 readers take 1e-3 for a text even without quotes: write 1.0e-3 there.)"
    if wanted == "a whole number" and isinstance(value, float) and value.is_integer():
        return f" Write {value:.0f}."
    if wanted == "a list" and isinstance(value, str):
        return f" Write [{value}]."
    if wanted == "a text" and isinstance(value, bool | int | float):
        return " Put quotes around it."
    return ""


def _parses(kind: Callable[[str], object], value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _known_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    section = _annotation(model, path)
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _choices(model: type[BaseModel], path: KeyPath) -> tuple[Any, ...]:
    return typing.get_args(_annotation(model, path))


def _annotation(model: type[BaseModel], path: KeyPath) -> Any:
    """The declared type at a path, without `Annotated`, `None` and list."""
    current: Any = model
    for part in path:
        current = typing.get_args(current)[0] if isinstance(part, int) else current.model_fields[part].annotation
        current = _bare(current)
    return current


def _bare(hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Annotated:
        return _bare(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        return _bare(options[0]) if len(options) == 1 else hint
    return hint
