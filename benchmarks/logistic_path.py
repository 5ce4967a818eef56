"""The linear probe's solver against scikit-learn's, side by side on one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.logistic_path            # table; about three minutes
    OMP_NUM_THREADS=1 python -m benchmarks.logistic_path --equal    # and scikit-learn at an equal objective; longer
    OMP_NUM_THREADS=1 python -m benchmarks.logistic_path --json     # the same as JSON on stdout

Both solve the 100 values of C of the linear probe's path, scikit-learn warm-started (L-BFGS, its tolerance of 1e-4).
Features are those of real networks on the handwritten digits, and Gaussian classes over a grid of sizes and condition
numbers of the covariance. Times are CPU seconds. `excess` is the largest distance of an objective from the optimum over
the path, relative to the optimum. At its tolerance scikit-learn stops farther away: `ratio` is a lower bound of the
ratio at an equal objective, and `--equal` tightens it by decades until its excess is no larger than ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from benchmarks.feature_sets import digit_images, feature_sets
from trainables.tasks.linear_probe_head import regularisation_path
from trainables.tasks.logistic_path import logistic_path

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Solutions = list[tuple[Any, Any]]

PATH = regularisation_path(100)
SYNTHETIC = (
    # images, channels, classes, condition number
    (400, 1280, 8, 1e2),
    (1000, 64, 10, 1.0),
    (1000, 64, 10, 1e6),
    (2000, 256, 20, 1e4),
    (4000, 384, 20, 1.0),
    (4000, 384, 20, 1e3),
)
NOISY = 0.3
"""Share of labels that are drawn at random in the second half of the synthetic sets: classes that do not separate."""
REAL = {"tf_efficientnet_lite0": 1636, "digits_cnn": 1200, "digits_vit": 1200}
"""Set of `benchmarks.feature_sets` → its training images."""
TIGHT = 1e-12
"""Tolerance of the solutions that objectives are compared with."""
DECADES = 4
"""How far scikit-learn's tolerance is tightened."""


@dataclass(frozen=True)
class Row:
    """One set of features."""

    name: str
    images: int
    channels: int
    classes: int
    seconds: float
    excess: float
    sklearn_seconds: float
    sklearn_excess: float
    equal_seconds: float | None
    """scikit-learn's at an excess no larger than ours; None = not measured, or out of its reach."""

    @property
    def ratio(self) -> float:
        return self.sklearn_seconds / self.seconds


def problems() -> Iterator[tuple[str, Doubles, Integers]]:
    """Name, standardised features (N, D), labels (N,)."""
    labels = digit_images(8)[1].numpy().astype(np.int64)
    features = feature_sets()
    for name, images in REAL.items():
        if name in features:
            yield name, standardised(features[name][:images].numpy()), labels[:images]
    for images, channels, classes, condition in SYNTHETIC:
        for noise in (0.0, NOISY):
            name = f"Gaussian, condition {condition:g}" + (", noisy labels" if noise else "")
            yield name, *gaussian_classes(images, channels, classes, condition, noise)


def standardised(features: NDArray[Any]) -> Doubles:
    """As the linear probe does it: one mean and one deviation for all channels."""
    doubles = np.asarray(features, dtype=np.float64)
    return (doubles - doubles.mean()) / doubles.std()


def gaussian_classes(
    images: int, channels: int, classes: int, condition: float, noise: float
) -> tuple[Doubles, Integers]:
    """One Gaussian per class, of a common covariance with this condition number, and labels partly drawn at random."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, images)
    centres = generator.normal(size=(classes, channels)) / 4
    features = generator.normal(size=(images, channels)) + centres[labels]
    features *= np.geomspace(1, condition**-0.5, channels)
    redrawn = generator.random(images) < noise
    labels[redrawn] = generator.integers(0, classes, redrawn.sum())
    return standardised(features), labels


def objectives(features: Doubles, labels: Integers, solutions: Solutions) -> Doubles:
    """C · Σ cross-entropy + ½‖W‖² of every C."""
    values = []
    for C, (weight, bias) in zip(PATH, solutions, strict=True):
        logits = features @ weight.T + bias
        logits -= logits.max(1, keepdims=True)
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
        values.append(C * losses.sum() + 0.5 * np.square(weight).sum())
    return np.array(values)


def sklearn_path(features: Doubles, labels: Integers, tolerance: float) -> Solutions:
    """scikit-learn's solutions, each C started from the one before."""
    model = LogisticRegression(tol=tolerance, max_iter=10_000, warm_start=True)
    solutions = []
    with warnings.catch_warnings():
        # At tight tolerances its line search ends in rounding.
        warnings.simplefilter("ignore")
        for C in PATH:
            model.set_params(C=C).fit(features, labels)
            solutions.append((model.coef_.copy(), model.intercept_.copy()))
    return solutions


def timed(solve: Callable[[], Solutions]) -> tuple[float, Solutions]:
    """CPU seconds and solutions."""
    start = time.process_time()
    solutions = solve()
    return time.process_time() - start, solutions


def compare(name: str, features: Doubles, labels: Integers, equal: bool) -> Row:
    """Measure both solvers on one set of features."""
    seconds, ours = timed(lambda: list(logistic_path(features, labels, PATH)))
    sklearn_seconds, theirs = timed(lambda: sklearn_path(features, labels, 1e-4))
    optimum = objectives(features, labels, list(logistic_path(features, labels, PATH, tolerance=TIGHT)))

    def excess(solutions: Solutions) -> float:
        return float(((objectives(features, labels, solutions) - optimum) / optimum).max())

    equal_seconds = None
    if equal:
        for decade in range(DECADES + 1):
            tightened, solutions = timed(functools.partial(sklearn_path, features, labels, 10.0 ** (-4 - decade)))
            if excess(solutions) <= excess(ours):
                equal_seconds = tightened
                break
    return Row(
        name,
        images=features.shape[0],
        channels=features.shape[1],
        classes=int(labels.max()) + 1,
        seconds=seconds,
        excess=excess(ours),
        sklearn_seconds=sklearn_seconds,
        sklearn_excess=excess(theirs),
        equal_seconds=equal_seconds,
    )


HEADER = (
    f"{'features':34} {'N × D, K':18} {'ours s':>7} {'excess':>8} {'sklearn s':>10} {'excess':>8} {'ratio':>6}  equal"
)


def line(row: Row) -> str:
    """One row of the table."""
    size = f"{row.images} × {row.channels}, {row.classes}"
    equal = "" if row.equal_seconds is None else f"{row.equal_seconds:.1f} s, {row.equal_seconds / row.seconds:.1f}"
    return (
        f"{row.name:34} {size:18} {row.seconds:7.2f} {row.excess:8.0e} {row.sklearn_seconds:10.2f} "
        f"{row.sklearn_excess:8.0e} {row.ratio:6.1f}  {equal}"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equal", action="store_true", help="tighten scikit-learn to an equal objective")
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.json:
        print(HEADER)
    rows = []
    for problem in problems():
        row = compare(*problem, equal=options.equal)
        rows.append(row)
        if not options.json:
            print(line(row), flush=True)
    if options.json:
        json.dump([asdict(row) | {"ratio": row.ratio} for row in rows], sys.stdout, indent=2)


if __name__ == "__main__":
    main()
