"""Plan of a study: its trials, budget, disk space and trained parameters.

No compute is spent on it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import CategoricalDistribution
from rich.markup import escape
from rich.table import Table

import search_spaces
from orchestrator.ingest.errors import first_few
from orchestrator.ingest.layout import sample_bytes
from orchestrator.ingest.manifest import pixel_sentences, split_warnings, together_in_words
from orchestrator.ingest.pipeline import existing_store
from orchestrator.planning.build import evaluated_units, ingest_request, interim_splits, rungs_of
from orchestrator.planning.corruption_cost import PlannedCorruptions, planned_corruptions
from orchestrator.planning.estimates import count_trials, examine, space_of, store_bytes
from orchestrator.planning.kept_size import kept_bytes_of
from orchestrator.planning.objectives import objectives_of
from orchestrator.planning.preflight import layer_kinds
from orchestrator.planning.view import recorded_choices, view_of
from orchestrator.planning.warm_start import learns, own_events, warm_start_of
from orchestrator.record.costs import COSTS
from orchestrator.record.journal import Journal
from orchestrator.record.records import fold, metrics_of
from orchestrator.wording import bytes_text, counted, listed
from trainables.specs.metrics import ood_domain

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.ingest.assign import Assignment
    from orchestrator.ingest.request import IngestRequest
    from orchestrator.ingest.source import Source
    from orchestrator.search.space import SearchSpace
    from orchestrator.study_file.schema import StudySpec
    from search_spaces import Hyperparameter

_KEPT = {
    "best": "each entry's best search trial and every confirmed trial",
    "confirmed": "every confirmed trial",
    "all": "every trial that uses its whole budget",
}
"""Value of `keep` in words."""


@dataclass(frozen=True)
class PlannedEntry:
    """Plan of one entry of `strategies`."""

    label: str
    strategy: str
    given: int
    """Trials that it gets regardless of the sampler: its default point, or its whole sweep."""
    preset: str | None
    fixed: Mapping[str, Any]
    searched: Mapping[str, str]
    """Hyperparameter → range and default, in words."""


@dataclass(frozen=True)
class Plan:
    """The size of a study, as upper limits: a scheduler stops many trials earlier."""

    study: str
    folder: str
    backbone: str
    data: str
    entries: tuple[PlannedEntry, ...]
    sampler: str
    objective: str
    objectives: tuple[str, ...]
    """What the search optimises: the selecting metric, then the costs."""
    search_trials: int
    epochs: int
    """Budget of one trial, in units."""
    unit: str
    """What one unit is, in words."""
    rungs: tuple[int, ...]
    """Units after which a trial may be stopped or paused."""
    fold_trials: int | None
    """Trials of leave-one-domain-out; None = the number of domains is not known before the data are read."""
    confirm_trials: int
    reference_trials: int | None
    """Trials of LayerNorm tuning on other samples, for FSR; None = the number of OOD domains is not known yet."""
    measured: tuple[str, ...]
    """Diagnostics of each trial."""
    plasticity: bool
    """Whether the pretrained network's plasticity is measured, once at the start."""
    images: int
    """Images of the source, of all its domains."""
    classes: int
    splits: Mapping[str, int]
    """`train`, `val`, `test` and `ood/<domain>` → images, before any is found to be unreadable."""
    id_domains: tuple[str, ...]
    disk_bytes: int
    """Estimated size of the data store plus records, without checkpoints."""
    kept_bytes: int
    """Size of the kept weights and predictions at the end of the study, at most."""
    keep: str
    """Whose weights and predictions are kept, see `StudySpec.keep`."""
    resources: str
    scheduler: str
    """As `SearchSpec.scheduler`."""
    train_fraction: float = 1.0
    selection: str = "accuracy"
    """Title of the metric that configurations are chosen by."""
    channels_last: bool | str = "auto"
    """Memory layout of images and convolutions, see `ResourcesSpec.channels_last`."""
    nice: int | None = None
    """Niceness of trials, see `ResourcesSpec.nice`."""
    evaluated_units: tuple[int, ...] = ()
    """Units before the last at which search trials are evaluated on test or OOD images, too."""
    interim_splits: tuple[str, ...] | None = None
    """Splits that are evaluated there; None = all."""
    view: str = ""
    """How pictures become the network's input, in a sentence."""
    copies: str = ""
    """What the drawn splits keep together, in a sentence; empty = nothing."""
    masks: tuple[str, ...] = ()
    """What the masks hold and how they are read, in sentences; empty = images with a label each."""
    warm_start: tuple[str, ...] = ()
    """What is taken over from earlier studies: a line, and one per entry; empty = nothing."""
    corruptions: PlannedCorruptions | None = None
    """What confirmed trials are measured under; None = nothing."""

    @property
    def max_units(self) -> int:
        """Budget if no trial is stopped (folds and references of unknown number left out)."""
        trials = self.search_trials + self.confirm_trials + (self.fold_trials or 0) + (self.reference_trials or 0)
        return self.epochs * trials

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**dataclasses.asdict(self), "max_units": self.max_units}

    def render(self, console: Console) -> None:
        """Print the plan."""
        table = Table(title=f"{self.study}: what would be trained", title_justify="left")
        for column in ("entry", "trials given", "searched (default; range)", "fixed"):
            table.add_column(column, overflow="fold")
        for entry in self.entries:
            searched = "\n".join(f"{key}: {text}" for key, text in entry.searched.items())
            if not searched:
                searched = f"the sweep {entry.preset!r}" if entry.preset else "nothing: one configuration"
            fixed = "\n".join(f"{key} = {value}" for key, value in entry.fixed.items()) or "–"
            name = entry.label if entry.label == entry.strategy else f"{entry.label} ({entry.strategy})"
            table.add_row(name, str(entry.given), escape(searched), escape(fixed))
        console.print(table)
        for line in self.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def lines(self) -> list[str]:
        """The plan's figures, one sentence each."""
        folds = "" if self.fold_trials == 0 else f", {_or_unknown(self.fold_trials)} leave-one-domain-out"
        references = "" if self.reference_trials == 0 else f", {_or_unknown(self.reference_trials)} reference (FSR)"
        stop = f"; {_EARLY[self.scheduler]} {_units(self.rungs)}" if self.rungs else "; no trial is stopped"
        return [
            f"Network: {self.backbone}. Data: {self.data}, {self.images:,} images in {self.classes} classes.",
            self._images(),
            *self.masks,
            *filter(None, (self.copies, self.view)),
            f"Trials: {self.search_trials} search ({self.sampler}){folds}, {self.confirm_trials} confirmation"
            f"{references}.",
            *self.warm_start,
            f"Budget of a trial: {counted(self.epochs, 'unit')} of {self.unit}{stop}.",
            f"At most {counted(self.max_units, 'unit')} in all. Each trial gets {self.resources}.",
            f"Memory layout: {self._layout()}. Niceness: {self._niceness()}.",
            f"Chosen by {self.objective}.{self._front()}",
            self._evaluation(),
            self._diagnostics(),
            *([self.corruptions.sentence()] if self.corruptions is not None else []),
            f"Disk: about {bytes_text(self.disk_bytes)} for data and records, and a few checkpoints per trial.",
            f"Kept (keep: {self.keep}): at most {bytes_text(self.kept_bytes)} of weights and predictions, of "
            f"{_KEPT[self.keep]}.",
            f"Study folder: {self.folder}",
        ]

    def _front(self) -> str:
        """The costs beside the selecting metric; empty without any."""
        if len(self.objectives) == 1:
            return ""
        costs = listed([COSTS[name].title for name in self.objectives[1:]])
        return f" The search also minimises {costs}; the best trade-offs are in the Pareto front."

    def _images(self) -> str:
        domains = {ood_domain(split): count for split, count in self.splits.items()}
        ood = first_few([f"{count:,} of {domain}" for domain, count in domains.items() if domain is not None]) or "none"
        train, val, test = (f"{self.splits[name]:,}" for name in ("train", "val", "test"))
        share = "" if self.train_fraction == 1 else f" (train_fraction {self.train_fraction:g} of them is used)"
        inside = f"{train} to train on{share}, {val} for validation, {test} for the ID test"
        return f"Images of {first_few(self.id_domains)}: {inside}; OOD: {ood}."

    def _layout(self) -> str:
        if self.channels_last == "auto":
            return "channels last on a GPU, and on a CPU if a measurement at the start finds it faster"
        return "channels last" if self.channels_last else "contiguous"

    def _niceness(self) -> str:
        """Niceness of the trials where they would run."""
        if (os.environ.get("RAY_ADDRESS") or "local") == "local":
            return f"{self.nice or 0} above that of this process"
        if self.nice is None:
            return "that of the cluster's workers (15, unless it was started with another)"
        return (
            f"{self.nice} where the cluster's workers have less (15, unless it was started with another); trials "
            "cannot lower it"
        )

    def _evaluation(self) -> str:
        """When test and OOD images are looked at."""
        end = "ID test and OOD domains are evaluated once per trial, at its end"
        if not self.evaluated_units:
            return f"{end}; trials that are stopped before are not." if self.rungs else f"{end}."
        splits = "all of them" if self.interim_splits is None else listed(list(self.interim_splits))
        return f"{end}; of search trials {splits} also after {_units(self.evaluated_units)}."

    def _diagnostics(self) -> str:
        of_trials = f"{', '.join(self.measured)} of each trial" if self.measured else "nothing of each trial"
        start = "; plasticity of the pretrained network, once at the start" if self.plasticity else ""
        return f"Measured beside {self.selection}: {of_trials}{start}."


def make_plan(spec: StudySpec) -> Plan:
    """The plan of a study that has passed `orchestrator.planning.preflight.preflight`."""
    folder = Path(spec.storage).absolute() / spec.name
    journal = folder / "journal.jsonl"
    events = Journal.read(journal) if journal.exists() else []
    recorded = recorded_choices(events) if events else None
    view = view_of(spec, recorded)
    space = space_of(spec)
    search = spec.search
    data = spec.data
    source, assignment = examine(spec)
    # Domains that the study file leaves open are known from the source.
    domains = {"id": assignment.id_domains, "ood": assignment.ood_domains}
    counts = count_trials(spec.model_copy(update={"data": data.model_copy(update=domains)}), space)
    images = len(source.samples)
    splits = {name: len(rows) for name, rows in assignment.splits.items()}
    request = ingest_request(spec, view.config, recorded)
    resources = spec.resources
    gpus = "a GPU if there is one" if resources.gpus == "auto" else counted(resources.gpus, "GPU")
    return Plan(
        study=spec.name,
        folder=str(folder),
        backbone=spec.model.name,
        data=data.root or f"built-in {data.source}",
        entries=tuple(_planned(entry.label, entry.name, entry.fixed, space) for entry in spec.strategies),
        sampler=search.sampler,
        objective=search.objective,
        objectives=objectives_of(spec),
        search_trials=counts.search,
        epochs=search.epochs,
        unit="one epoch" if search.steps_per_unit is None else f"{search.steps_per_unit} optimiser steps",
        rungs=rungs_of(spec),
        scheduler=spec.search.scheduler,
        fold_trials=counts.folds,
        confirm_trials=counts.confirm,
        reference_trials=counts.references,
        measured=tuple(spec.diagnostics.measure),
        plasticity=spec.diagnostics.plasticity and "transformer_block" in layer_kinds(spec.model.name),
        images=images,
        classes=len(assignment.classes),
        splits=splits,
        id_domains=tuple(assignment.id_domains),
        train_fraction=data.train_fraction,
        disk_bytes=store_bytes(int(sample_bytes(source, request)[assignment.used].sum()), counts.total),
        kept_bytes=kept_bytes_of(spec, counts, space, splits, len(assignment.classes)),
        keep=spec.keep,
        resources=f"{counted(resources.cpus, 'CPU')} and {gpus}",
        selection=metrics_of(spec).selection.title,
        channels_last=resources.channels_last,
        nice=resources.nice,
        evaluated_units=evaluated_units(spec),
        interim_splits=interim_splits(spec),
        view=view.sentence() + _weights_note(spec),
        corruptions=planned_corruptions(spec, splits, counts.confirm, fold(events)),
        copies=_copies(request, Path(spec.storage).absolute() / "data"),
        warm_start=tuple(warm_start_of(spec, own_events(spec)).sentences(learns(spec))),
        masks=_masks(source, assignment),
    )


def _masks(source: Source, assignment: Assignment) -> tuple[str, ...]:
    """See `Plan.masks`; warnings last."""
    if source.survey is None:
        return ()
    return (
        f"Pairs of a picture and its mask: {source.layout}.",
        *source.remarks,
        *pixel_sentences(source.survey, assignment),
        *(f"Warning: {text}" for text in (*source.warnings, *split_warnings(source.survey, assignment))),
    )


def _weights_note(spec: StudySpec) -> str:
    """Where mean and standard deviation come from, if the weights do not come with them."""
    if spec.model.weights is None or Path(spec.model.weights).is_dir() or spec.data.mean or spec.data.std:
        return ""
    return f" Mean and std are those of timm's own weights of {spec.model.name}; data.mean and data.std change them."


def _copies(request: IngestRequest, stores: Path) -> str:
    """What the drawn splits keep together; it is counted when the data are read."""
    if request.copies == "apart":
        return "Copies: splits are drawn image by image (data.copies: apart)."
    store = existing_store(request, stores)
    if store is not None:
        return together_in_words(store.manifest["kept_together"])
    kinds = "Equal and nearly equal images" if request.copies == "near" else "Equal images"
    return f"{kinds} will stay in one of the splits that are drawn; they are counted when the data are read."


def _planned(label: str, strategy: str, fixed: Mapping[str, Any], space: SearchSpace) -> PlannedEntry:
    preset = space.presets.get(label)
    if preset is not None:
        swept: dict[str, list[Any]] = {}
        for step in preset.steps:
            for key, values in step.items():
                swept.setdefault(key, []).extend(values)
        held = {k: v for k, v in {**preset.fixed, **fixed}.items() if k not in swept}
        grids = {key: ", ".join(map(_plain, values)) for key, values in swept.items()}
        name = space.entries[label].preset or ("paper" if swept else None)
        return PlannedEntry(label, strategy, preset.size, name, held, grids)
    task = space.entries[label].task
    hyperparameters = search_spaces.space(strategy, task)
    searched = {key: range_in_words(hyperparameters[key]) for key in search_spaces.searched(strategy, fixed, task)}
    return PlannedEntry(label, strategy, 1, None, dict(fixed), searched)


def range_in_words(hyperparameter: Hyperparameter) -> str:
    """A hyperparameter's default and range: `0.003; 0.0001 to 0.3, log`."""
    distribution: Any = hyperparameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return f"{hyperparameter.default}; {', '.join(map(str, distribution.choices))}"
    scale = ", log" if distribution.log else ""
    return f"{_plain(hyperparameter.default)}; {_plain(distribution.low)} to {_plain(distribution.high)}{scale}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _or_unknown(count: int | None) -> str:
    return "an unknown number of" if count is None else str(count)


_EARLY = {
    "asha": "the scheduler may stop a trial after",
    "promote": "trials are paused, and the best of their entry promoted, after",
}
"""Scheduler → what happens at its rungs."""


def _units(rungs: tuple[int, ...]) -> str:
    return f"unit {rungs[0]}" if len(rungs) == 1 else f"units {', '.join(map(str, rungs))}"
