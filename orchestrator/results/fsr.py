"""FSR, the fine-tuning shift ratio (papers/000), from the records of a study's reference trials: pure functions.

FSR = Shift(T, S) / Shift(T*, S), with Shift the sum over LayerNorms of the L2 change of γ and β after the last unit. T
is tuned on the study's own training sample; T*, the same recipe and steps on data that represent the target, is not
observable, so that three references stand for it: `full` (the whole pool), `extrapolated` (the limit of growing nested
samples) and `oracle` (labelled data of an OOD domain; analysis only, never used to choose anything).

The limit of a shift that grows with the number of training images: Shift(n) = a − b·n^(−c), and how sure it is.

For FSR's reference `extrapolated`: a stands for Shift(T*, S), which nobody can observe.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

from orchestrator.record.records import TrialRecord
from orchestrator.results.leaderboard import mean_interval

Floats = NDArray[np.float64]

EXPONENTS = np.geomspace(0.1, 4.0, 200)
"""Values of c that are tried. Below 0.1 the curve is a logarithm within any range of n that can be measured, and its
limit means nothing."""
BOOTSTRAP = 1000
"""Draws of the bootstrap, where listing all of them would take more."""


@dataclass(frozen=True)
class Fit:
    """a, b and c of one curve."""

    limit: float
    slope: float
    exponent: float

    def at(self, images: Floats) -> Floats:
        """The curve's shift at these numbers of images."""
        return np.asarray(self.limit - self.slope * images**-self.exponent)


class ShiftLimit:
    """Fits curves through shifts of a few samples.

    For every c of `EXPONENTS`, a and b are a linear problem; the c of the smallest squared residual wins (of equals the
    largest, whose limit is nearest). A curve whose c is the least of them, or whose limit is not positive, has no limit
    that could be told: it grows (b > 0) or falls (b < 0) without end.

    Args:
        images: (k,) training images of each sample.

    Raises:
        ValueError: fewer than three different sizes.
    """

    def __init__(self, images: Floats) -> None:
        sizes = sorted(set(images.tolist()))
        if len(sizes) < 3:
            got = ", ".join(f"{size:g}" for size in sizes)
            raise ValueError(f"an extrapolation needs samples of three different sizes, but they have {got} images.")
        self.images = images
        self._scale = float(np.exp(np.log(images).mean()))
        powers = (images / self._scale) ** -EXPONENTS[:, None]
        self._designs = np.stack([np.ones_like(powers), -powers], axis=2)  # (c, k, 2)
        self._solvers = np.linalg.pinv(self._designs)  # (c, 2, k)

    def fit(self, shifts: Floats) -> Fit:
        """The curve through the shifts (k,) of the samples."""
        limits, slopes, exponents = self._solve(shifts[None])
        limit, slope, exponent = float(limits[0]), float(slopes[0]), float(exponents[0])
        return Fit(limit, slope * self._scale**exponent, exponent)

    def share(self, shifts: Floats, own: int) -> Floats:
        """FSR (d,): the shift of the sample at position `own` as a share of the limit, for rows of shifts (d, k). 0
        where the shift grows without end, infinite where it falls without end."""
        limits, slopes, exponents = self._solve(shifts)
        endless = exponents <= EXPONENTS[0]
        with np.errstate(divide="ignore"):
            found = shifts[:, own] / limits
        found[(slopes > 0) & (endless | (limits <= 0))] = 0.0
        found[(slopes < 0) & (endless | (limits <= 0))] = np.inf
        return found

    def interval(self, shifts: Floats, own: int, level: float) -> tuple[float, float]:
        """Bootstrap interval of `share` over seeds.

        Percentiles of a bootstrap over three seeds called 95 % hold the truth three times of four: they know neither
        that the spread is estimated from so few (Student's t) nor that resampling shrinks it by √((n − 1)/n). So their
        distance from the estimate is stretched, on the log scale, by what both are short of: 2.7 for three seeds, 1.6
        for five (after Hesterberg, The American Statistician 69, 2015, section 4.2). In simulations it then holds the
        truth in 91 to 97 of 100 (tests/orchestrator/results/test_shift_limit.py). An end at 0 or infinity is open.

        Args:
            shifts: (k, n) of each sample and seed; all samples of a seed are drawn together.
            level: such as 0.95.

        Returns:
            (low, high); NaN for fewer than two seeds.
        """
        seeds = shifts.shape[1]
        if seeds < 2:
            return math.nan, math.nan
        shares = np.sort(self.share(shifts[:, _draws(seeds)].mean(axis=2).T, own))
        tail = (1 - level) / 2
        low, high = shares[math.floor(tail * len(shares))], shares[math.ceil((1 - tail) * len(shares)) - 1]
        (middle,) = self.share(shifts.mean(axis=1)[None], own)
        stretch = student_t.ppf(1 - tail, seeds - 1) / norm.ppf(1 - tail) * math.sqrt(seeds / (seeds - 1))
        if not 0 < middle < math.inf:
            return (0.0, float(high)) if middle == 0 else (float(low), math.inf)
        ends = [float(middle * (end / middle) ** stretch) for end in (low, high)]
        return min(ends[0], float(middle)), max(ends[1], float(middle))

    def _solve(self, shifts: Floats) -> tuple[Floats, Floats, Floats]:
        """a, b of powers of n/scale, and c, each (d,), of rows of shifts (d, k)."""
        found = np.einsum("cik,dk->dci", self._solvers, shifts)
        missed = np.square(np.einsum("cki,dci->dck", self._designs, found) - shifts[:, None]).sum(axis=2)
        tied = missed <= missed.min(axis=1, keepdims=True) * (1 + 1e-9) + 1e-18
        best = len(EXPONENTS) - 1 - np.argmax(tied[:, ::-1], axis=1)
        rows = np.arange(len(shifts))
        return found[rows, best, 0], found[rows, best, 1], EXPONENTS[best]


def _draws(seeds: int) -> NDArray[np.int64]:
    """Positions (d, n) of seeds drawn with replacement: all possible draws where they are few, else the same
    `BOOTSTRAP` every time."""
    if seeds**seeds <= BOOTSTRAP:
        return np.array(list(itertools.product(range(seeds), repeat=seeds)))
    return np.random.default_rng(0).integers(0, seeds, size=(BOOTSTRAP, seeds))


SHIFT, IMAGES = "ln_shift/last/total", "cost/training_images"
OWN, FULL, EXTRAPOLATED, ORACLE = "1", "full", "extrapolated", "oracle:"
"""Names of samples and references: the study's own, the whole pool, the limit of nested samples, and (before the
domain's name) an OOD domain."""
LEVEL = 0.95
FURTHEST = 3.0
"""A limit beyond this many times the largest measured shift is no measurement any more."""
GRID, BEYOND = 24, 4.0
"""Points of a fitted curve between the measured ones, and how many times the largest sample it goes on to."""

Samples = Mapping[str, Mapping[int, TrialRecord]]
"""Name of a sample → seed → its reference trial."""


@dataclass(frozen=True)
class FsrEstimate:
    """FSR against one reference, with a 95 % interval over seeds."""

    reference: str
    """`full`, `extrapolated`, or `oracle:<domain>`."""
    value: float
    """NaN = it cannot be told; `note` says why."""
    low: float = math.nan
    """NaN = one seed has no interval."""
    high: float = math.nan
    """Infinite = the interval is open."""
    shift: float = math.nan
    """Mean Shift(T, S) of the study's own sample."""
    reference_shift: float = math.nan
    """Mean (or fitted) Shift(T*, S)."""
    seeds: int = 0
    note: str = ""
    """What keeps the number from being believed; empty = nothing."""
    by_seed: Mapping[int, float] = field(default_factory=dict, compare=False)
    """Seed → ratio, where trials are compared seed by seed."""
    curve: Mapping[str, Any] | None = field(default=None, compare=False)
    """Of an extrapolation: `columns` images, shift (None between the samples) and fit, and `note`."""

    @property
    def lam(self) -> float:
        """First guess of λ, 1/FSR (papers/000: λ is negatively correlated with FSR)."""
        return 1 / self.value

    @property
    def lam_interval(self) -> tuple[float, float]:
        """1/FSR at the ends of the interval; the upper one is infinite where FSR may be 0."""
        return 1 / self.high, (1 / self.low if self.low > 0 else math.nan if math.isnan(self.low) else math.inf)

    @property
    def may_be_one(self) -> bool:
        """Whether the interval holds 1, as it is written: an extrapolation that has levelled off ends just below it."""
        return round(self.low, 2) <= 1 <= round(self.high, 2)

    @property
    def is_oracle(self) -> bool:
        """Whether labelled OOD images were trained on: nothing may be chosen by it."""
        return self.reference.startswith(ORACLE)

    def number(self) -> str:
        """`0.61 ± 0.07`, `0.61 [0.52, 0.75]` where the interval lies askew, or `0.61` of one seed."""
        below, above = self.value - self.low, self.high - self.value
        if math.isnan(self.low):
            return f"{self.value:.2f}"
        if abs(above - below) < 0.005:
            return f"{self.value:.2f} ± {above:.2f}"
        end = "∞)" if math.isinf(self.high) else f"{self.high:.2f}]"
        return f"{self.value:.2f} [{self.low:.2f}, {end}"

    def sentence(self) -> str:
        """What the number means."""
        if math.isnan(self.value):
            return f"No FSR ({self._against()}): {self.note}"
        head = f"FSR {self.number()} ({self._against()})"
        if self.note:
            return f"{head}: {self.note}"
        if math.isnan(self.low):
            return f"{head}: one seed is no interval; raise diagnostics.fsr_seeds before believing it."
        target = "this domain" if self.is_oracle else "the target"
        if self.may_be_one:
            meaning, advice = f"the sample may well represent {target}", "λ = 1 is the first guess"
        elif self.value < 1:
            meaning, advice = f"the sample under-represents {target}", "λ > 1 is expected to help"
        else:
            meaning, advice = f"the norms moved more than data of {target} move them", "λ < 1 is expected to help"
        if self.is_oracle:
            return f"{head}: {meaning}."
        guess = "" if self.may_be_one else f", first guess λ = {self.lam:.2f}"
        return f"{head}: {meaning}; {advice}{guess}."

    def _against(self) -> str:
        if self.is_oracle:
            return f"oracle on {self.reference.removeprefix(ORACLE)}, for analysis only"
        return {FULL: "against the full pool"}.get(self.reference, self.reference)

    def metrics(self) -> dict[str, float]:
        """By the names of the record; nothing where FSR cannot be told, and no open end."""
        if math.isnan(self.value):
            return {}
        name = f"fsr/{self.reference.replace(':', '/')}"
        found = {name: self.value, f"{name}/low": self.low, f"{name}/high": self.high}
        return {key: value for key, value in found.items() if math.isfinite(value)}


def estimates(records: Iterable[TrialRecord]) -> list[FsrEstimate]:
    """FSR against every reference that the records hold: full, extrapolated, then the oracles by name.

    Only complete reference trials that report their shift count. Several configurations may have references (the study
    was continued and another one is best now): the one with the latest trial counts.
    """
    samples = reference_samples(records)
    if OWN not in samples:
        return []
    own = samples[OWN]
    nested = {name: found for name, found in samples.items() if name not in (OWN, FULL) and not name.startswith(ORACLE)}
    found = [_ratio(FULL, own, samples[FULL])] if FULL in samples else []
    if len(nested) >= 2:
        found.append(_extrapolated(own, nested))
    return found + [_ratio(name, own, samples[name]) for name in sorted(samples) if name.startswith(ORACLE)]


def reference_samples(records: Iterable[TrialRecord]) -> Samples:
    """The trials that `estimates` looks at."""
    runs = [r for r in records if r.role == "reference" and r.state == "complete" and r.metric(SHIFT) is not None]
    samples: dict[str, dict[int, TrialRecord]] = defaultdict(dict)
    latest = max(runs, key=lambda r: r.number).config_hash if runs else None
    for record in runs:
        if record.config_hash == latest and record.sample is not None:
            samples[record.sample][record.seed] = record
    return dict(samples)


def suggested(found: Sequence[FsrEstimate]) -> FsrEstimate | None:
    """The estimate that a first λ is taken from: the full pool's, else the extrapolation's; never an oracle's, which
    has seen test labels, and none that carries a note or whose interval holds 1."""
    usable = [e for e in found if not e.is_oracle and not e.note and not math.isnan(e.low)]
    best = usable[0] if usable else None
    return None if best is None or best.may_be_one else best


def study_metrics(found: Sequence[FsrEstimate]) -> dict[str, float]:
    """Metrics of the study's own run: every estimate, and `fsr/lambda` where one suggests a λ."""
    first = suggested(found)
    values = {name: value for estimate in found for name, value in estimate.metrics().items()}
    return values if first is None else {**values, "fsr/lambda": first.lam}


def _shift(record: TrialRecord) -> float:
    value = record.metric(SHIFT)
    assert value is not None
    return value


def _ratio(reference: str, own: Mapping[int, TrialRecord], other: Mapping[int, TrialRecord]) -> FsrEstimate:
    """Mean over seeds of the ratio of two trials of one seed: what the seed does to both cancels."""
    pairs = {seed: (_shift(own[seed]), _shift(other[seed])) for seed in sorted(own.keys() & other.keys())}
    if not pairs:
        return FsrEstimate(reference, math.nan, note="no seed has a trial on both samples.")
    for name, position in (("reference's", 1), ("study's own", 0)):
        if any(pair[position] <= 0 for pair in pairs.values()):
            note = f"the {name} norms did not move: train with a higher rate or for longer."
            return FsrEstimate(reference, math.nan, seeds=len(pairs), note=note)
    ratios = {seed: mine / theirs for seed, (mine, theirs) in pairs.items()}
    mean, half = mean_interval(list(ratios.values()), LEVEL)
    shift, reference_shift = (float(np.mean([pair[i] for pair in pairs.values()])) for i in (0, 1))
    ends = (mean - half, mean + half)
    return FsrEstimate(reference, mean, *ends, shift, reference_shift, len(ratios), by_seed=ratios)


def _extrapolated(own: Mapping[int, TrialRecord], nested: Samples) -> FsrEstimate:
    """FSR as the share of the limit of Shift(n); the interval is a bootstrap over seeds."""
    samples = [*nested.values(), own]
    seeds = sorted(set.intersection(*(set(sample) for sample in samples)))
    if not seeds:
        return FsrEstimate(EXTRAPOLATED, math.nan, note="no seed has a trial on every nested sample.")
    images = np.array([[sample[seed].metric(IMAGES) or 1.0 for seed in seeds] for sample in samples]).mean(axis=1)
    shifts = np.array([[_shift(sample[seed]) for seed in seeds] for sample in samples])
    mean, at = shifts.mean(axis=1), len(samples) - 1
    try:
        limit = ShiftLimit(images)
    except ValueError as error:
        note = f"{error} List other diagnostics.fsr_fractions."
        return FsrEstimate(EXTRAPOLATED, math.nan, shift=float(mean[at]), seeds=len(seeds), note=note)
    fit, (value,) = limit.fit(mean), limit.share(mean[None], at)
    low, high = limit.interval(shifts, at, LEVEL)
    believed = 0 < value < math.inf
    note = "" if believed and fit.limit <= FURTHEST * mean.max() else _endless(shifts[np.argsort(images)])
    return FsrEstimate(
        reference=EXTRAPOLATED,
        value=float(value) if believed else math.nan,
        low=low,
        high=high,
        shift=float(mean[at]),
        reference_shift=fit.limit if believed else math.nan,
        seeds=len(seeds),
        note=note,
        curve=_curve(images, mean, fit),
    )


def _endless(shifts: Floats) -> str:
    """Why shifts (k, n) of samples, the smallest first, and seeds have no limit; and what it would mean if they went on
    so, where all seeds together tell growth from chance."""
    change, half = mean_interval((shifts[-1] - shifts[0]).tolist(), LEVEL)
    moves = "falls" if change < 0 else "grows"
    told = f"the shift still {moves} at the whole sample, so that its limit cannot be told"
    if change - half > 0:
        told += " (should it go on growing, the sample under-represents the target: λ > 1)"
    return f"{told}; take `full` or more data."


def _curve(images: Floats, shifts: Floats, fit: Fit) -> dict[str, Any]:
    """The measured shifts on the fitted curve, which goes on beyond them."""
    rows: list[tuple[float, float | None]] = [(float(n), float(s)) for n, s in zip(images, shifts, strict=True)]
    rows += [(float(n), None) for n in np.geomspace(images.min(), BEYOND * images.max(), GRID)[1:]]
    rows.sort(key=lambda row: row[0])
    at = np.array([n for n, _ in rows])
    columns = {"images": at.tolist(), "shift": [shift for _, shift in rows], "fit": fit.at(at).tolist()}
    return {"columns": columns, "note": f"Shift(n) = {fit.limit:.4g} − {fit.slope:.4g}·n^(−{fit.exponent:.3g})"}
