"""Results of a study: leaderboard, best configuration, regret, findings and warnings, from its records alone."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import search_spaces
from orchestrator.record.records import INTERRUPTED, TrialRecord, metrics_of
from orchestrator.results import selection
from orchestrator.results.choice import Decision, decide
from orchestrator.results.comparison import DETERMINISTIC, competitors
from orchestrator.results.findings import findings
from orchestrator.results.front import Front, cost_warnings, front, front_frame, front_markdown, front_rows, print_front
from orchestrator.results.leaderboard import (
    COUNT_TITLE,
    cells,
    choice_values,
    describe,
    finite,
    html_table,
    leaderboard,
    markdown_table,
    print_table,
    robustness_cells,
    robustness_titles,
    score_note,
    score_titles,
)
from orchestrator.results.predictions import SampleTables
from orchestrator.results.robustness import Robustness, print_robustness, robustness, robustness_frame
from orchestrator.results.robustness import markdown as robustness_markdown
from orchestrator.results.run_predictions import RunPredictions, predictions_frame, read_runs
from orchestrator.study_file.rules import VAL_DOMAIN
from orchestrator.wording import counted
from trainables.specs.metrics import TEST
from trainables.specs.suggestions import did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from rich.console import Console

    from orchestrator.export.model import Model
    from orchestrator.export.segmentation_model import SegmentationModel
    from orchestrator.results.plots import Plots
    from orchestrator.study_file.schema import StudySpec

ENOUGH_SEEDS = 3
"""Below this many seeds a leaderboard row is warned about: the 95 % interval of two seeds is 12.7 standard errors."""


@dataclass(frozen=True, repr=False, kw_only=True)
class BestConfiguration(selection.Choice):
    """The chosen configuration, and the run whose network stands for it."""

    run: TrialRecord
    """Of the confirmed trials the one with the median validation score; the search trial where nothing was confirmed.
    `luthier export` exports the same."""
    folder: Path | None = None
    """Of the study; None = not known."""

    def model(self, device: torch.device | str | None = None) -> Model | SegmentationModel:
        """The network of `run`, restored from the study's kept weights: `model.predict("pictures")`.

        Args:
            device: where the network computes; None = the GPU if there is one, else the CPU.

        Raises:
            WeightsError: its weights are not kept, or damaged.
        """
        from orchestrator.results.kept_model import kept_model
        from trainables.storage.kept_weights import WeightsError

        if self.folder is None:
            raise WeightsError(
                "A model is restored from the weights in its study's folder, but the folder is not known here. Read "
                "the results with `Study.results()`."
            )
        return kept_model(self.folder, self.run, device)

    def summary(self) -> str:
        """Entry, trial, criterion and hyperparameters on one line."""
        confirmed = f", mean of {counted(self.seeds, 'fresh seed')}" if self.seeds else ", its search trial alone"
        score = f"{self.criterion} {self.value:.4g}{confirmed}"
        return f"{self.record.label}, trial {self.record.number}, {score}, {describe(self.record.hparams)}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} by {self.rule}: {self.summary()}>"

    def _repr_html_(self) -> str:
        """A table of the choice, for a notebook. Names are untrusted, and escaped."""
        record = self.record
        seeds = f"{self.seeds} confirmed" if self.seeds else "none confirmed"
        rows = [
            ["entry", record.label],
            ["strategy", record.strategy],
            ["rule", self.rule],
            [self.criterion, f"{self.value:.4g}"],
            ["seeds", seeds],
            ["configuration", f"trial {record.number}: {describe(record.hparams)}"],
            ["model()", f"trial {self.run.number} ({self.run.role}, seed {self.run.seed})"],
        ]
        return html_table(["choice", ""], rows)


class Results:
    """The outcome of a study. Read-only; needs neither a cluster nor a tracking server.

    Args:
        records: the study's trials (`orchestrator.record.records.fold`).
        spec: the study, or its fields as a mapping; `name`, `task`, `search.objective`, `search.objectives` and the
            `label`, `fixed` and `preset` of its strategies are read.
        measurements: study-level measurements (`orchestrator.record.records.measurements`).
        folder: of the study, for the predictions that it keeps; None = `storage` and `name` of `spec`, where it has
            them. Without predictions, intervals are over seeds alone, and `warnings` says so.

    Raises:
        ValueError: the study's task is unknown.

    Example:
        >>> from orchestrator.record.records import TrialRecord
        >>> trials = [
        ...     TrialRecord(trial_id=name, number=number, strategy=name, label=name, config_hash=name, state="complete",
        ...                 metrics={"best/val/acc": val, "test/acc": test})
        ...     for number, (name, val, test) in enumerate([("full", 0.91, 0.88), ("lora", 0.93, 0.87)])
        ... ]
        >>> results = Results(trials, {"name": "pets"})
        >>> results.best().record.label
        'lora'
        >>> results.leaderboard()["test/acc"].to_list()
        [0.87, 0.88]
        >>> f"{results.regret().value:.2f}"
        '0.01'
    """

    def __init__(
        self,
        records: Sequence[TrialRecord],
        spec: StudySpec | Mapping[str, Any] | None = None,
        measurements: Mapping[str, Mapping[str, Any]] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.records = list(records)
        self.measurements = dict(measurements or {})
        self.spec = spec
        self.metrics = metrics_of(spec)
        """Metrics of the study's task."""
        self.name = str(_field(spec, "name") or "study")
        objective = _field(_field(spec, "search"), "objective")
        self.rule = str(objective or "id_val")
        """The study's own selection rule."""
        storage = _field(spec, "storage")
        if folder is None and storage:
            folder = Path(str(storage)).absolute() / self.name
        self.folder = folder
        """Folder of the study; None = not known."""
        self._tables: dict[str | None, SampleTables] = {}

    def leaderboard(self, rule: str | None = None) -> pd.DataFrame:
        """One row per label, by a rule or the study's own.

        Columns and errors: see `orchestrator.results.leaderboard.leaderboard`.
        """
        rule = rule or self.rule
        return leaderboard(self.records, rule, self.metrics, self._samples(rule), self._devices())

    def best(self, rule: str | None = None, label: str | None = None) -> BestConfiguration:
        """The chosen configuration by a rule or the study's own, of all or of one label (see `decision`)."""
        choice = self.decision(rule, label).choice
        fields = {field.name: getattr(choice, field.name) for field in dataclasses.fields(choice)}
        return BestConfiguration(**fields, run=selection.representative(self.records, choice, self.metrics).record,
                                 folder=self.folder)  # fmt: skip

    def decision(self, rule: str | None = None, label: str | None = None) -> Decision:
        """The choice by a rule or the study's own, and the reason.

        The best mean validation of the confirmed configurations, or an equal with fewer trained parameters.

        Raises:
            ValueError: no complete trial, or the rule lacks what it needs.
        """
        rule = rule or self.rule
        return decide(self.records, rule, self.metrics, self._samples(rule), label)

    def per_label(self, rule: str | None = None) -> dict[str, selection.Choice]:
        """The best configuration of every label that has one.

        Best label first (ValueError: no complete trial).
        """
        return selection.per_label(self.records, rule or self.rule, self.metrics)

    def predictions(self, entry: str, split: str = TEST) -> pd.DataFrame:
        """Predictions of the runs behind an entry's row of the leaderboard: its confirmed trials, one per seed.

        One row per run and sample: `trial, seed, role, name, target, target_label, predicted, predicted_label,
        confidence`, then the probability of every class under its name. Where nothing was confirmed, the rows are those
        of the search trial (`role`). A name that a class has as well gets underscores added.

        Args:
            entry: label of the entry.
            split: `val`, `test` or `ood/<domain>`.

        Raises:
            PredictionsError: no predictions of the entry are kept, or a file is damaged.
            ValueError: no such entry or split; the message lists what there is.
        """
        return predictions_frame(self._run_predictions(entry, split))

    def robustness(self) -> pd.DataFrame:
        """Errors of the confirmed configurations under corruptions in per cent, one row per entry, most robust first.

        Columns: `label, strategy, robust/mce` with the ends `/low` and `/high` of its 95 % interval,
        `robust/mce_over_probe, robust/relative_mce, robust/clean_error`, and `robust/<corruption>/ce` for each
        corruption. Empty where `evaluate.corruptions` is not set, or before a configuration is confirmed.
        """
        return robustness_frame(self.corrupted())

    def corrupted(self) -> list[Robustness]:
        """The same as objects, with the errors by severity."""
        try:
            entries = competitors(self.records, self.rule, self.metrics, self._samples(self.rule))
        except ValueError:  # no complete trial
            return []
        return robustness(entries)

    @property
    def plot(self) -> Plots:
        """Figures of the study, such as `results.plot.leaderboard()`.

        Raises:
            ValueError: no complete trial.
        """
        from orchestrator.results.plots import Plots

        rows = self.leaderboard().to_dict("records")
        return Plots(
            self.records,
            self.metrics,
            rows,
            self.per_label(),
            self.measurements,
            self._run_predictions,
            self.corrupted(),
        )

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs among the study's objectives (`search.objectives`); empty without any."""
        objectives = _field(_field(self.spec, "search"), "objectives") or ()
        return tuple(str(name) for name in objectives[1:])

    def front(self, *costs: str) -> pd.DataFrame:
        """Configurations by score and costs, with those on the Pareto front marked and first.

        Columns: see `orchestrator.results.front.front_frame`; `on_front` marks those that none beats in everything.

        Args:
            costs: any of `trainable_parameters`, `device_seconds` and `peak_memory`; none = the study's objectives, or
                `trainable_parameters` where it has no costs among them.

        Raises:
            ValueError: an unknown cost, or no complete trial.

        Example:
            >>> from orchestrator.record.records import TrialRecord
            >>> trials = [
            ...     TrialRecord(trial_id=name, number=number, strategy=name, label=name, config_hash=name,
            ...                 state="complete", metrics={"best/val/acc": val, "cost/trainable_parameters": size})
            ...     for number, (name, val, size) in enumerate([("full", 0.91, 1e6), ("lora", 0.93, 1e4)])
            ... ]
            >>> Results(trials).front()[["label", "val/acc", "trainable_parameters", "on_front"]].values.tolist()
            [['lora', 0.93, 10000.0, True], ['full', 0.91, 1000000.0, False]]
        """
        return front_frame(self.trade_offs(*costs), self.metrics)

    def trade_offs(self, *costs: str) -> Front:
        """The same as an object, for tables and pictures (arguments and errors: see `front`)."""
        return front(self.records, costs or self.costs or ("trainable_parameters",), self.rule, self.metrics)

    def regret(self, rule: str | None = None) -> selection.Regret:
        """Loss of the choice by a rule against the oracle's (ValueError: no complete trial)."""
        rule = rule or self.rule
        return selection.regret(self.records, rule, self.metrics, self.decision(rule).choice)

    def findings(self) -> list[str]:
        """Findings as sentences; none before a trial is complete."""
        return findings(self.records, self.rule, self.measurements, self.metrics, self._samples(self.rule))

    def warnings(self) -> list[str]:
        """Reasons to doubt the leaderboard, one sentence each."""
        sentences = list(_trouble(self.records))
        if any(r.role == "search" and r.state == "complete" for r in self.records):
            sentences += self._edges() + self._few_seeds() + self._without_samples()
            sentences += cost_warnings(self.records, self.costs)
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values (NaN as None), with every trial under `records`.

        Without a complete trial the leaderboard is empty and `problem` is the reason.
        """
        values: dict[str, Any] = {
            "study": self.name,
            "rule": self.rule,
            "problem": None,
            "leaderboard": [],
            "best": None,
            "choice": None,
            "regret": None,
            "front": None,
            "robustness": [],
            "findings": self.findings(),
            "warnings": self.warnings(),
            "measurements": finite(self.measurements),
            "trials": dict(Counter(r.state for r in self.records)),
            "records": [finite(_trial_values(record)) for record in self.records],
        }
        try:
            decision = self.decision()
            regret = self.regret()
            table = self.leaderboard()
        except ValueError as error:
            return values | {"problem": str(error)}
        values["leaderboard"] = finite(table.to_dict("records"))
        values["best"] = finite(choice_values(decision.choice))
        values["choice"] = {
            "sentence": decision.sentence,
            "best_mean": finite(choice_values(decision.best)),
            "equal": [finite(choice_values(choice)) for choice in decision.equal],
        }
        values["regret"] = finite(
            {
                "metric": regret.criterion,
                "value": regret.value,
                "confirmed": regret.confirmed,
                "chosen": choice_values(regret.chosen),
                "oracle": choice_values(regret.oracle),
            }
        )
        values["robustness"] = finite([row.to_dict() for row in self.corrupted()])
        if self.costs:
            trade_offs = self.trade_offs()
            values["front"] = {
                "costs": list(self.costs),
                "confirmed": trade_offs.confirmed,
                "sentence": trade_offs.sentence(self.metrics),
                "configurations": finite(front_rows(trade_offs, self.metrics)),
            }
        return values

    def render(self, console: Console) -> None:
        """Print leaderboard, choice, regret, findings and warnings."""
        try:
            title = f"{self.name}: leaderboard by {self.rule}{self._oracle_mark()}"
            rows = self.leaderboard().to_dict("records")
            console.print(title, markup=False, highlight=False, style="bold", soft_wrap=True)
            print_table(console, rows, self.metrics)
            for line in (self.decision().sentence, self.regret_line()):
                console.print(line, markup=False, highlight=False)
            measured = self.corrupted()
            if measured:
                print_robustness(console, measured)
            if self.costs:
                print_front(console, self.trade_offs(), self.metrics)
        except ValueError as error:
            console.print(str(error), markup=False)
        for sentence in self.findings():
            console.print(f"- {sentence}", markup=False, highlight=False)
        for warning in self.warnings():
            console.print(f"Warning: {warning}", markup=False, highlight=False, style="yellow")

    def __repr__(self) -> str:
        return f"<Results of {self.name!r}: {self._trial_counts()}; {self._best_line()}>"

    def _repr_html_(self) -> str:
        """Leaderboard, choice and warnings, for a notebook. Names are untrusted, and escaped."""
        title = f"<p><b>{escape(self.name)}</b>: leaderboard by {escape(self.rule)}, {escape(self._trial_counts())}</p>"
        try:
            rows = self.leaderboard().to_dict("records")
            sentences = [self.decision().sentence, self.regret_line()]
        except ValueError as error:
            return f"<div>{title}<p>{escape(str(error))}</p></div>"
        heads = ["strategy", "configuration", COUNT_TITLE, *score_titles(self.metrics), *robustness_titles(rows)]
        table = html_table(heads, [[*cells(row, self.metrics), *robustness_cells(row)] for row in rows])
        notes = [f"<p>{escape(text)}</p>" for text in (score_note(self.metrics, rows), *sentences)]
        warnings = [f"<li>Warning: {escape(text)}</li>" for text in self.warnings()]
        return f"<div>{title}{table}{''.join(notes)}<ul>{''.join(warnings)}</ul></div>"

    def _trial_counts(self) -> str:
        states = Counter(record.state for record in self.records)
        parts = ", ".join(f"{count} {state}" for state, count in states.most_common())
        return f"{counted(len(self.records), 'trial')} ({parts})" if parts else "no trials"

    def _best_line(self) -> str:
        try:
            return f"best by {self.rule}: {self.best().summary()}"
        except ValueError:
            return "no choice yet"

    def regret_line(self) -> str:
        """One sentence: what the choice lost against the oracle's (ValueError: no complete trial)."""
        regret = self.regret()
        best = regret.oracle.record
        lost = regret.metric.difference(regret.value, signed=False)
        measured = "confirmed configurations" if regret.confirmed else "search trials: nothing was confirmed"
        head = f"Regret {lost} of {regret.criterion} ({measured})"
        if regret.value == 0:
            return f"{head}: the oracle, which looks at test data, finds none better."
        return (
            f"{head}: the oracle, which looks at test data, would choose {best.label} (trial {best.number}), "
            f"{regret.metric.text(regret.oracle.value)}."
        )

    def markdown(self) -> str:
        """Leaderboard, choice, regret, findings and warnings as Markdown.

        The note of the study's run in MLflow.
        """
        lines = [f"# {self.name}", "", f"Selection by `{self.rule}`{self._oracle_mark()}.", ""]
        try:
            rows = self.leaderboard().to_dict("records")
            lines += [*markdown_table(rows, self.metrics), "", f"Scores: {score_note(self.metrics, rows)}.", ""]
            lines += [self.decision().sentence, "", self.regret_line()]
            measured = self.corrupted()
            if measured:
                lines += ["", "## Robustness to corruptions", "", *robustness_markdown(measured)]
            if self.costs:
                lines += ["", "## Accuracy and cost", "", *front_markdown(self.trade_offs(), self.metrics)]
        except ValueError as error:
            lines += [str(error)]
        sentences = self.findings()
        if sentences:
            lines += ["", "## Findings", "", *(f"- {sentence}" for sentence in sentences)]
        text = "\n".join([*lines, "", *(f"- **Warning:** {w}" for w in self.warnings())]).rstrip() + "\n"
        return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)  # Markdown may contain HTML, and names are untrusted

    def _oracle_mark(self) -> str:
        return " (ORACLE: looks at test data, an upper bound)" if self.rule == "oracle" else ""

    def _edges(self) -> list[str]:
        entries = {str(_field(entry, "label")): entry for entry in _field(self.spec, "strategies") or ()}
        sentences = []
        for label, record in self._chosen().items():
            fixed = _field(entries.get(label), "fixed") or {}
            preset = _field(entries.get(label), "preset")
            edges = search_spaces.near_edge(
                record.strategy, record.hparams, fixed=tuple(fixed), preset=preset, task=self.metrics.task
            )
            sentences += [f"{label}: {edge}" for edge in edges]
        return sentences

    def _chosen(self) -> dict[str, TrialRecord]:
        """The chosen configuration per label.

        By ID validation where the study's own rule is not applicable.
        """
        try:
            choices = self.per_label()
        except ValueError:
            choices = self.per_label("id_val")
        return {label: choice.record for label, choice in choices.items()}

    def _few_seeds(self) -> list[str]:
        counts = {
            label: len(selection.reported_trials(self.records, record.config_hash))
            for label, record in self._chosen().items()
            if record.strategy not in DETERMINISTIC
        }
        few = [f"{label} ({count})" for label, count in counts.items() if count < ENOUGH_SEEDS]
        if not few:
            return []
        return [
            f"Fewer than {ENOUGH_SEEDS} seeds stand behind {', '.join(few)}: differences between these rows may be "
            "chance. Raise confirm.seeds, and confirm.top_k to at least the number of strategies."
        ]

    def _without_samples(self) -> list[str]:
        """Reasons why intervals are over seeds alone."""
        tables = self._samples(self.rule)
        runs = [
            run
            for record in self._chosen().values()
            for run in selection.reported_trials(self.records, record.config_hash)
        ]
        lacking = [run for run in runs if tables.of([run], self.metrics.test, self.metrics) is None]
        sentences = list(tables.problems.values())
        if len(lacking) == len(runs):
            sentences.append(
                "No per-sample results are kept of the trials in the leaderboard: intervals are over seeds alone, "
                "without the part of the test samples, and no entry can be called ahead."
            )
        elif lacking:
            numbers = ", ".join(str(run.number) for run in lacking)
            sentences.append(
                f"No per-sample results are kept of trials {numbers}: intervals of their entries are over seeds alone, "
                "without the part of the test samples."
            )
        return sentences

    def _run_predictions(self, entry: str, split: str) -> list[RunPredictions]:
        """Kept predictions of the runs behind an entry's row (errors: see `predictions`)."""
        choices = self.per_label()
        if entry not in choices:
            labels = list(choices)
            raise ValueError(
                f"An entry with a complete trial is one of {', '.join(labels)}, but got {entry!r}."
                f"{did_you_mean(entry, labels)}"
            )
        runs = selection.reported_trials(self.records, choices[entry].record.config_hash)
        return read_runs(runs, self.folder, entry, split, self.records)

    def _samples(self, rule: str) -> SampleTables:
        """Per-sample results for a rule.

        A domain that the rule validates on is left out of means over OOD domains.
        """
        domain = rule.removeprefix(VAL_DOMAIN) if rule.startswith(VAL_DOMAIN) else None
        if domain not in self._tables:
            self._tables[domain] = SampleTables(self.folder, domain)
        return self._tables[domain]

    def _devices(self) -> float:
        """Share of a device that one trial holds.

        Its GPUs, or 1 for the CPUs of a trial without one.
        """
        gpus = _field(_field(self.spec, "resources"), "gpus")
        return float(gpus) if isinstance(gpus, int | float) and gpus > 0 else 1.0


def _trial_values(record: TrialRecord) -> dict[str, Any]:
    """One trial as plain values.

    Its identity, configuration, state, and the last value of every metric.
    """
    return {
        "number": record.number,
        "label": record.label,
        "strategy": record.strategy,
        "role": record.role,
        "held_out": record.held_out,
        "sample": record.sample,
        "seed": record.seed,
        "config_hash": record.config_hash,
        "hparams": dict(record.hparams),
        "state": record.state,
        "reason": record.reason,
        "error": record.error,
        "units": record.unit,
        "metrics": dict(record.metrics),
    }


def _trouble(records: Sequence[TrialRecord]) -> Iterator[str]:
    failed = [r for r in records if r.state == "failed" and r.reason != INTERRUPTED]
    if failed:
        reasons = ", ".join(f"{n} {why or 'unknown'}" for why, n in Counter(r.reason for r in failed).most_common())
        yield f"{len(failed)} of {len(records)} trials failed ({reasons}); `luthier status` shows their errors."
    unfinished = [r for r in records if r.unfinished]
    if unfinished:
        yield f"{len(unfinished)} of {len(records)} trials are unfinished. Run the study again to continue it."
    search = [r for r in records if r.role == "search"]
    for label in dict.fromkeys(r.label for r in search):
        states = Counter(r.state for r in search if r.label == label)
        if not states["complete"]:
            counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
            yield f"{label}: no trial used its whole budget ({counts}), so it cannot be ranked."


def _field(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
