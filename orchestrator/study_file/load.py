"""Reading a study file.

Into a checked `StudySpec` with absolute paths, or all problems with their lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import Problem, StudyError
from orchestrator.ingest.label_map import BUILT_IN
from orchestrator.study_file.rules import COMMON_CORRUPTIONS
from orchestrator.study_file.schema import StudySpec
from orchestrator.study_file.yaml_text import read_yaml

_PATH_KEYS = (("data", "root"), ("model", "weights"))
"""Section and key of the values that are paths."""
_PREFIXED_PATH_KEYS = (("model", "name", "local-dir:"), ("tracking", "uri", "sqlite:///"))
"""Section, key and prefix of the values that are paths only behind that prefix."""


def load_study(path: str | Path) -> StudySpec:
    """Read a study file.

    Relative paths in it are made absolute, from the file's own folder.

    Raises:
        StudyError: all problems at once, with line numbers.
    """
    return StudySpec.model_validate(resolved_study(path))


def resolved_study(path: str | Path) -> dict[str, Any]:
    """The checked fields of a study file with absolute paths.

    They can be read on another machine.

    Raises:
        StudyError: see `load_study`.
    """
    file = Path(path)
    document = read_yaml(file)
    try:
        spec = StudySpec.from_fields(document.data)
    except StudyError as error:
        located = [Problem(p.path, p.message, document.line(p.path)) for p in error.problems]
        raise StudyError(located, str(path)) from None
    # Without defaults: those of the Luthier that reads the fields count.
    return absolute_paths(spec.model_dump(mode="json", exclude_unset=True), file.resolve().parent)


def absolute_paths(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a study's fields in which every path is absolute.

    These are data.root, data.labels (a label file), model.weights, model.name (`local-dir:…`), evaluate.corruptions
    where it is a folder, storage and a SQLite tracking.uri; URLs stay.
    Missing storage becomes `<folder>/studies`: a job's working directory is deleted with the job.
    """
    # A deep copy, because nested sections are written into.
    study: dict[str, Any] = json.loads(json.dumps(fields))

    def absolute(value: str) -> str:
        return value if "://" in value else str((folder / Path(value).expanduser()).absolute())

    data = study.get("data")
    labels = data.get("labels") if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(labels, str) and labels not in BUILT_IN:
        data["labels"] = absolute(labels)
    for section, key in _PATH_KEYS:
        if isinstance(study.get(section), dict) and study[section].get(key):
            study[section][key] = absolute(study[section][key])
    evaluate = study.get("evaluate")
    corruptions = evaluate.get("corruptions") if isinstance(evaluate, dict) else None
    if isinstance(corruptions, str) and corruptions != COMMON_CORRUPTIONS:
        study["evaluate"]["corruptions"] = absolute(corruptions)
    for section, key, prefix in _PREFIXED_PATH_KEYS:
        if isinstance(study.get(section), dict) and str(study[section].get(key) or "").startswith(prefix):
            study[section][key] = prefix + absolute(study[section][key].removeprefix(prefix))
    study["storage"] = absolute(study.get("storage") or "studies")
    return study
