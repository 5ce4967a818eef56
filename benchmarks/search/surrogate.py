"""Models of learning curves: one per strategy and landscape, fitted to a table of real trials."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

import search_spaces

Array = NDArray[np.float64]

VAL = 0
TEST = 1
OOD = 2
COLUMNS = ("val/acc", "test/acc", "ood/mean/acc")
"""Last axis of a curve: accuracy on validation, ID test, and the mean over OOD domains."""

NEIGHBOURS = 5
"""Repeated configurations whose noise a configuration may have."""

DENSE = 512
"""Random points per strategy among which the best configuration is looked for."""


def features(strategy: str, hparams: Mapping[str, Any]) -> Array:
    """A configuration as numbers in 0 … 1.

    Numbers on their own (log or linear) scale, choices one-hot; what does not exist beside the others is 0.5.
    """
    values: list[float] = []
    for key, hyperparameter in search_spaces.space(strategy).items():
        distribution = hyperparameter.distribution
        value = hparams.get(key)
        if isinstance(distribution, CategoricalDistribution):
            values += [float(value == choice) for choice in distribution.choices]
        elif value is None:
            values.append(0.5)
        else:
            assert isinstance(distribution, FloatDistribution | IntDistribution)
            scale = math.log if distribution.log else float
            low = scale(distribution.low)
            values.append((scale(value) - low) / (scale(distribution.high) - low))
    return np.array(values or [0.0])


@dataclass(frozen=True)
class Trials:
    """Trials of one strategy in a table."""

    strategy: str
    hparams: list[dict[str, Any]]
    """By configuration."""
    configuration: NDArray[np.int64]
    """Of each trial (N,)."""
    curves: Array
    """(N, epochs, len(COLUMNS)); a diverged trial has zeros from the unit on in which it diverged."""
    diverged: NDArray[np.bool_]
    """Of each trial (N,)."""
    units: NDArray[np.int64]
    """Units of each trial before it ended or diverged (N,)."""
    unit_seconds: float
    """Median time of one epoch."""

    @property
    def inputs(self) -> Array:
        """`features` of each trial, (N, D)."""
        rows = [features(self.strategy, self.hparams[i]) for i in self.configuration]
        return np.stack(rows)


def read(table: Path) -> dict[str, Trials]:
    """Strategy → its trials in a landscape's table."""
    frame = pd.read_parquet(table)
    epochs = int(frame["unit"].max())
    trials = {}
    for strategy, rows in frame.groupby("strategy", sort=True):
        hparams: dict[int, dict[str, Any]] = {}
        configurations = []
        curves = []
        diverged = []
        lengths = []
        for (configuration, _), units in rows.groupby(["configuration", "seed"], sort=True):
            hparams[int(configuration)] = json.loads(units["hparams"].iloc[0])
            configurations.append(int(configuration))
            curves.append(_curve(units.sort_values("unit"), epochs))
            diverged.append(bool(units["diverged"].iloc[0]))
            lengths.append(int((units["unit"] > 0).sum()))
        order = sorted(hparams)
        position = {configuration: i for i, configuration in enumerate(order)}
        trials[str(strategy)] = Trials(
            strategy=str(strategy),
            hparams=[hparams[configuration] for configuration in order],
            configuration=np.array([position[configuration] for configuration in configurations]),
            curves=np.stack(curves),
            diverged=np.array(diverged),
            units=np.array(lengths),
            unit_seconds=float(rows["cost/unit_seconds"].median()),
        )
    return trials


def _curve(units: pd.DataFrame, epochs: int) -> Array:
    """(epochs, len(COLUMNS)) of one trial."""
    curve = np.zeros((epochs, len(COLUMNS)))
    measured = units[units["unit"] > 0]
    values = measured[list(COLUMNS)].to_numpy(dtype=np.float64)
    curve[: len(values)] = np.nan_to_num(values)
    # The linear probe is solved in one unit, whose scores stay.
    if len(values) and not bool(units["diverged"].iloc[0]):
        curve[len(values) :] = values[-1]
    return curve


def accuracy_of_best_epoch(curves: Array) -> Array:
    """Test accuracy of the tested weights, those of the epoch with the best validation: (N, epochs, columns) → (N,)."""
    chosen = curves[:, :, VAL].argmax(axis=1)
    weights: Array = curves[np.arange(len(curves)), chosen, TEST]
    return weights


class Surrogate:
    """Expected curves of one strategy, and its noise between seeds.

    A Gaussian process or extremely randomised trees (Geurts et al., 2006), whichever predicts the final validation of
    the better half of the configurations better where each is left out. Both model the log-odds of the accuracies, in
    which a failed configuration is not a hundred times as far from a good one as two good ones are apart.

    Trials that diverged are left out, and a classifier says where trials diverge: a curve model would smooth the cliff
    between the best rates and the first ones that diverge, and find its optimum there.

    Args:
        trials: of the table.
        seed: of the bootstrap sample of configurations that the model is fitted to; None = all of them.
    """

    def __init__(self, trials: Trials, seed: int | None = None) -> None:
        self.strategy = trials.strategy
        self.unit_seconds = trials.unit_seconds
        self.shape = trials.curves.shape[1:]
        self._noise = _Noise(trials)
        chosen = np.arange(len(trials.configuration))
        count = len(trials.hparams)
        if seed is not None and count > 1:
            generator = np.random.default_rng(seed)
            sample = set(generator.integers(count, size=count).tolist())
            chosen = np.array([i for i in chosen if trials.configuration[i] in sample])
        self._divergence = _Divergence(trials, chosen)
        chosen = chosen[~trials.diverged[chosen]]
        inputs = trials.inputs[chosen]
        targets = trials.curves[chosen].reshape(len(chosen), -1)
        groups = trials.configuration[chosen]
        self._constant = None
        if len(set(groups)) < 3:
            self._constant = targets.mean(axis=0) if len(targets) else np.zeros(math.prod(self.shape))
        self.error = math.nan
        """Root mean squared error of the final validation accuracy of left-out configurations."""
        self.error_of_better = math.nan
        """The same over the better half of the configurations, among which a search has to choose."""
        self.model = "mean"
        """Kind of the model."""
        if self._constant is None:
            final = (self.shape[0] - 1) * self.shape[1] + VAL
            odds = _log_odds(targets)
            models = [make().fit(inputs, odds) for make in (_Process, _Trees)]
            errors = [_left_out_errors(model, inputs, odds, groups, final) for model in models]
            means = np.array([_accuracy(odds[groups == group, final].mean()) for group in np.unique(groups)])
            better = means >= np.median(means)
            chosen_model = int(np.argmin([_root_mean_square(part[better]) for part in errors]))
            self._model = models[chosen_model]
            self.model = ("GP", "trees")[chosen_model]
            self.error = _root_mean_square(errors[chosen_model])
            self.error_of_better = _root_mean_square(errors[chosen_model][better])

    @property
    def noise(self) -> float:
        """Standard deviation of the best epoch's validation accuracy between seeds."""
        return self._noise.of_best_epoch

    def expected(self, hparams: Sequence[Mapping[str, Any]]) -> Array:
        """Curves without noise of trials that do not diverge, (N, epochs, len(COLUMNS)), within 0 … 1."""
        if self._constant is not None:
            flat = np.tile(self._constant, (len(hparams), 1))
        else:
            flat = _accuracy(self._model.predict(self._inputs_of(hparams)))
        return flat.reshape(len(hparams), *self.shape)

    def stable(self, hparams: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_]:
        """Which configurations diverge less often than not, (N,)."""
        return self._divergence.probability(self._inputs_of(hparams)) < 0.5

    def diverges(self, hparams: Mapping[str, Any], generator: np.random.Generator) -> int | None:
        """The epoch, from 1, in which a trial of a configuration diverges; None = it does not."""
        return self._divergence.draw(self._inputs_of([hparams]), generator)

    def _inputs_of(self, hparams: Sequence[Mapping[str, Any]]) -> Array:
        return np.stack([features(self.strategy, point) for point in hparams])

    def draw(self, hparams: Mapping[str, Any], generator: np.random.Generator) -> Array:
        """A curve (epochs, len(COLUMNS)) on a random seed."""
        return self._noise.added(self.expected([hparams])[0], features(self.strategy, hparams), generator)


class _Noise:
    """Differences between seeds, as those of the trials that were repeated.

    Args:
        trials: of the table.
    """

    def __init__(self, trials: Trials) -> None:
        inputs = []
        curves = []
        best = []
        for configuration, hparams in enumerate(trials.hparams):
            repeated = trials.curves[(trials.configuration == configuration) & ~trials.diverged]
            if len(repeated) > 1:
                # The mean is over the same seeds.
                unbiased = math.sqrt(len(repeated) / (len(repeated) - 1))
                peaks = repeated[:, :, VAL].max(axis=1)
                inputs.append(features(trials.strategy, hparams))
                curves.append((repeated - repeated.mean(axis=0)) * unbiased)
                best.append((peaks - peaks.mean()) * unbiased)
        self._inputs = inputs
        self._curves = curves
        """Of each repeated configuration: deviations from the mean over seeds, (seeds, epochs, columns)."""
        self._best = best
        """Of each repeated configuration: the same of the best epoch's validation, (seeds,)."""
        self.of_best_epoch = _root_mean_square(np.concatenate(best)) if best else 0.0

    def added(self, expected: Array, inputs: Array, generator: np.random.Generator) -> Array:
        """A curve (epochs, columns) on a random seed, as of one of the `NEIGHBOURS` nearest repeated configurations.

        No epoch is better than the best expected one and that seed's deviation of its best epoch: the epochs at which
        an unstable training falls differ between seeds by tens of points, but never exceed what it ends at.
        """
        if not self._inputs:
            return expected
        distances = np.linalg.norm(np.stack(self._inputs) - inputs, axis=1)
        nearest = generator.choice(np.argsort(distances, kind="stable")[:NEIGHBOURS])
        seed = generator.integers(len(self._best[nearest]))
        # Either sign: differences between seeds have no direction.
        sign = generator.choice([-1.0, 1.0])
        curve: Array = expected + sign * self._curves[nearest][seed]
        peak = expected[:, VAL].max() + sign * self._best[nearest][seed]
        curve[:, VAL] = np.minimum(curve[:, VAL], peak)
        return np.clip(curve, 0.0, 1.0)


_SMALLEST = 0.005
"""Accuracies of a model lie at least this far from 0 and 1: about one image of a validation set."""


def _log_odds(accuracies: Array) -> Array:
    clipped = np.clip(accuracies, _SMALLEST, 1 - _SMALLEST)
    return np.log(clipped / (1 - clipped))


def _accuracy(log_odds: Any) -> Any:
    return 1 / (1 + np.exp(-log_odds))


class _Divergence:
    """Probability that a trial diverges, and when: extremely randomised trees on the design.

    Args:
        trials: of the table.
        chosen: which of them.
    """

    def __init__(self, trials: Trials, chosen: NDArray[np.int64]) -> None:
        diverged = trials.diverged[chosen]
        self._share = float(diverged.mean())
        self._units = trials.units[chosen][diverged]
        self._classifier: ExtraTreesClassifier | None = None
        if 0 < self._share < 1:
            trees = ExtraTreesClassifier(n_estimators=50, random_state=0)
            self._classifier = trees.fit(trials.inputs[chosen], diverged)

    def probability(self, inputs: Array) -> Array:
        """Of each configuration, inputs (N, D) → (N,)."""
        if self._classifier is None:
            return np.full(len(inputs), self._share)
        probability: Array = self._classifier.predict_proba(inputs)[:, 1]
        return probability

    def draw(self, inputs: Array, generator: np.random.Generator) -> int | None:
        """The epoch in which a trial of one configuration (1, D) diverges; None = it does not."""
        if not self._share or generator.random() >= self.probability(inputs)[0]:
            return None
        return int(generator.choice(self._units)) + 1


class _Process:
    """A Gaussian process on standardised curves (Rasmussen and Williams, 2006), one kernel for all epochs."""

    def __init__(self, kernel: Any = None) -> None:
        self._fixed = kernel

    def fit(self, inputs: Array, targets: Array) -> _Process:
        """Fit to inputs (N, D) and targets (N, K)."""
        self._mean = targets.mean(axis=0)
        self._scale = targets.std(axis=0) + 1e-6
        kernel = self._fixed
        if kernel is None:
            lengths = Matern(np.full(inputs.shape[1], 0.5), (0.05, 20.0), nu=2.5)
            kernel = ConstantKernel(1.0, (0.1, 10.0)) * lengths + WhiteKernel(0.05, (1e-4, 1.0))
        optimizer = "fmin_l_bfgs_b" if self._fixed is None else None
        self._process = GaussianProcessRegressor(kernel, optimizer=optimizer, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._process.fit(inputs, (targets - self._mean) / self._scale)
        return self

    def again(self) -> _Process:
        """An unfitted model with the kernel of this one."""
        return _Process(self._process.kernel_)

    def predict(self, inputs: Array) -> Array:
        """Targets (N, K)."""
        prediction: Array = np.asarray(self._process.predict(inputs)).reshape(len(inputs), -1)
        return prediction * self._scale + self._mean


class _Trees:
    """Extremely randomised trees."""

    def fit(self, inputs: Array, targets: Array) -> _Trees:
        """Fit to inputs (N, D) and targets (N, K)."""
        self._trees = ExtraTreesRegressor(n_estimators=50, random_state=0).fit(inputs, targets)
        return self

    def again(self) -> _Trees:
        """An unfitted model of the same kind."""
        return _Trees()

    def predict(self, inputs: Array) -> Array:
        """Targets (N, K)."""
        prediction: Array = np.asarray(self._trees.predict(inputs)).reshape(len(inputs), -1)
        return prediction


def _left_out_errors(
    model: _Process | _Trees, inputs: Array, targets: Array, groups: NDArray[np.int64], column: int
) -> Array:
    """Errors of one accuracy, each configuration predicted by a model of all others, (groups,)."""
    errors = []
    for group in np.unique(groups):
        out = groups == group
        prediction = model.again().fit(inputs[~out], targets[~out]).predict(inputs[out])
        errors.append(float(_accuracy(prediction[:, column].mean()) - _accuracy(targets[out, column].mean())))
    return np.array(errors)


def _root_mean_square(values: Array) -> float:
    return math.sqrt(float(np.mean(values**2)))


@dataclass(frozen=True)
class Landscape:
    """Surrogates of all strategies on one pair."""

    name: str
    surrogates: dict[str, Surrogate]
    best: dict[str, float]
    """Strategy → expected test accuracy of its best configuration."""

    @classmethod
    def load(cls, table: Path, seed: int | None = None) -> Landscape:
        """Fit the surrogates of a table; see `Surrogate` for `seed`."""
        trials = read(table)
        surrogates = {strategy: Surrogate(trials[strategy], seed) for strategy in trials}
        best = {strategy: _best(surrogate, trials[strategy].hparams) for strategy, surrogate in surrogates.items()}
        return cls(table.stem, surrogates, best)

    @property
    def optimum(self) -> float:
        """Expected test accuracy of the best configuration of all."""
        return max(self.best.values())


def _best(surrogate: Surrogate, design: Sequence[Mapping[str, Any]]) -> float:
    """Over the configurations of the table and `DENSE` random ones."""
    if not search_spaces.space(surrogate.strategy):
        return float(accuracy_of_best_epoch(surrogate.expected([{}]))[0])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points: list[Mapping[str, Any]] = list(design)
    points += [search_spaces.suggest(study.ask(), surrogate.strategy) for _ in range(DENSE)]
    stable = surrogate.stable(points)
    return float(accuracy_of_best_epoch(surrogate.expected(points))[stable].max(initial=0.0))
