"""Rules of a study that a type alone does not say. Each raises `RuleError` with everything that it finds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.errors import Path as KeyPath
from orchestrator.errors import did_you_mean

if TYPE_CHECKING:
    from orchestrator.study_file.spec import DataSpec, SearchSpec, StudySpec

RESERVED = frozenset({"data", "cache", "mlartifacts", "mlflow.db"})
"""Names of other things in the storage folder, where each study has a folder of its own name."""
DIGITS_DOMAINS = ("inverted", "rotated", "noisy", "blurred", "printed")
"""OOD domains of the built-in data."""
OBJECTIVES = ("id_val", "leave_one_domain_out", "val_domain:<name>")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RuleError(ValueError):
    """Broken rules of one part of a study: (path below that part, message)."""

    def __init__(self, *problems: tuple[KeyPath, str]) -> None:
        self.problems = problems
        super().__init__("; ".join(message for _, message in problems))


def check_name(value: Any) -> Any:
    """A study's name is also a folder name, on every machine."""
    if isinstance(value, str) and not _NAME.fullmatch(value):
        raise RuleError(
            ((), f"a study's name has 1 to 100 letters, digits, '.', '_' or '-' and starts with a letter or digit, "
                 f"but got {value!r:.80}.")
        )  # fmt: skip
    if isinstance(value, str) and value.lower() in RESERVED:
        raise RuleError(((), f"{value!r} is kept for a folder beside the studies. Choose another name."))
    return value


def check_storage(value: Any) -> Any:
    """Studies are kept on a file system: the journal is appended to and locked, which object stores cannot do."""
    if isinstance(value, str) and "://" in value:
        raise RuleError(
            ((), f"storage is a folder, but got the URL {value!r}. Give a path that all machines share (such as an NFS "
                 "or EFS mount), and copy the finished study's folder to the object store afterwards.")
        )  # fmt: skip
    if isinstance(value, str) and not value.strip():
        raise RuleError(((), "storage is a folder, but got an empty text. Leave the key out for ./studies."))
    return value


def check_tracking_uri(value: Any) -> Any:
    """MLflow 3 takes server and database URIs; a bare path would silently mean its retired file store."""
    if isinstance(value, str) and "://" not in value and value != "databricks":
        raise RuleError(
            ((), f"a tracking URI is a server (http://host:5000) or a database (sqlite:///mlflow.db), but got "
                 f"{value!r}. Leave it out for a SQLite file in the storage folder.")
        )  # fmt: skip
    return value


def check_gpus(value: Any) -> Any:
    """auto, a whole number, or a share of one GPU."""
    wish = f"must be auto, a whole number of GPUs, or a share of one between 0 and 1, but got {value!r}."
    if value == "auto" and isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RuleError(((), wish + (" Remove the quotes." if _is_number(value) else "")))
    if not 0 <= value < 1e4 or (value > 1 and value != int(value)):
        raise RuleError(((), wish))
    return float(value)


def named_entry(value: Any) -> Any:
    """`daft` → `{name: daft, label: daft}`."""
    if isinstance(value, str):
        return {"name": value, "label": value}
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return {"label": value["name"], **value}
    return value


def check_data(spec: DataSpec) -> DataSpec:
    """Rules between the keys of `data`."""
    problems: list[tuple[KeyPath, str]] = []
    if spec.source == "digits":
        if spec.root is not None:
            problems.append((("root",), "the source 'digits' is built in and has no root. Remove one of the two."))
        problems += _unknown("ood", spec.ood, DIGITS_DOMAINS) + _unknown("id", spec.id, ("handwritten",))
    elif not spec.root:
        problems.append((("root",), f"the source {spec.source!r} needs a root: the path of your images."))
    if spec.root and "://" in spec.root:
        problems.append(
            (("root",), f"root is a path on this machine, but got the URL {spec.root!r}. Copy the data to a folder "
                        "that all machines can read.")
        )  # fmt: skip
    if spec.label is not None and spec.source != "parquet":
        problems.append(
            (("label",), f"only Parquet files have a label column to choose, but the source is {spec.source!r}. Remove "
                         "one of the two.")
        )  # fmt: skip
    for key, domains in (("id", spec.id), ("ood", spec.ood)):
        problems += [
            ((key, i), f"the domain {d!r} is listed twice.") for i, d in enumerate(domains) if d in domains[:i]
        ]
        problems += [((key, i), "the name of a domain is empty.") for i, d in enumerate(domains) if not d.strip()]
    problems += [
        (("ood", i), f"the domain {d!r} is both ID and OOD. Remove it from one of the two lists.")
        for i, d in enumerate(spec.ood)
        if d in spec.id
    ]
    if spec.val_fraction + spec.test_fraction >= 1:
        problems.append(
            (("test_fraction",), f"val_fraction + test_fraction must be less than 1, but got {spec.val_fraction:g} + "
                                 f"{spec.test_fraction:g}: nothing would be left to train on.")
        )  # fmt: skip
    if problems:
        raise RuleError(*problems)
    return spec


def check_objective(value: Any) -> Any:
    """A rule that never looks at test data."""
    if value == "oracle":
        raise RuleError(
            ((), "oracle chooses on test data and is only reported as an upper bound. Use id_val, "
                 "leave_one_domain_out, or val_domain:<name> with a domain that you give up as a test.")
        )  # fmt: skip
    if isinstance(value, str) and value not in OBJECTIVES[:2] and not re.fullmatch(r"val_domain:.+", value):
        raise RuleError(
            ((), f"must be one of {', '.join(OBJECTIVES)}, but got {value!r}.{did_you_mean(value, OBJECTIVES)}")
        )
    return value


def check_search(spec: SearchSpec) -> SearchSpec:
    """Rules between the keys of `search`."""
    problems: list[tuple[KeyPath, str]] = []
    if spec.grace > spec.epochs:
        problems.append(
            (("grace",), f"1 <= grace <= epochs must hold, but got grace {spec.grace} and epochs {spec.epochs}.")
        )
    if problems:
        raise RuleError(*problems)
    return spec


def check_study(spec: StudySpec) -> StudySpec:
    """Rules between the sections."""
    from orchestrator.study_file.diagnostics_rules import sample_problems

    problems = [*_objective_problems(spec), *sample_problems(spec)]
    if problems:
        raise RuleError(*problems)
    return spec


def _objective_problems(spec: StudySpec) -> Iterator[tuple[KeyPath, str]]:
    """The objective needs domains that `data` has."""
    search, data, path = spec.search, spec.data, ("search", "objective")
    if search.objective == "leave_one_domain_out" and (data.source == "digits" or len(data.id) == 1):
        yield (
            path,
            f"leave_one_domain_out needs at least 2 ID domains, but data.id has 1: "
            f"{data.id[0] if data.id else 'handwritten'}. List more domains there, or use id_val.",
        )
    domain = search.validation_domain
    known = data.ood or (DIGITS_DOMAINS if data.source == "digits" else ())
    if domain is not None and domain not in known:
        listed = ", ".join(known) or "nothing"
        yield (
            path,
            f"val_domain names one of the OOD domains, but got {domain!r} and data.ood lists {listed}."
            + (did_you_mean(domain, known) or " List it there."),
        )
    elif domain is not None and tuple(known) == (domain,):
        yield (
            path,
            f"val_domain:{domain} takes the only OOD domain as validation, so that no OOD test is left. List another "
            "domain under data.ood, or use id_val.",
        )


def _unknown(key: str, domains: Collection[str], known: Collection[str]) -> list[tuple[KeyPath, str]]:
    return [
        ((key, i), f"digits has the {key.upper()} domains {', '.join(known)}, but got {d!r}.{did_you_mean(d, known)}")
        for i, d in enumerate(domains)
        if d not in known
    ]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
