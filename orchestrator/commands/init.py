"""`luthier init`: a commented study file for the user's own data."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.commands.reference import Row, rows, sections, yaml_value
from orchestrator.errors import PreflightError, Problem
from orchestrator.ingest.check import detect, detect_task
from orchestrator.ingest.label_map import MaskRequest
from orchestrator.ingest.request import IngestRequest, scan
from orchestrator.planning.preflight import layer_kinds
from orchestrator.study_file.rules import RESERVED
from orchestrator.study_file.schema import StudySpec
from trainables import strategies, strategy_class
from trainables.models.backbone import check_model
from trainables.specs.trial_spec import ModelSpec

if TYPE_CHECKING:
    from rich.console import Console

DIGITS_MODEL = "digits_vit"
DEFAULT_MODEL = "resnet18"

_HEAD = """\
# A Luthier study. Every key is listed; those that you do not need can be left out (docs/study.md has the defaults).
# Preview:       luthier plan {file}
# Run:           luthier run {file}
# Progress:      luthier status {file}
"""


def write_study(
    data: Path | None,
    output: Path,
    *,
    model: str | None = None,
    name: str | None = None,
    label: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write a study file for the images at `data` (None = the built-in digits).

    Args:
        data: folder or file with the images.
        output: the study file.
        model: a timm model name; None = a default.
        name: the study's name; None = from the data.
        label: the label column of Parquet files, if its name is not among the usual ones.
        force: replace an existing file.

    Returns:
        JSON values: `study_file`, and the `fields` that were chosen.

    Raises:
        FileExistsError: the file exists (unless `force`).
        StudyError: an invalid name.
        PreflightError: an unknown network.
        DataError: no usable images in `data`.
        OSError: the file cannot be written.
    """
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists already. Give another file with --output, or replace it with --force.")
    if data is None or detect(data) == "digits":
        fields = _fields_of_digits(model)
    else:
        fields = _fields_of_data(data, model, label)
    fields["name"] = name or fields["name"]
    unusable = _unusable_strategies(fields["model"]["name"])
    fields["strategies"] = [strategy for strategy in strategies() if strategy not in unusable]
    # Refused here, before a file is written.
    StudySpec.from_fields(fields)
    text = render(fields, output, unusable)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"The study file must be writable, but {output} is not ({error.strerror}). Give another one with --output."
        ) from error
    return {"study_file": str(output), "fields": fields}


def announced(result: Mapping[str, Any]) -> Callable[[Console], None]:
    """Prints the result of `write_study` as text."""
    file = result["study_file"]
    text = f"Wrote {file}. Review it, then: luthier plan {shlex.quote(file)}"
    return lambda console: console.print(text, markup=False, highlight=False, soft_wrap=True)


def render(fields: Mapping[str, Any], file: Path, unusable: Mapping[str, str]) -> str:
    """The text of a study file.

    Every key with its meaning, at the chosen value or its default.

    Args:
        fields: the chosen fields.
        file: the study file, for the commands in its head.
        unusable: strategies that are left out, with the reason.
    """
    lines = [_HEAD.format(file=file)]
    for row in rows("study"):
        if row.key in ("name", "task"):
            lines += _key(row, fields, "")
    for section in [s for s in sections() if s != "study"]:
        lines.append("")
        if section == "strategies":
            lines += _strategies(fields["strategies"], unusable)
            continue
        lines += _comment(sections()[section].__doc__ or "", "")
        values = fields.get(section, {})
        lines.append(f"{section}:")
        for row in rows(section):
            lines += _key(row, values, "  ")
    for row in rows("study"):
        if row.key in ("warm_start", "keep", "storage"):
            lines += ["", *_key(row, fields, "")]
    return "\n".join(lines) + "\n"


def _key(row: Row, values: Mapping[str, Any], indent: str) -> list[str]:
    lines = _comment(row.meaning.replace("\\|", "|"), indent)
    value = yaml_value(values[row.key]) if row.key in values else row.default
    return [*lines, f"{indent}{row.key}: {value}"]


def _strategies(names: list[str], unusable: Mapping[str, str]) -> list[str]:
    lines = ["# Ways of fine-tuning that compete under one budget. Instead of a name, an entry may be"]
    lines += ["#   {name: daft, label: daft_no_conversion, fixed: {bn_conversion: false}}", "strategies:"]
    left_out = [f"  # {name}: {reason}" for name, reason in unusable.items()]
    return [*lines, *(f"  - {name}" for name in names), *left_out]


def _comment(text: str, indent: str) -> list[str]:
    plain = re.sub(r"\s+", " ", text).strip()
    return textwrap.wrap(plain, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _fields_of_digits(model: str | None) -> dict[str, Any]:
    return {
        "name": "digits",
        "data": {"source": "digits"},
        "model": {"name": model or DIGITS_MODEL},
        "search": {"trials": 16, "epochs": 4},
    }


def _fields_of_data(data: Path, model: str | None, label: str | None) -> dict[str, Any]:
    """Fields for real data.

    OOD = the domains that the source marks so, else all but the largest (to be reviewed).
    """
    kind = detect(data)
    masks = MaskRequest() if detect_task(data, kind) == "segmentation" else None
    source = scan(IngestRequest(source=kind, root=str(data), label=label, masks=masks))
    domains = Counter(sample.domain for sample in source.samples)
    outside = sorted(source.evaluation_domains & set(domains))
    if not outside and len(domains) > 1:
        outside = sorted(set(domains) - {domains.most_common(1)[0][0]})
    inside = sorted(set(domains) - set(outside))
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", data.resolve().stem).strip("-._")[:100] or "study"
    if stem.lower() in RESERVED:
        stem += "-study"
    return {
        "name": stem,
        "task": "classification" if masks is None else "segmentation",
        "data": {"source": source.kind, "root": str(data.resolve()), "id": inside, "ood": outside, "label": label},
        "model": {"name": model or DEFAULT_MODEL},
        "search": {"trials": 40, "epochs": 20},
    }


def _unusable_strategies(model: str) -> dict[str, str]:
    """Strategies that cannot tune this network here → the reason.

    Empty if only a download would tell.
    """
    # `local-dir:` and `hf-hub:` names, whose architecture is in a file.
    if ":" in model:
        return {}
    try:
        check_model(ModelSpec(name=model, pretrained=False))
    except ValueError as error:
        raise PreflightError([Problem(("model",), str(error))]) from None
    kinds = layer_kinds(model)
    reasons: dict[str, str] = {}
    for name in strategies():
        strategy = strategy_class(name)
        missing_kinds = sorted(strategy.needs - kinds)
        missing_extras = [extra for package, extra in strategy.packages.items() if find_spec(package) is None]
        if missing_kinds:
            reasons[name] = f"needs {missing_kinds[0]} layers, of which {model} has none"
        elif missing_extras:
            reasons[name] = f'needs pip install "luthier[{missing_extras[0]}]"'
    return reasons
