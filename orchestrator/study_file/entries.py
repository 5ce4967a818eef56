"""The entries of `strategies`: names, labels, presets and fixed hyperparameters, against the strategies themselves."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.errors import Path as KeyPath
from orchestrator.errors import Problem, did_you_mean

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")


def entry_problems(strategies: Any) -> list[Problem]:
    """What is wrong with the entries beyond their types. Takes the raw value of `strategies`, so that it finds its
    problems beside those of the rest of the study; parts of another type than they should have are passed over."""
    if not isinstance(strategies, list):
        return []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for index, raw in enumerate(strategies):
        path: KeyPath = ("strategies", index)
        entry = {"name": raw} if isinstance(raw, str) else raw
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            continue
        where = path if isinstance(raw, str) else (*path, "name")
        known = _check_name(entry["name"], where, problems)
        label = entry.get("label", entry["name"])
        if isinstance(label, str):
            _check_label(label, index, seen, path, problems)
        if known:
            problems += _preset_problems(entry, path)
            problems += _fixed_problems(entry, path)
    return problems


def _check_name(name: str, path: KeyPath, problems: list[Problem]) -> bool:
    from trainables import strategies

    known = strategies()
    if name not in known:
        rule = f"a strategy is one of {', '.join(known)}, but got {name!r}.{did_you_mean(name, known)}"
        problems.append(Problem(path, rule))
    return name in known


def _check_label(label: str, index: int, seen: dict[str, int], path: KeyPath, problems: list[Problem]) -> None:
    if label in seen:
        rule = f"the label {label!r} is taken by strategies[{seen[label]}]. Give each its own: {{name: …, label: …}}."
        problems.append(Problem(path, rule))
    elif not _LABEL.fullmatch(label):
        rule = "a label has 1 to 50 letters, digits, '_' or '-' and starts with a letter or digit, but got "
        problems.append(Problem((*path, "label"), f"{rule}{label!r:.80}."))
    seen.setdefault(label, index)


def _preset_problems(entry: Mapping[str, Any], path: KeyPath) -> Iterator[Problem]:
    which, fixed = entry.get("preset"), entry.get("fixed")
    if not isinstance(which, str):
        return
    import search_spaces

    try:
        preset = search_spaces.preset(entry["name"], which)
    except ValueError as error:
        yield Problem((*path, "preset"), str(error))
        return
    for key in fixed if isinstance(fixed, Mapping) else ():
        if key in preset.swept:
            rule = f"the preset {which!r} sweeps {key}, so that it cannot be fixed. Remove one of the two."
            yield Problem((*path, "fixed", key), rule)


def _fixed_problems(entry: Mapping[str, Any], path: KeyPath) -> Iterator[Problem]:
    """Unknown names, values of another type, and values that the strategy's own `Config` refuses."""
    fixed = entry.get("fixed")
    if not isinstance(fixed, Mapping) or not fixed:
        return
    # Imports torch: only a study that fixes something pays for it.
    from trainables import strategy_class

    config = strategy_class(entry["name"]).Config
    hints = typing.get_type_hints(config)
    names = [f.name for f in dataclasses.fields(config)]
    sound = {}
    for key, value in fixed.items():
        if key not in names:
            near = did_you_mean(key, names)
            rule = f"{entry['name']} has no hyperparameter {key!r}.{near} It has {', '.join(names)}."
            yield Problem((*path, "fixed", key), rule)
        elif message := _type_message(hints[key], value):
            yield Problem((*path, "fixed", key), message)
        else:
            sound[key] = tuple(value) if isinstance(value, list) else value
    try:
        config(**sound)
    except ValueError as error:
        yield Problem((*path, "fixed"), str(error))


def _type_message(hint: Any, value: Any) -> str | None:
    """None where `value` is of the declared type; lists stand for tuples, and whole numbers for numbers."""
    from pydantic import TypeAdapter, ValidationError

    from orchestrator.study_file.explain import wrong_type

    try:
        TypeAdapter(hint).validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError:
        return wrong_type(_in_words(hint), value)
    return None


def _in_words(hint: Any) -> str:
    plain: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if hint in plain:
        return plain[hint]
    options = [option for option in typing.get_args(hint) if option is not type(None) and option is not Ellipsis]
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    if typing.get_origin(hint) in (tuple, list):
        return "a list"
    return " or ".join(_in_words(option) for option in options) if options else str(hint)
