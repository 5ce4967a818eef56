"""FSR, the fine-tuning shift ratio (papers/000), from the records of a study's reference trials: pure functions.

FSR = Shift(T, S) / Shift(T*, S), with Shift the sum over LayerNorms of the L2 change of γ and β after the last unit. T
is tuned on the study's own training sample; T*, the same recipe and steps on data that represent the target, is not
observable, so that three references stand for it: `full` (the whole pool), `extrapolated` (the limit of growing nested
samples) and `oracle` (labelled data of an OOD domain; analysis only, never used to choose anything).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.leaderboard import mean_interval
from orchestrator.records import TrialRecord

SHIFT, IMAGES = "ln_shift/last/total", "cost/training_images"
OWN, FULL, ORACLE = "1", "full", "oracle:"
"""Names of samples: the study's own, the whole pool, and (before the domain's name) an OOD domain."""
EXPONENTS = np.geomspace(0.1, 4.0, 60)
"""Values of c in Shift(n) = a − b·n^(−c). Below 0.1 the curve is a logarithm within any range of n that can be
measured, and its limit means nothing."""
BOOTSTRAP = 1000
LEVEL = 0.95
FURTHEST = 3.0
"""A limit beyond this many times the largest measured shift is no measurement any more."""


@dataclass(frozen=True)
class FsrEstimate:
    """FSR against one reference, with a 95 % interval over seeds."""

    reference: str
    """`full`, `extrapolated`, or `oracle:<domain>`."""
    value: float
    low: float
    high: float
    shift: float
    """Mean Shift(T, S) of the study's own sample."""
    reference_shift: float
    """Mean (or fitted) Shift(T*, S)."""
    seeds: int
    note: str = ""
    """What keeps the number from being believed; empty = nothing."""
    points: tuple[tuple[float, float, float], ...] = field(default=(), compare=False)
    """Of an extrapolation: (training images, mean shift, fitted shift) per sample."""

    @property
    def lam(self) -> float:
        """First guess of λ, 1/FSR (papers/000: λ is negatively correlated with FSR)."""
        return 1 / self.value

    def sentence(self) -> str:
        """What the number means."""
        spread = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        head = f"FSR {self.value:.2f}{spread} ({self._against()})"
        if self.note:
            return f"{head}: {self.note}"
        if math.isnan(self.low):
            return f"{head}: one seed is no interval; raise diagnostics.fsr_seeds before believing it."
        if self.low <= 1 <= self.high:
            return f"{head}: the sample may well represent the target; λ = 1 is the first guess."
        if self.value < 1:
            why = f"the sample under-represents the target; λ > 1 is expected to help, first guess {self.lam:.2f}"
        else:
            why = f"the norms moved more than representative data moves them; λ < 1, first guess {self.lam:.2f}"
        return f"{head}: {why}."

    def _against(self) -> str:
        if self.reference.startswith(ORACLE):
            return f"oracle on {self.reference.removeprefix(ORACLE)}, for analysis only"
        return {FULL: "against the full pool"}.get(self.reference, self.reference)

    def metrics(self) -> dict[str, float]:
        """By the names of the record."""
        name = self.reference.replace(":", "/")
        found = {f"fsr/{name}": self.value, f"fsr/{name}/low": self.low, f"fsr/{name}/high": self.high}
        return {key: value for key, value in found.items() if math.isfinite(value)}


def estimates(records: Iterable[TrialRecord]) -> list[FsrEstimate]:
    """FSR against every reference that the records hold: full, extrapolated, then the oracles by name.

    Only complete reference trials that moved their LayerNorms count. Several configurations may have references (the
    study was continued and another one is best now): the one with the latest trial counts.
    """
    runs = [r for r in records if r.role == "reference" and r.state == "complete" and r.metric(SHIFT) is not None]
    if not runs:
        return []
    latest = max(runs, key=lambda r: r.number).config_hash
    samples: dict[str, dict[int, TrialRecord]] = defaultdict(dict)
    for record in runs:
        if record.config_hash == latest and record.sample is not None:
            samples[record.sample][record.seed] = record
    own = samples.pop(OWN, {})
    if not own:
        return []
    found = []
    if FULL in samples:
        found.append(_ratio(FULL, own, samples.pop(FULL)))
    fractions = {name: found_in for name, found_in in samples.items() if not name.startswith(ORACLE)}
    if len(fractions) >= 2:
        found.append(_extrapolated(own, fractions))
    return found + [_ratio(name, own, samples[name]) for name in sorted(samples) if name.startswith(ORACLE)]


def suggested(found: Sequence[FsrEstimate]) -> FsrEstimate | None:
    """The estimate that a first λ is taken from: the full pool's, else the extrapolation's; never an oracle's, which
    has seen test labels, and none that carries a note or whose interval holds 1."""
    usable = [e for e in found if not e.reference.startswith(ORACLE) and not e.note and not math.isnan(e.low)]
    best = usable[0] if usable else None
    return None if best is None or best.low <= 1 <= best.high else best


def _shift(record: TrialRecord) -> float:
    value = record.metric(SHIFT)
    assert value is not None
    return value


def _ratio(reference: str, own: Mapping[int, TrialRecord], other: Mapping[int, TrialRecord]) -> FsrEstimate:
    """Mean over seeds of the ratio of two trials of one seed: what the seed does to both cancels."""
    seeds = sorted(own.keys() & other.keys())
    pairs = [(_shift(own[seed]), _shift(other[seed])) for seed in seeds]
    moved = [(mine, theirs) for mine, theirs in pairs if theirs > 0]
    if not moved:
        nothing = "the reference's norms did not move: train with a higher rate or for longer."
        return FsrEstimate(reference, math.nan, math.nan, math.nan, math.nan, 0.0, len(seeds), nothing)
    mean, half = mean_interval([mine / theirs for mine, theirs in moved], LEVEL)
    shifts = np.mean(np.array(moved), axis=0)
    return FsrEstimate(reference, mean, mean - half, mean + half, float(shifts[0]), float(shifts[1]), len(moved))


def _extrapolated(own: Mapping[int, TrialRecord], fractions: Mapping[str, Mapping[int, TrialRecord]]) -> FsrEstimate:
    """Shift(n) fitted over all samples; the interval is a bootstrap over seeds."""
    samples = [*fractions.values(), own]
    seeds = sorted(set.intersection(*(set(sample) for sample in samples)))
    images = np.array([np.mean([sample[seed].metric(IMAGES) or 0.0 for seed in sample]) for sample in samples])
    if not seeds:
        seeds = sorted(own)
        shifts = np.array([[np.mean([_shift(r) for r in sample.values()])] for sample in samples])
    else:
        shifts = np.array([[_shift(sample[seed]) for seed in seeds] for sample in samples])
    order = np.argsort(images)
    images, shifts = images[order], shifts[order]
    mean = shifts.mean(axis=1)
    limit, slope, exponent = fit_limit(images, mean)
    value = mean[-1] / limit if limit > 0 else math.nan
    low, high = _bootstrap(images, shifts)
    fitted = limit - slope * images**-exponent
    points = tuple((float(n), float(s), float(f)) for n, s, f in zip(images, mean, fitted, strict=True))
    note = _doubt(limit, exponent, float(mean.max()), len(seeds))
    return FsrEstimate("extrapolated", float(value), low, high, float(mean[-1]), float(limit), len(seeds), note, points)


def _doubt(limit: float, exponent: float, largest: float, seeds: int) -> str:
    if not limit > 0:
        return "the shifts of the nested samples have no positive limit; add fractions or seeds."
    if limit > FURTHEST * largest or exponent <= EXPONENTS[0]:
        return "the shift still grows at the whole sample, so that its limit cannot be told; take `full` or more data."
    return ""


def fit_limit(images: NDArray[np.float64], shifts: NDArray[np.float64]) -> tuple[float, float, float]:
    """a, b and c of Shift(n) = a − b·n^(−c) by least squares: for every c of `EXPONENTS` a and b are a linear problem,
    the c of the smallest residual wins (ties: the larger c, whose limit is nearer).

    Raises:
        ValueError: fewer than three sizes.
    """
    if len(images) < 3 or len(set(images.tolist())) < 3:
        raise ValueError(
            f"An extrapolation needs three samples of different sizes, but got {sorted(set(images.tolist()))}. Give "
            "two diagnostics.fsr_fractions at least."
        )
    best = (math.inf, 0.0, 0.0, 0.0)
    scale = float(np.exp(np.log(images).mean()))
    for exponent in reversed(EXPONENTS):
        powers = (images / scale) ** -exponent
        design = np.stack([np.ones_like(powers), -powers], axis=1)
        (limit, slope), *_ = np.linalg.lstsq(design, shifts, rcond=None)
        residual = float(np.square(design @ (limit, slope) - shifts).sum())
        if residual < best[0] * (1 - 1e-9) - 1e-18:
            best = (residual, float(limit), float(slope * scale**exponent), float(exponent))
    return best[1], best[2], best[3]


def _bootstrap(images: NDArray[np.float64], shifts: NDArray[np.float64]) -> tuple[float, float]:
    """Percentiles of FSR over resampled seeds; all resamples where there are few enough to list them."""
    count = shifts.shape[1]
    if count < 2:
        return math.nan, math.nan
    if count**count <= BOOTSTRAP:
        draws = [list(draw) for draw in itertools.combinations_with_replacement(range(count), count)]
        weights = [_permutations(draw) for draw in draws]
    else:
        generator = np.random.default_rng(0)
        draws = generator.integers(0, count, size=(BOOTSTRAP, count)).tolist()
        weights = [1] * len(draws)
    ratios = []
    for draw, weight in zip(draws, weights, strict=True):
        mean = shifts[:, draw].mean(axis=1)
        limit = fit_limit(images, mean)[0]
        ratios += [mean[-1] / limit if limit > 0 else 0.0] * weight
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return float(low), float(high)


def _permutations(draw: Sequence[int]) -> int:
    """In how many orders a multiset can be drawn."""
    return math.factorial(len(draw)) // math.prod(math.factorial(draw.count(item)) for item in set(draw))
