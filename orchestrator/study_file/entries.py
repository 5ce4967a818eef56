"""Validation of the entries of `strategies`: names, labels, presets and fixed hyperparameters.

Checked against the strategies themselves, so that a fixed hyperparameter meets the strategy's own `Config`.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

import trainables
from orchestrator.errors import KeyPath, Problem, did_you_mean
from orchestrator.study_file.explain import wrong_type
from trainables.specs.metrics import CLASSIFICATION, tasks

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")
_TYPES_IN_WORDS: dict[Any, str] = {int: "an integer", float: "a number", bool: "a boolean", str: "a string"}


def entry_problems(strategies: Any, task: Any = CLASSIFICATION.task) -> list[Problem]:
    """Problems of the entries beyond their types.

    Args:
        strategies: the raw value of the key, so that its problems are reported beside those of the rest of the study.
            Values of another type than the schema's are skipped: the schema reports them.
        task: raw value of the key, which sweeps and hyperparameters depend on.
    """
    if not isinstance(strategies, list) or task not in tasks():
        return []
    problems: list[Problem] = []
    labels: dict[str, int] = {}
    for index, raw in enumerate(strategies):
        path: KeyPath = ("strategies", index)
        entry = {"name": raw} if isinstance(raw, str) else raw
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            continue
        name_path = path if isinstance(raw, str) else (*path, "name")
        name_problems = list(_name_problems(entry["name"], name_path))
        problems += name_problems
        label = entry.get("label", entry["name"])
        if isinstance(label, str):
            problems += _label_problems(label, path, labels)
            labels.setdefault(label, index)
        if not name_problems:
            problems += _preset_problems(entry, path, task)
            problems += _fixed_problems(entry, path, task)
    return problems


def _name_problems(name: str, path: KeyPath) -> Iterator[Problem]:
    names = trainables.strategies()
    if name not in names:
        rule = f"a strategy is one of {', '.join(names)}, but got {name!r}.{did_you_mean(name, names)}"
        yield Problem(path, rule)


def _label_problems(label: str, path: KeyPath, labels: Mapping[str, int]) -> Iterator[Problem]:
    """Problems of one label; `labels` = label → index, of the entries before."""
    if label in labels:
        rule = f"the label {label!r} is taken by strategies[{labels[label]}]. Give each its own: {{name: …, label: …}}."
        yield Problem(path, rule)
    elif not _LABEL.fullmatch(label):
        rule = "a label has 1 to 50 letters, digits, '_' or '-' and starts with a letter or digit, but got "
        yield Problem((*path, "label"), f"{rule}{label!r:.80}.")


def _preset_problems(entry: Mapping[str, Any], path: KeyPath, task: str) -> Iterator[Problem]:
    name = entry.get("preset")
    fixed = entry.get("fixed")
    if not isinstance(name, str):
        return
    import search_spaces

    try:
        preset = search_spaces.preset(entry["name"], name, task)
    except ValueError as error:
        yield Problem((*path, "preset"), str(error))
        return
    for key in fixed if isinstance(fixed, Mapping) else ():
        if key in preset.swept:
            rule = f"the preset {name!r} sweeps {key}, so it cannot be fixed. Remove one of the two."
            yield Problem((*path, "fixed", key), rule)


def _fixed_problems(entry: Mapping[str, Any], path: KeyPath, task: str) -> Iterator[Problem]:
    """Unknown names, values of another type, and values that the strategy's own `Config` refuses."""
    fixed = entry.get("fixed")
    if not isinstance(fixed, Mapping) or not fixed:
        return
    # Imports torch, which only studies with fixed hyperparameters need here.
    config = trainables.strategy_class(entry["name"], task).Config
    hints = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    well_typed = {}
    for key, value in fixed.items():
        if key not in names:
            rule = f"{entry['name']} has no hyperparameter {key!r}.{did_you_mean(key, names)}"
            yield Problem((*path, "fixed", key), f"{rule} It has {', '.join(names)}.")
        elif message := _type_message(hints[key], value):
            yield Problem((*path, "fixed", key), message)
        else:
            well_typed[key] = tuple(value) if isinstance(value, list) else value
    try:
        config(**well_typed)
    except ValueError as error:
        yield Problem((*path, "fixed"), str(error))


def _type_message(hint: Any, value: Any) -> str | None:
    """Message for a value of another type; None = it fits.

    Lists stand for tuples, and integers for numbers.
    """
    try:
        # Strict: pydantic would otherwise convert "3" to 3.
        TypeAdapter(hint).validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError:
        return wrong_type(_type_in_words(hint), value)
    return None


def _type_in_words(hint: Any) -> str:
    if hint in _TYPES_IN_WORDS:
        return _TYPES_IN_WORDS[hint]
    options = [option for option in typing.get_args(hint) if option is not type(None) and option is not Ellipsis]
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    if typing.get_origin(hint) in (tuple, list):
        return "a list"
    if not options:
        return str(hint)
    return " or ".join(_type_in_words(option) for option in options)
