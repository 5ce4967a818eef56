"""A first study file for a person's own data, with every key explained where it stands."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.commands.reference import Row, rows, sections, yaml_value
from orchestrator.errors import PreflightError, Problem
from orchestrator.study_file.rules import RESERVED

if TYPE_CHECKING:
    from rich.console import Console

DIGITS_MODEL, MODEL = "digits_vit", "resnet18"
"""What a new study starts from; any timm name can take its place."""

_HEAD = """\
# A Luthier study. Every key is here; those that you do not need can be left out (docs/study.md has the defaults).
# Check it:      luthier plan {file}
# Run it:        luthier run {file}
# Where is it:   luthier status {file}
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
        label: the label column of Parquet files, where its name is no usual one.

    Returns:
        What was written, as JSON values: `study_file`, and the `fields` that were chosen.

    Raises:
        FileExistsError: the file exists (unless `force`).
        StudyError: a name that a study cannot have.
        PreflightError: a network that is not known.
        DataError: `data` holds no images that a study could use.
        OSError: the file cannot be written.
    """
    from orchestrator.ingest.check import detect
    from orchestrator.study_file.schema import StudySpec
    from trainables import strategies

    if output.exists() and not force:
        raise FileExistsError(f"{output} exists already. Give another file with --output, or replace it with --force.")
    fields = _digits(model) if data is None or detect(data) == "digits" else _found(data, model, label)
    fields["name"] = name or fields["name"]
    unfit = _unfit(fields["model"]["name"])
    fields["strategies"] = [strategy for strategy in strategies() if strategy not in unfit]
    StudySpec.from_fields(fields)
    text = render(fields, output, unfit)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"The study file needs a place that can be written, but {output} is none ({error.strerror}). Give another "
            "with --output."
        ) from error
    return {"study_file": str(output), "fields": fields}


def announced(written: Mapping[str, Any]) -> Callable[[Console], None]:
    """What a person is told."""
    file = written["study_file"]
    text = f"Wrote {file}. Look at it, then: luthier plan {shlex.quote(file)}"
    return lambda console: console.print(text, markup=False, highlight=False, soft_wrap=True)


def render(fields: Mapping[str, Any], file: Path, unfit: Mapping[str, str]) -> str:
    """The text of a study file: every key with what it means, at the given value or its default.

    Args:
        unfit: strategies that are left out, and why.
    """
    lines = [_HEAD.format(file=file)]
    for row in rows("study"):
        if row.key == "name":
            lines += _key(row, fields, "")
    for section in [s for s in sections() if s != "study"]:
        lines.append("")
        if section == "strategies":
            lines += _strategies(fields["strategies"], unfit)
            continue
        lines += _comment(sections()[section].__doc__ or "", "")
        given = fields.get(section, {})
        lines.append(f"{section}:")
        for row in rows(section):
            lines += _key(row, given, "  ")
    for row in rows("study"):
        if row.key == "storage":
            lines += ["", *_key(row, fields, "")]
    return "\n".join(lines) + "\n"


def _key(row: Row, given: Mapping[str, Any], indent: str) -> list[str]:
    lines = _comment(row.meaning.replace("\\|", "|"), indent)
    return [*lines, f"{indent}{row.key}: {yaml_value(given[row.key]) if row.key in given else row.default}"]


def _strategies(names: list[str], unfit: Mapping[str, str]) -> list[str]:
    lines = ["# Ways of fine-tuning that compete under one budget. Instead of a name, an entry may be"]
    lines += ["#   {name: daft, label: daft_no_conversion, fixed: {bn_conversion: false}}", "strategies:"]
    left = [f"  # {name}: {reason}" for name, reason in unfit.items()]
    return [*lines, *(f"  - {name}" for name in names), *left]


def _comment(text: str, indent: str) -> list[str]:
    plain = re.sub(r"\s+", " ", text).strip()
    return textwrap.wrap(plain, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _digits(model: str | None) -> dict[str, Any]:
    return {
        "name": "digits",
        "data": {"source": "digits"},
        "model": {"name": model or DIGITS_MODEL},
        "search": {"trials": 16, "epochs": 4},
    }


def _found(data: Path, model: str | None, label: str | None) -> dict[str, Any]:
    """Fields for real data. OOD is what the source marks so; else all domains but the largest, for the person to
    look at."""
    from orchestrator.ingest.check import detect
    from orchestrator.ingest.request import IngestRequest, open_source

    source = open_source(IngestRequest(source=detect(data), root=str(data), label=label))
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
        "data": {"source": source.kind, "root": str(data.resolve()), "id": inside, "ood": outside, "label": label},
        "model": {"name": model or MODEL},
        "search": {"trials": 40, "epochs": 20},
    }


def _unfit(model: str) -> dict[str, str]:
    """Strategies that this network cannot be tuned by here, and why; none where only a download would tell."""
    if ":" in model:
        return {}
    from importlib.util import find_spec

    from orchestrator.planning.preflight import layer_kinds
    from trainables import strategies, strategy_class
    from trainables.models.backbone import check_model
    from trainables.specs.trial_spec import ModelSpec

    try:
        check_model(ModelSpec(name=model, pretrained=False))
    except ValueError as error:
        raise PreflightError([Problem(("model",), str(error))]) from None
    kinds, found = layer_kinds(model), dict[str, str]()
    for name in strategies():
        lacking = sorted(strategy_class(name).needs - kinds)
        extras = [extra for package, extra in strategy_class(name).packages.items() if find_spec(package) is None]
        if lacking:
            found[name] = f"needs {lacking[0]} layers, of which {model} has none"
        elif extras:
            found[name] = f'needs pip install "luthier[{extras[0]}]"'
    return found
