"""Rules of a study that its types alone do not express.

Functions of plain values. `check_…` functions validate one value: they return it, or raise `RuleError`. `…_problems`
functions compare several keys: they yield one (path, message) per violation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from orchestrator.errors import KeyPath, did_you_mean
from orchestrator.ingest.label_map import MASK_SOURCES
from orchestrator.record.costs import COSTS
from trainables.specs.augmentations import AUGMENTATIONS, MASK_AUGMENTATIONS
from trainables.specs.corruptions import COMMON
from trainables.specs.metrics import task_metrics

RESERVED = frozenset({"data", "cache", "mlartifacts", "mlflow.db"})
"""Names in the storage folder that are not studies; each study has a folder of its own name there."""
DIGITS_DOMAINS = ("inverted", "rotated", "noisy", "blurred", "printed")
BUILT_IN_DOMAINS = {"digits": DIGITS_DOMAINS, "digits_scenes": ("inverted", "noisy", "blurred", "printed")}
"""Built-in source → its OOD domains."""
"""OOD domains of the built-in data."""
VAL_DOMAIN = "val_domain:"
"""Prefix of the objective that selects by one OOD domain."""
COMMON_CORRUPTIONS = "common"
"""Value of `evaluate.corruptions` that stands for all fifteen."""
OBJECTIVES = ("id_val", "leave_one_domain_out", f"{VAL_DOMAIN}<name>")

RuleProblem = tuple[KeyPath, str]
"""Path below the part of the study that was checked, and message."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._ -]{0,248}[A-Za-z0-9_-])?")


class RuleError(ValueError):
    """Violated rules of one part of a study."""

    def __init__(self, *problems: RuleProblem) -> None:
        self.problems = problems
        super().__init__("; ".join(message for _, message in problems))


def raise_if_any(*problems: RuleProblem) -> None:
    """Raise `RuleError` with all problems, if there are any."""
    if problems:
        raise RuleError(*problems)


# Rules for one value.


def check_name(value: Any) -> Any:
    """Validate a study's name, which is also a folder name on every machine."""
    if isinstance(value, str) and not _NAME.fullmatch(value):
        raise _broken(
            "a study's name has 1 to 100 letters, digits, '.', '_' or '-' and starts with a letter or digit, "
            f"but got {value!r:.80}."
        )
    # In lower case: file systems of macOS and Windows do not tell `Data` from `data`.
    if isinstance(value, str) and value.lower() in RESERVED:
        raise _broken(f"{value!r} is reserved for a folder beside the studies. Choose another name.")
    return value


def check_storage(value: Any) -> Any:
    """Refuse URLs: the journal is appended to and locked, which needs a file system."""
    if isinstance(value, str) and "://" in value:
        raise _broken(
            f"storage is a folder, but got the URL {value!r}. Give a path that all machines share (such as an NFS or "
            "EFS mount), and copy the finished study's folder to the object store afterwards."
        )
    if isinstance(value, str) and not value.strip():
        raise _broken("storage is a folder, but got an empty string. Leave the key out for ./studies.")
    return value


def check_corruptions(value: Any) -> Any:
    """Validate what confirmed configurations are measured on: `common`, names, or a folder's path."""
    if value is None or value == COMMON_CORRUPTIONS:
        return value
    if isinstance(value, str):
        if "/" in value or "\\" in value:
            return value
        hint = f" Write [{value}]." if value in COMMON else did_you_mean(value, (COMMON_CORRUPTIONS, *COMMON))
        raise _broken(
            f"corruptions is {COMMON_CORRUPTIONS!r}, a list of names, or a folder's path with a / in it, but got "
            f"{value!r}.{hint}"
        )
    if not isinstance(value, list) or not value:
        raise _broken(
            f"corruptions is {COMMON_CORRUPTIONS!r}, a list of at least one name, or a folder's path with a / in it, "
            f"but got {value!r}."
        )
    problems: list[RuleProblem] = []
    for index, name in enumerate(value):
        if name not in COMMON:
            hint = did_you_mean(str(name), COMMON)
            problems.append(((index,), f"a corruption is one of {', '.join(COMMON)}, but got {name!r}.{hint}"))
        elif name in value[:index]:
            problems.append(((index,), f"a corruption is measured once, but {name!r} is listed again. Leave it out."))
    raise_if_any(*problems)
    return value


def check_model_name(value: Any) -> Any:
    """Validate the name of a registered model of MLflow."""
    if isinstance(value, str) and not _MODEL_NAME.fullmatch(value):
        raise _broken(
            "the name of a registered model has 1 to 250 letters, digits, spaces, '.', '_' or '-', but got "
            f"{value!r:.80}. Leave it out to send no weights."
        )
    return value


def check_tracking_uri(value: Any) -> Any:
    """Refuse bare paths, which MLflow would take for its retired file store."""
    if isinstance(value, str) and "://" not in value and value != "databricks":
        raise _broken(
            "a tracking URI is a server (http://host:5000) or a database (sqlite:///mlflow.db), but got "
            f"{value!r}. Leave it out for a SQLite file in the storage folder."
        )
    return value


def check_gpus(value: Any) -> Any:
    """Validate the GPUs of one trial: auto, 0, 1, or a share of one."""
    rule = f"must be auto, 0, 1, or a share of one GPU between 0 and 1, but got {value!r}."
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _broken(rule + (" Remove the quotes." if _is_number(value) else ""))
    if value > 1:
        raise _broken(f"{rule} A trial trains on one GPU: write 1; resources.concurrent sets how many run at a time.")
    if not value >= 0:  # also NaN
        raise _broken(rule)
    return float(value)


def check_objective(value: Any) -> Any:
    """Validate the selection rule, which never uses test data."""
    if value == "oracle":
        raise _broken(
            "oracle selects on test data and is only reported as an upper bound. Use id_val, leave_one_domain_out, or "
            "val_domain:<name> with a domain that is then no longer a test."
        )
    if isinstance(value, str) and value not in OBJECTIVES[:2] and not re.fullmatch(rf"{VAL_DOMAIN}.+", value):
        options = ", ".join(OBJECTIVES)
        raise _broken(f"must be one of {options}, but got {value!r}.{did_you_mean(value, OBJECTIVES)}")
    return value


def named_entry(value: Any) -> Any:
    """Expand the short form of an entry: `daft` → `{name: daft, label: daft}`."""
    if isinstance(value, str):
        return {"name": value, "label": value}
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return {"label": value["name"], **value}
    return value


# Rules between keys.


def source_problems(
    source: str, root: str | None, label: str | None, id: Sequence[str], ood: Sequence[str]
) -> Iterator[RuleProblem]:
    """Keys of `data` that do not fit its source."""
    if source in BUILT_IN_DOMAINS:
        if root is not None:
            yield ("root",), f"the source {source!r} is built in and has no root. Remove one of the two."
        yield from _unknown_domains(source, "ood", ood, BUILT_IN_DOMAINS[source])
        yield from _unknown_domains(source, "id", id, ("handwritten",))
    elif not root:
        yield ("root",), f"the source {source!r} needs a root: the path of your images."
    if root and "://" in root:
        yield (
            ("root",),
            f"root is a path on this machine, but got the URL {root!r}. Copy the data to a folder that all machines "
            "can read.",
        )
    if label is not None and source not in ("parquet", "manifest"):
        yield (
            ("label",),
            f"only Parquet files and manifests have a label column to choose, but the source is {source!r}. Remove one "
            "of the two.",
        )


def metric_problems(task: str, metric: str | None) -> Iterator[RuleProblem]:
    """A metric that cannot select in the task."""
    try:
        task_metrics(task).selecting(metric)
    except ValueError as error:
        message = str(error)
        yield ("search", "metric"), message[0].lower() + message[1:]


def augmentation_problems(task: str, augment: Sequence[str], evaluation: str | None) -> Iterator[RuleProblem]:
    """Augmentations that the task does not have, and views that only masks have."""
    options = MASK_AUGMENTATIONS if task == "segmentation" else AUGMENTATIONS
    for index, name in enumerate(augment):
        if name not in options:
            rule = f"an augmentation is one of {', '.join(options)}, but got {name!r}.{did_you_mean(name, options)}"
            yield ("data", "augment", index), rule
    if evaluation is not None and task != "segmentation":
        yield (
            ("data", "evaluation"),
            f"only segmentation has views of an evaluation, but the task is {task}. Set task: segmentation, or remove "
            "it.",
        )


def whole_picture_problems(
    task: str, crop_pct: float | None, interpolation: str | None, sampling: str | None, corrupted: str | None
) -> Iterator[RuleProblem]:
    """Keys that act on square images with a label each, in a study on whole pictures with masks."""
    if task != "segmentation":
        return
    reasons = {
        ("data", "crop_pct"): (crop_pct, "pictures with masks are scored whole"),
        ("data", "interpolation"): (interpolation, "pictures with masks are scaled linearly, their masks by index"),
        ("data", "sampling"): (sampling, "a picture with a mask has no class of its own that could be balanced"),
        ("evaluate", "corruptions"): (corrupted, "files of corrupted pictures have a label each and no masks"),
    }
    for path, (value, reason) in reasons.items():
        if value is not None:
            yield path, f"{reason}, but got {value!r} and the task is segmentation. Remove it."


def mask_problems(
    task: str, source: str, labels: object | None, ignore: object | None, mask: str | None, label: str | None
) -> Iterator[RuleProblem]:
    """Keys of `data` that do not fit the task."""
    if task != "segmentation":
        for key, value in (("labels", labels), ("ignore", ignore), ("mask", mask)):
            if value is not None:
                message = f"only segmentation has {key}, but the task is {task}. Set task: segmentation, or remove it."
                yield ("data", key), message
        return
    if source not in MASK_SOURCES:
        yield (
            ("data", "source"),
            f"pictures with masks come from {' or '.join(MASK_SOURCES)}, but got {source!r}.",
        )
    if label is not None:
        yield (
            ("data", "label"),
            f"the classes of segmentation are in the masks, but a label column is given: {label!r}. Remove it; "
            "data.mask names the column with the masks.",
        )
    if mask is not None and source not in ("parquet", "manifest"):
        yield ("data", "mask"), f"only tables have a mask column, but the source is {source!r}. Remove one of the two."


def domain_list_problems(id: Sequence[str], ood: Sequence[str]) -> Iterator[RuleProblem]:
    """Domains that are listed twice, empty, or both in and out of distribution."""
    for key, domains in (("id", id), ("ood", ood)):
        for index, domain in enumerate(domains):
            if domain in domains[:index]:
                yield (key, index), f"the domain {domain!r} is listed twice."
        for index, domain in enumerate(domains):
            if not domain.strip():
                yield (key, index), "the name of a domain is empty."
    for index, domain in enumerate(ood):
        if domain in id:
            yield ("ood", index), f"the domain {domain!r} is both ID and OOD. Remove it from one of the two lists."


def split_problems(val_fraction: float, test_fraction: float) -> Iterator[RuleProblem]:
    """Splits that leave no training images."""
    if val_fraction + test_fraction >= 1:
        yield (
            ("test_fraction",),
            f"val_fraction + test_fraction must be less than 1, but got {val_fraction:g} + {test_fraction:g}: nothing "
            "would be left to train on.",
        )


def grace_problems(grace: int, epochs: int) -> Iterator[RuleProblem]:
    """A grace period longer than the budget."""
    if grace > epochs:
        yield ("grace",), f"1 <= grace <= epochs must hold, but got grace {grace} and epochs {epochs}."


def rung_problems(evaluate_at_rungs: bool, scheduler: str) -> Iterator[RuleProblem]:
    """An evaluation at rungs without rungs."""
    if evaluate_at_rungs and scheduler == "none":
        yield (
            ("evaluate_at_rungs",),
            "evaluate_at_rungs needs a scheduler that stops trials at rungs, but got scheduler: none, with which every "
            "trial is evaluated at its end. Leave one of the two out.",
        )


def allocation_problems(allocation: str, sampler: str, objectives: Sequence[str] | None) -> Iterator[RuleProblem]:
    """An allocation of trials that the sampler or the objectives leave no room for."""
    if allocation != "sampler" and sampler == "paper":
        yield (
            ("allocation",),
            f"the papers' sweeps have as many trials as they list, but got allocation {allocation!r} with sampler "
            "paper. Leave allocation out, or use another sampler.",
        )
    if allocation == "halving" and objectives is not None:
        yield (
            ("allocation",),
            "halving drops entries by the first objective alone, cheap ones before their cost could count, but got "
            f"objectives [{', '.join(map(str, objectives))}]. Use equal or sampler.",
        )


def objectives_problems(
    objectives: Sequence[str] | None, objective: str, sampler: str, scheduler: str
) -> Iterator[RuleProblem]:
    """Objectives that are none, or that the rest of `search` cannot honour."""
    if objectives is None:
        return
    got = f"[{', '.join(map(str, objectives))}]"
    options = ", ".join(COSTS)
    if objective == "leave_one_domain_out":
        yield (
            ("objective",),
            "leave_one_domain_out compares a few configurations that are best on ID validation, so that cheap ones "
            f"would get no folds, but got objectives {got}. Use id_val, or leave objectives out.",
        )
    elif objectives and objectives[0] != objective:
        yield (
            ("objectives", 0),
            f"the first objective is that of search.objective, {objective}, but got {objectives[0]!r}. Write "
            f"[{objective}, …] with costs after it.",
        )
    if len(objectives) < 2:
        yield (
            ("objectives",),
            f"objectives are search.objective and one or more of {options}, but got {got}. Add a cost, or leave "
            "objectives out.",
        )
    for index, name in enumerate(objectives[1:], 1):
        if name not in COSTS:
            yield ("objectives", index), f"a cost is one of {options}, but got {name!r}.{did_you_mean(name, COSTS)}"
        elif name in objectives[1:index]:
            yield ("objectives", index), f"the cost {name!r} is listed twice."
    if sampler in ("random", "paper"):
        yield (
            ("sampler",),
            f"objectives steer a sampler that learns from results, but {sampler} proposes the same without them. Use "
            "tpe or gp, or leave objectives out: the costs of every configuration are recorded anyway.",
        )
    if scheduler != "none":
        yield (
            ("scheduler",),
            f"{scheduler} stops trials by {objective} alone, cheap ones before their cost could count, but got "
            f"objectives {got}. Set scheduler: none, or leave objectives out.",
        )


def objective_problems(objective: str, source: str, id: Sequence[str], ood: Sequence[str]) -> Iterator[RuleProblem]:
    """An objective whose domains `data` does not have."""
    path: KeyPath = ("search", "objective")
    if objective == "leave_one_domain_out" and (source in BUILT_IN_DOMAINS or len(id) == 1):
        yield (
            path,
            "leave_one_domain_out needs at least 2 ID domains, but data.id has 1: "
            f"{id[0] if id else 'handwritten'}. List more domains there, or use id_val.",
        )
    if not objective.startswith(VAL_DOMAIN):
        return
    domain = objective.removeprefix(VAL_DOMAIN)
    listed = ood or BUILT_IN_DOMAINS.get(source, ())
    if domain not in listed:
        hint = did_you_mean(domain, listed) or " List it there."
        yield (
            path,
            f"val_domain names one of the OOD domains, but got {domain!r} and data.ood lists "
            f"{', '.join(listed) or 'nothing'}.{hint}",
        )
    elif len(listed) == 1:
        yield (
            path,
            f"val_domain:{domain} takes the only OOD domain as validation, so that no OOD test is left. List another "
            "domain under data.ood, or use id_val.",
        )


def loss_problems(label_smoothing: float | None, focal_gamma: float | None) -> Iterator[RuleProblem]:
    """Changes of the loss that exclude each other."""
    if label_smoothing is not None and focal_gamma is not None:
        yield (
            ("focal_gamma",),
            "the focal loss is defined for one right class, but label_smoothing spreads the target over all of them, "
            f"and got focal_gamma {focal_gamma:g} and label_smoothing {label_smoothing:g}. Leave one of the two out.",
        )


def balance_problems(class_weights: str | None, sampling: str | None) -> Iterator[RuleProblem]:
    """Two corrections for the frequencies of the classes, which would overcorrect together."""
    if class_weights is not None and sampling is not None:
        yield (
            ("data", "sampling"),
            f"loss.class_weights {class_weights!r} and sampling {sampling!r} both correct for the frequencies of the "
            "classes: together, rare classes would outweigh the others. Leave one of the two out.",
        )


def warm_start_problems(names: Sequence[str] | None, study: str, sampler: str) -> Iterator[RuleProblem]:
    """Earlier studies that are none, are listed twice, or could not be used."""
    if names is None:
        return
    if sampler == "paper":
        yield (
            ("warm_start",),
            f"the papers' sweeps try what they list, but got warm_start [{', '.join(names)}] with sampler paper. Leave "
            "warm_start out, or use another sampler.",
        )
    for index, name in enumerate(names):
        if name == study:
            yield (
                ("warm_start", index),
                f"warm_start names earlier studies, but got this study, {name!r}. Leave it out.",
            )
        elif name in names[:index]:
            yield ("warm_start", index), f"the study {name!r} is listed twice."


def sample_problems(fsr: Sequence[str], fsr_fractions: Sequence[float], train_fraction: float) -> Iterator[RuleProblem]:
    """FSR references that would compare a sample with itself, or with too few others."""
    for index, reference in enumerate(fsr):
        if reference == "full" and train_fraction == 1:
            yield (
                ("diagnostics", "fsr", index),
                "the reference 'full' compares a sample with the pool that it is drawn from, but data.train_fraction "
                "is 1: they are the same, and FSR is 1. Lower data.train_fraction, or use extrapolated.",
            )
    fractions = sorted(set(fsr_fractions))
    if "extrapolated" in fsr and len(fractions) < 2:
        listed = ", ".join(f"{fraction:g}" for fraction in fractions) or "none"
        yield (
            ("diagnostics", "fsr_fractions"),
            f"an extrapolation needs 2 different fractions beside the whole, but got {listed}. List another one.",
        )


def unconfirmed_problems(corruptions: bool, top_k: int | None, seeds: int) -> Iterator[RuleProblem]:
    """Corruptions in a study that confirms nothing.

    Args:
        corruptions: whether `evaluate.corruptions` is set.
        top_k: `confirm.top_k`.
        seeds: `confirm.seeds`.
    """
    if corruptions and (top_k == 0 or seeds == 0):
        key = "top_k" if top_k == 0 else "seeds"
        yield (
            ("evaluate", "corruptions"),
            f"corruptions are measured on confirmed configurations, but confirm.{key} is 0. Raise it, or leave them "
            "out.",
        )


# Rules of the diagnostics that need the data or the network; `orchestrator.planning.preflight` calls them.


def domain_problems(plasticity_source: str | None, fsr: Sequence[str], ood: Collection[str]) -> Iterator[RuleProblem]:
    """Diagnostics that need OOD domains which the data do not have.

    Args:
        plasticity_source: `diagnostics.plasticity_source`.
        fsr: `diagnostics.fsr`.
        ood: names of the OOD domains.
    """
    if plasticity_source is not None and plasticity_source not in ood:
        yield (
            ("diagnostics", "plasticity_source"),
            f"plasticity_source is one of the OOD domains, but got {plasticity_source!r} and the data have "
            f"{', '.join(ood) or 'none'}.{did_you_mean(plasticity_source, ood)} Leave it out for pairs of training "
            "images.",
        )
    for index, reference in enumerate(fsr):
        if reference == "oracle" and not ood:
            yield (
                ("diagnostics", "fsr", index),
                "the reference 'oracle' trains on labelled images of each OOD domain, but the data have none. List "
                "them under data.ood, or leave it out.",
            )


def network_problems(fsr: Sequence[str], model: str, kinds: Collection[str]) -> Iterator[RuleProblem]:
    """Diagnostics that need layers which the network does not have.

    Args:
        fsr: `diagnostics.fsr`.
        model: name of the network.
        kinds: its layer types, see `orchestrator.planning.preflight.layer_kinds`.
    """
    if fsr and "layer_norm" not in kinds:
        alternative = ""
        if "batch_norm" in kinds:
            alternative = " `luthier run` reports the shift of its BatchNorms as bn_shift."
        yield (
            ("diagnostics", "fsr"),
            f"FSR is measured by tuning LayerNorms, but {model} has none. Leave it out.{alternative}",
        )


def _broken(message: str) -> RuleError:
    return RuleError(((), message))


def _unknown_domains(source: str, key: str, domains: Sequence[str], options: Collection[str]) -> Iterator[RuleProblem]:
    for index, domain in enumerate(domains):
        if domain not in options:
            hint = did_you_mean(domain, options)
            rule = f"{source} has the {key.upper()} domains {', '.join(options)}, but got {domain!r}.{hint}"
            yield (key, index), rule


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
