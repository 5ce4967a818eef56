"""Plain data as a study file that `orchestrator.study_file.yaml_loader` reads back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from orchestrator.study_file.yaml_loader import scalar


class _Dumper(yaml.SafeDumper):
    """Quotes texts that are words of YAML 1.2 with another meaning (`1e3`, `012`), which PyYAML takes for texts."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    try:
        plain = scalar(value) == value
    except ValueError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def write_yaml(fields: Mapping[str, Any]) -> str:
    """The text of a study file."""
    text: str = yaml.dump(dict(fields), Dumper=_Dumper, sort_keys=False, allow_unicode=True)  # only writes
    return text
