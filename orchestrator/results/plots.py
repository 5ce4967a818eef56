"""Figures of a study's results: `results.plot.leaderboard()` and its like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from orchestrator.record.records import TrialRecord
from orchestrator.results import figures
from orchestrator.results.corruption_plot import corruption_figure
from orchestrator.results.curve_plot import figure_of
from orchestrator.results.curves import NUMBERS_ONLY, chosen_at
from orchestrator.results.errors import confusion_matrix, reliability
from orchestrator.results.fsr import estimates
from orchestrator.results.reliability_figure import SplitReliability, reliability_figure
from orchestrator.results.robustness import Robustness
from orchestrator.results.run_predictions import RunPredictions
from orchestrator.results.selection import Choice, reported_trials
from trainables.specs.metrics import TEST, TaskMetrics
from trainables.specs.suggestions import did_you_mean

Row = Mapping[Any, Any]

SIDE = 4.2
"""Side of a single reliability diagram, in inches."""


class Plots:
    """Figures of one study. Each call draws a new `matplotlib.figure.Figure`; pyplot is not used.

    A notebook shows the figures by itself; `figure.savefig("name.pdf")` writes one.

    Args:
        records: the study's trials.
        metrics: of the study's task.
        rows: the leaderboard's rows.
        chosen: label → the chosen configuration of that entry.
        measurements: of the study (`orchestrator.record.records.measurements`).
        predictions: label and split → kept predictions of the entry's runs.
        corrupted: errors of the entries under corruptions.
    """

    def __init__(
        self,
        records: Sequence[TrialRecord],
        metrics: TaskMetrics,
        rows: Sequence[Row],
        chosen: Mapping[str, Choice],
        measurements: Mapping[str, Mapping[str, Any]],
        predictions: Callable[[str, str], Sequence[RunPredictions]],
        corrupted: Sequence[Robustness] = (),
    ) -> None:
        self._records = records
        self._metrics = metrics
        self._rows = rows
        self._chosen = chosen
        self._measurements = measurements
        self._predictions = predictions
        self._corrupted = corrupted
        self._colours = figures.colours([str(row["label"]) for row in rows])

    def leaderboard(self) -> Figure:
        """Every entry's selection metric on ID test and over the OOD domains, with 95 % intervals.

        Raises:
            ValueError: no entry has an ID test score.
        """
        figure = figures.intervals(self._rows, self._colours, self._metrics)
        return _drawn(figure, f"an entry with {self._metrics.test}", "this study has none")

    def id_and_ood(self) -> Figure:
        """Selection metric on ID test against its mean over the OOD domains, with 95 % intervals.

        Raises:
            ValueError: fewer than two entries have both.
        """
        figure = figures.id_and_ood(self._rows, self._colours, self._metrics)
        needed = f"two entries with {self._metrics.test} and {self._metrics.ood_mean}"
        return _drawn(figure, needed, "this study has fewer")

    def learning_rates(self) -> Figure:
        """Validation score over the searched learning rates, a panel per entry; a ring marks the chosen ones.

        Raises:
            ValueError: no entry tried two rates.
        """
        figure = figures.learning_rates(self._records, self._chosen, self._metrics)
        return _drawn(figure, "an entry that tried two learning rates", "this study has none")

    def training(self) -> Figure:
        """Validation score over the units of budget, of every run of each entry's chosen configuration.

        Raises:
            ValueError: no run has two units.
        """
        figure = figures.training(self._records, self._chosen, self._colours, self._metrics)
        return _drawn(figure, "a run of two units", "this study has none")

    def robustness(self) -> Figure:
        """Error by corruption and severity, a heat map per entry.

        Raises:
            ValueError: nothing was measured under corruptions.
        """
        figure = corruption_figure(self._corrupted)
        return _drawn(figure, "a confirmed configuration with `evaluate.corruptions`", "this study has none")

    def fsr(self) -> Figure:
        """Fine-tuning shift ratio against every reference, with 95 % intervals over seeds and training subsamples.

        Raises:
            ValueError: the study has no FSR.
        """
        figure = figures.shift_ratios(estimates(self._records))
        return _drawn(figure, "reference trials (`diagnostics.fsr`)", "this study has no FSR")

    def curve(self, name: str, entry: str | None = None) -> Figure:
        """One recorded curve.

        Args:
            name: `lambda` (scores over λ), `wise` (over α), `cka`, …; an unknown name's error lists what there is.
            entry: label of the entry whose chosen configuration has the curve; None = a curve that the study measured
                once, such as `fsr`.

        Raises:
            ValueError: no such entry, or no such curve.
        """
        if entry is None:
            measured = [measurement.get("curves") or {} for measurement in self._measurements.values()]
            curves = {key: curve for group in measured for key, curve in group.items()}
            _check_curve(name, curves, "this study")
            return figure_of(name, curves[name], metrics=self._metrics)
        run = self._run_with(name, entry)
        return figure_of(name, run.curves[name], chosen_at(run, name), self._metrics)

    def reliability(self, entry: str, split: str = TEST) -> Figure:
        """Share of right predictions over their confidence, of all runs together, as trained and temperature-scaled.

        Args:
            entry: label of the entry whose chosen configuration is drawn.
            split: `val`, `test` or `ood/<domain>`.

        Raises:
            PredictionsError: no predictions of the entry are kept.
            ValueError: no such entry or split.
        """
        runs = self._predictions(entry, split)
        right = np.concatenate([run.logits.argmax(1) == run.targets for run in runs])
        before = np.concatenate([run.probabilities().max(1) for run in runs])
        scaled = [run.probabilities(run.temperature).max(1) for run in runs if run.temperature is not None]
        after = reliability(np.concatenate(scaled), right) if len(scaled) == len(runs) else None
        panel = SplitReliability(_heading(entry, split, len(runs)), reliability(before, right), after)
        return reliability_figure([panel], SIDE)

    def confusion(self, entry: str, split: str = TEST) -> Figure:
        """Images by label and prediction, the sum over all runs.

        Arguments and errors: see `reliability`.
        """
        runs = self._predictions(entry, split)
        classes = runs[0].classes
        targets = np.concatenate([run.targets for run in runs])
        predicted = np.concatenate([run.logits.argmax(1) for run in runs])
        counts = confusion_matrix(targets, predicted, len(classes))
        figure = figures.confusion(counts, classes)
        heading = _heading(entry, split, len(runs))
        figure.axes[0].set_title(heading, loc="left", fontsize=10, fontweight="bold", parse_math=False)
        return figure

    def _run_with(self, name: str, entry: str) -> TrialRecord:
        """The run of an entry's chosen configuration that has a curve: a confirmed one, else the search trial."""
        if entry not in self._chosen:
            labels = list(self._chosen)
            raise ValueError(
                f"An entry with a complete trial is one of {', '.join(labels)}, but got {entry!r}."
                f"{did_you_mean(entry, labels)}"
            )
        search = self._chosen[entry].record
        runs = [*reported_trials(self._records, search.config_hash), search]
        # Reversed, so that of several runs with the curve the first stays in the dict.
        by_curve = {key: run for run in reversed(runs) for key in run.curves}
        _check_curve(name, by_curve, entry)
        return by_curve[name]


def _check_curve(name: str, curves: Mapping[str, Any], owner: str) -> None:
    names = [key for key in curves if key not in NUMBERS_ONLY]
    if name not in names:
        available = ", ".join(names) or "none"
        raise ValueError(f"A curve of {owner} is one of {available}, but got {name!r}.{did_you_mean(name, names)}")


def _drawn(figure: Figure | None, needed: str, problem: str) -> Figure:
    if figure is None:
        raise ValueError(f"The figure needs {needed}, but {problem}.")
    return figure


def _heading(entry: str, split: str, runs: int) -> str:
    return f"{entry}: {split}{f', {runs} runs' if runs > 1 else ''}"
