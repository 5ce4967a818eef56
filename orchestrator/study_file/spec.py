"""The study file as strict models: every key, its type, its bounds, its default and what it means.

The texts under the fields are the reference: `docs/study.md` and the comments of `luthier init` are made from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from orchestrator.errors import Problem, StudyError
from orchestrator.study_file.diagnostics import DiagnosticsSpec
from orchestrator.study_file.failures import FailuresSpec
from orchestrator.study_file.rules import (
    check_data,
    check_gpus,
    check_name,
    check_objective,
    check_search,
    check_storage,
    check_study,
    check_tracking_uri,
    named_entry,
)
from orchestrator.study_file.section import Section

VAL_DOMAIN = "val_domain:"
"""Prefix of the rule that chooses by one OOD domain."""


class DataSpec(Section):
    """Which images, which domains are in distribution (ID) and which are not (OOD), and how they are split."""

    source: Literal["folder", "parquet", "npz", "digits"] = "folder"
    """What `root` is: image folders `root/<domain>/<class>/*` (or `root/train|val|test/<class>/*`), Parquet files,
    a MedMNIST-style `.npz`; `digits` is built in and needs no root."""
    root: str | None = None
    """Folder or file with the images. A relative path counts from the study file's folder."""
    id: list[str] = []
    """Domains to train, validate and test on. Empty = all domains that are not in `ood`."""
    ood: list[str] = []
    """Domains that are only tested on: never trained on, never used to choose anything. Empty = those that the source
    marks itself (`root/ood/<domain>/<class>/*`; of `digits` all but the handwritten ones)."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Side of the square images that the network sees, in pixels. null = the size that the model was pretrained at."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the ID images for validation, per class. A source's own validation split is used instead."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the ID images for the ID test, per class. A source's own test split is used instead."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training images that is used, per class, for studies of scarce data. A smaller share is contained
    in a larger one."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the splits."""
    on_bad: Literal["quarantine", "fail"] = "quarantine"
    """Unreadable or dangerous images: quarantine leaves them out and lists them; fail refuses the data."""
    on_leak: Literal["report", "fail"] = "report"
    """The same image, pixel for pixel, in more than one of training, validation and what is measured (test and OOD):
    report warns and names them; fail refuses the data."""
    label: str | None = None
    """Column of Parquet files that holds the classes. null = the first of `label`, `labels`, `class`, `target`,
    `category`, `fine_label`, `coarse_label`."""
    augment: list[str] = []
    """Training augmentations: any of `flip`, `crop`."""

    _rules = model_validator(mode="after")(check_data)


class ModelSection(Section):
    """The pretrained network to start from."""

    name: str = Field(min_length=1)
    """A timm name (`resnet18`, `vit_base_patch16_224.augreg_in21k`), `hf-hub:…`, `local-dir:…`, or one of the built-in
    `digits_vit` and `digits_cnn`."""
    pretrained: bool = True
    """false = random weights. Never a fallback: weights that cannot be loaded are an error."""
    weights: str | None = None
    """Local weight file (`.safetensors`, `.pth`, `.bin`) or folder in timm's `local-dir` layout. null = timm's own
    weights of that name."""


class StrategyEntry(Section):
    """One way of fine-tuning that competes. A name alone, such as `daft`, is short for `{name: daft}`."""

    name: str
    """The strategy: see the table in the README."""
    label: str
    """What this entry is called in tables, unique within the study. Default: the name. Give one where two entries use
    the same strategy."""
    preset: str | None = None
    """Run this published sweep of the strategy, such as `paper`, in place of a search."""
    fixed: dict[str, Any] = {}
    """Hyperparameters that are not searched but held at these values."""


class SearchSpec(Section):
    """How many trials, how long, and who proposes them."""

    trials: Annotated[int, Field(ge=1)] = 40
    """Trials of the search over all strategies together. The default point of every strategy is tried first."""
    epochs: Annotated[int, Field(ge=1)] = 20
    """Budget of one trial, in units: epochs, or stretches of `steps_per_unit` optimiser steps."""
    steps_per_unit: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps of one unit, where an epoch is long. null = one epoch."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per optimiser step."""
    sampler: Literal["tpe", "gp", "random", "paper"] = "tpe"
    """Who proposes: Optuna's TPE or Gaussian process, random draws, or the papers' own sweeps."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops trials that are behind at the rungs `grace · reduction^k`; none runs every trial to its end."""
    grace: Annotated[int, Field(ge=1)] = 1
    """Units that every trial gets before asha may stop it."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """asha lets about one in this many trials go on at each rung."""
    objective: Annotated[str, BeforeValidator(check_objective)] = "id_val"
    """How the winner is chosen: `id_val` (accuracy on ID validation), `leave_one_domain_out` (needs two or more ID
    domains), or `val_domain:<name>` (accuracy on one OOD domain, which is then validation data, not a test)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides proposals, initialisation and batches of every trial."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto = bfloat16 autocast on a GPU that supports it, float32 elsewhere."""

    _rules = model_validator(mode="after")(check_search)

    @property
    def validation_domain(self) -> str | None:
        """The domain of `val_domain:<name>`, or None under the other objectives."""
        return self.objective.removeprefix(VAL_DOMAIN) if self.objective.startswith(VAL_DOMAIN) else None


class ConfirmSpec(Section):
    """The best configurations again on fresh seeds, for the intervals of the leaderboard."""

    top_k: Annotated[int, Field(ge=0)] = 3
    """How many configurations to confirm: the best of each strategy first, then the runners-up. 0 = none."""
    seeds: Annotated[int, Field(ge=0)] = 3
    """Fresh seeds per configuration. 0 = none."""


class ResourcesSpec(Section):
    """What one trial gets, and how many run at a time."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores of one trial."""
    gpus: Annotated[float | Literal["auto"], BeforeValidator(check_gpus)] = "auto"
    """GPUs of one trial: a whole number, or a share such as 0.25 where several trials fit on one. auto = one where the
    cluster has any, else none."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials at a time. null = as many as fit. 1 makes the search itself reproducible."""


class TrackingSpec(Section):
    """Where MLflow records go. The study's own journal is kept in `storage` whatever happens there."""

    uri: Annotated[str, BeforeValidator(check_tracking_uri)] | None = None
    """MLflow tracking URI, such as `http://mlflow:5000`. null = a SQLite file in `storage`."""
    experiment: Annotated[str, Field(min_length=1)] | None = None
    """MLflow experiment. null = the study's name."""


class StudySpec(Section):
    """A whole study file."""

    name: Annotated[str, BeforeValidator(check_name)]
    """Names the study's folder, its MLflow parent run and its jobs: letters, digits, `.`, `_`, `-`."""
    data: DataSpec
    model: ModelSection
    strategies: Annotated[list[Annotated[StrategyEntry, BeforeValidator(named_entry)]], Field(min_length=1)]
    """Ways of fine-tuning that compete under one budget."""
    search: SearchSpec = SearchSpec()
    confirm: ConfirmSpec = ConfirmSpec()
    diagnostics: DiagnosticsSpec = DiagnosticsSpec()
    resources: ResourcesSpec = ResourcesSpec()
    failures: FailuresSpec = FailuresSpec()
    tracking: TrackingSpec = TrackingSpec()
    storage: Annotated[str, BeforeValidator(check_storage)] = "studies"
    """Folder for everything that studies leave behind: journals, results, the data store, the tracking database.
    Shared by all machines of a cluster. A relative path counts from the study file's folder."""

    _rules = model_validator(mode="after")(check_study)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """A study from plain Python values; relative paths count from the working directory.

        Raises:
            StudyError: unknown keys, wrong types and impossible values, all at once.
        """
        from orchestrator.study_file.entries import entry_problems
        from orchestrator.study_file.explain import explain

        problems: list[Problem] = []
        spec: Self | None = None
        try:
            spec = cls.model_validate(dict(fields))
        except ValidationError as error:
            problems = explain(error, cls)
        problems += entry_problems(fields.get("strategies"))
        if problems or spec is None:
            raise StudyError(problems)
        return spec

    @property
    def tracking_uri(self) -> str:
        """The MLflow URI to use, with the default filled in."""
        return self.tracking.uri or f"sqlite:///{Path(self.storage).absolute() / 'mlflow.db'}"

    @property
    def experiment(self) -> str:
        """The MLflow experiment to use, with the default filled in."""
        return self.tracking.experiment or self.name


def load_study(path: str | Path) -> StudySpec:
    """Read a study file; relative paths in it are made absolute from the file's own folder.

    Raises:
        StudyError: everything that is wrong with it, at once, with line numbers.
    """
    from orchestrator.study_file.portable import absolute_paths
    from orchestrator.study_file.yaml_loader import read_yaml

    document = read_yaml(path)
    try:
        spec = StudySpec.from_fields(document.data)
    except StudyError as error:
        located = [Problem(p.path, p.message, document.line(p.path)) for p in error.problems]
        raise StudyError(located, str(path)) from None
    folder = Path(path).resolve().parent
    return StudySpec.model_validate(absolute_paths(spec.model_dump(mode="json", exclude_unset=True), folder))
