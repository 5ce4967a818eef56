"""FSR, the fine-tuning shift ratio of Tan et al. (2025).

It is computed from the records of a study's reference trials.

FSR = Shift(T, S) / Shift(T*, S), where Shift is the sum over LayerNorms of the L2 change of γ and β after the last
unit. T is tuned on the study's own training sample; T*, with the same recipe and steps on data that represent the
target, is not observable, so that three references stand for it: `full` (the whole pool), `extrapolated` (the limit of
growing nested samples) and `oracle` (labelled data of an OOD domain; analysis only, never used to choose anything).

Reference trials of seed r run on draw r of the training images: draw 0 is the study's own sample, the others are as
large and of the same classes. With the effects a of the seed and b of the draw, and e of both and of the training,
ratio r is y[r] = FSR + a[r] + b[r] + e[r], and the variance of the mean of R of them,

    V = (σ_a² + σ_b² + σ_e²) / R,

is estimated by that of the ratios, s²/R, with R − 1 degrees of freedom: the interval is over seeds and training
subsamples, without telling their parts apart (which would take R² trials per sample). Seed and draw are common to the
trials of a ratio, and cancel as far as they move both. Studies of earlier versions have one draw, and an interval over
seeds alone.

The extrapolation fits Shift(n) = a − b·n^(−c) to the shifts of nested samples of n images; the limit a stands for
Shift(T*, S).
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
from orchestrator.results.intervals import mean_interval
from orchestrator.wording import counted
from trainables.specs.metrics import FSR, FSR_HIGH, FSR_LAMBDA, FSR_LOW, LN_SHIFT_LAST, TRAINING_IMAGES

Floats = NDArray[np.float64]

EXPONENTS = np.geomspace(0.1, 4.0, 200)
"""Candidate values of c. Below 0.1 the curve is a logarithm over any measurable range of n, and its limit is
meaningless."""
BOOTSTRAP = 1000
"""Bootstrap resamples, unless all possible ones are fewer."""


@dataclass(frozen=True)
class Fit:
    """Parameters of one curve Shift(n) = a − b·n^(−c)."""

    limit: float
    """a"""
    slope: float
    """b"""
    exponent: float
    """c"""

    def at(self, images: Floats) -> Floats:
        """Shift at these numbers of images."""
        return np.asarray(self.limit - self.slope * images**-self.exponent)


class ShiftLimit:
    """Least-squares fit of a − b·n^(−c) to the shifts of a few samples.

    For every c of `EXPONENTS`, a and b are a linear problem; the c of the smallest squared residual wins (of equals the
    largest, whose limit is nearest). A fit whose c is the smallest candidate, or whose limit is not positive, counts as
    unbounded: growing (b > 0) or falling (b < 0).

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
        # Scaled by the geometric mean of the sizes: powers of raw image counts would make the least squares ill-
        # conditioned.
        powers = (images / self._scale) ** -EXPONENTS[:, None]
        self._designs = np.stack([np.ones_like(powers), -powers], axis=2)  # (c, k, 2)
        # Once per set of sizes, since a bootstrap solves a thousand times for the same designs.
        self._solvers = np.linalg.pinv(self._designs)  # (c, 2, k)

    def fit(self, shifts: Floats) -> Fit:
        """The curve through the shifts (k,) of the samples."""
        limits, slopes, exponents = self._solve(shifts[None])
        exponent = float(exponents[0])
        return Fit(float(limits[0]), float(slopes[0]) * self._scale**exponent, exponent)

    def share(self, shifts: Floats, index: int) -> Floats:
        """FSR (d,) for rows of shifts (d, k).

        The shift of the sample at `index` divided by the limit: 0 where the fit grows without bound, infinite where it
        falls without bound.
        """
        limits, slopes, exponents = self._solve(shifts)
        unbounded = (exponents <= EXPONENTS[0]) | (limits <= 0)
        with np.errstate(divide="ignore"):
            shares = shifts[:, index] / limits
        # The limit of a curve that grows without bound is infinite, so the share is 0.
        shares[(slopes > 0) & unbounded] = 0.0
        shares[(slopes < 0) & unbounded] = np.inf
        return shares

    def interval(self, shifts: Floats, index: int, level: float) -> tuple[float, float]:
        """Bootstrap interval of `share` over seeds, and over the training subsamples where each seed has its own.

        Nominal 95 % percentile intervals over three seeds cover the true value in three of four cases: they ignore
        that the spread is estimated from few values (Student's t), and that resampling shrinks it by √((n − 1)/n). The
        distance of their ends from the estimate is therefore stretched, on the log scale, by both factors: 2.7 for
        three seeds, 1.6 for five (after Hesterberg, 2015, "What Teachers Should Know About the Bootstrap", The American
        Statistician 69, section 4.2). Coverage in simulations is then 91 to 97 % (tests/orchestrator/results/
        test_shift_limit.py). An end at 0 or infinity is open.

        Args:
            shifts: (k, n), per sample and seed; all samples of a seed are resampled together.
            level: such as 0.95.

        Returns:
            (low, high); NaN for fewer than two seeds.
        """
        seeds = shifts.shape[1]
        if seeds < 2:
            return math.nan, math.nan
        shares = np.sort(self.share(shifts[:, _draws(seeds)].mean(axis=2).T, index))
        tail = (1 - level) / 2
        low = float(shares[math.floor(tail * len(shares))])
        high = float(shares[math.ceil((1 - tail) * len(shares)) - 1])
        (middle,) = self.share(shifts.mean(axis=1)[None], index)
        stretch = student_t.ppf(1 - tail, seeds - 1) / norm.ppf(1 - tail) * math.sqrt(seeds / (seeds - 1))
        if middle == 0:
            return 0.0, high
        if not 0 < middle < math.inf:
            return low, math.inf
        ends = [float(middle * (end / middle) ** stretch) for end in (low, high)]
        # The percentiles need not enclose the estimate from the seeds' mean.
        return min(ends[0], float(middle)), max(ends[1], float(middle))

    def _solve(self, shifts: Floats) -> tuple[Floats, Floats, Floats]:
        """Parameters a, b and c, each (d,), for rows of shifts.

        a and b are those for powers of n/scale; shifts are (d, k).
        """
        solutions = np.einsum("cik,dk->dci", self._solvers, shifts)
        residuals = np.einsum("cki,dci->dck", self._designs, solutions) - shifts[:, None]
        # Of exponents that fit equally well the largest is taken: `argmax` over the reversed axis finds it.
        errors = np.square(residuals).sum(axis=2)  # (d, c)
        # To rounding, also where the curve fits exactly and the smallest error is rounding itself.
        tied = errors <= errors.min(axis=1, keepdims=True) * (1 + 1e-9) + 1e-18
        best = len(EXPONENTS) - 1 - np.argmax(tied[:, ::-1], axis=1)
        rows = np.arange(len(shifts))
        return solutions[rows, best, 0], solutions[rows, best, 1], EXPONENTS[best]


def _draws(seeds: int) -> NDArray[np.int64]:
    """Bootstrap resamples (d, n) of seed indices.

    All possible ones where they are few, else `BOOTSTRAP` fixed ones.
    """
    if seeds**seeds <= BOOTSTRAP:
        return np.array(list(itertools.product(range(seeds), repeat=seeds)))
    return np.random.default_rng(0).integers(0, seeds, size=(BOOTSTRAP, seeds))


SHIFT = LN_SHIFT_LAST.of("total")
"""Recorded name of the shift that FSR compares."""
IMAGES = TRAINING_IMAGES.name
"""Recorded name of a sample's size."""
OWN = "1"
"""Sample of the study itself."""
FULL = "full"
"""Sample and reference: the whole pool."""
EXTRAPOLATED = "extrapolated"
"""Reference: the limit of nested samples."""
ORACLE = "oracle:"
"""Prefix, before the domain's name, of a sample and reference of labelled OOD images."""
LEVEL = 0.95
MAX_EXTRAPOLATION = 3.0
"""A limit beyond this many times the largest measured shift is not reported as a measurement."""
GRID = 24
"""Points of the drawn fit between the measured ones."""
DRAWN_RANGE = 4.0
"""End of the drawn fit, as a multiple of the largest sample."""
DRAW = "#"
"""Between a sample's name and the number of its draw."""

Samples = Mapping[str, Mapping[int, TrialRecord]]
"""Name of a sample → seed → its reference trial."""


def drawn_sample(sample: str, draw: int) -> str:
    """Recorded name of a draw of a sample.

    Example:
        >>> drawn_sample("0.25", 2), drawn_sample("0.25", 0)
        ('0.25#2', '0.25')
    """
    return f"{sample}{DRAW}{draw}" if draw else sample


def draw_of(recorded: str) -> tuple[str, int]:
    """Inverse of `drawn_sample`. Oracles have no draws, and their domains may have any name.

    Example:
        >>> draw_of("0.25#2"), draw_of("oracle:sketch#2")
        (('0.25', 2), ('oracle:sketch#2', 0))
    """
    sample, separator, draw = recorded.rpartition(DRAW)
    return (sample, int(draw)) if separator and not recorded.startswith(ORACLE) else (recorded, 0)


@dataclass(frozen=True)
class FsrEstimate:
    """FSR against one reference, with a 95 % interval over seeds and, where there are several draws, subsamples."""

    reference: str
    """`full`, `extrapolated`, or `oracle:<domain>`."""
    value: float
    """NaN = not determined; `note` gives the reason."""
    low: float = math.nan
    """Lower end of the interval; NaN for one seed."""
    high: float = math.nan
    """Upper end of the interval; infinite = open."""
    shift: float = math.nan
    """Mean Shift(T, S) of the study's own sample."""
    reference_shift: float = math.nan
    """Mean (or fitted) Shift(T*, S)."""
    seeds: int = 0
    note: str = ""
    """Why the number is not reliable; empty if it is."""
    draws: int = 1
    """Training subsamples among the seeds' trials."""
    images: int | None = None
    """Size of the study's own training sample; None = not recorded."""
    by_seed: Mapping[int, float] = field(default_factory=dict, compare=False)
    """Seed → ratio, where trials are compared per seed."""
    curve: Mapping[str, Any] | None = field(default=None, compare=False)
    """Fit of an extrapolation: `columns` images, shift (None between the samples) and fit, and `note`."""

    @property
    def lam(self) -> float:
        """First guess of λ, 1/FSR: λ is negatively correlated with FSR (Tan et al., 2025)."""
        return 1 / self.value

    @property
    def lam_interval(self) -> tuple[float, float]:
        """1/FSR at the ends of the interval.

        The upper end is infinite where FSR may be 0.
        """
        lower = 1 / self.high
        if math.isnan(self.low):
            return lower, math.nan
        return lower, 1 / self.low if self.low > 0 else math.inf

    @property
    def may_be_one(self) -> bool:
        """Whether the interval contains 1 at two decimals: a levelled-off extrapolation ends just below 1."""
        return round(self.low, 2) <= 1 <= round(self.high, 2)

    @property
    def is_oracle(self) -> bool:
        """Whether labelled OOD images were trained on: not to be used for any choice."""
        return self.reference.startswith(ORACLE)

    def number(self) -> str:
        """The value with its interval, as text.

        `0.61 ± 0.07`, `0.61 [0.52, 0.75]` where the interval is asymmetric, or `0.61` for one seed.
        """
        below = self.value - self.low
        above = self.high - self.value
        if math.isnan(self.low):
            return f"{self.value:.2f}"
        if abs(above - below) < 0.005:
            return f"{self.value:.2f} ± {above:.2f}"
        end = "∞)" if math.isinf(self.high) else f"{self.high:.2f}]"
        return f"{self.value:.2f} [{self.low:.2f}, {end}"

    def sentence(self) -> str:
        """Value and interpretation."""
        if math.isnan(self.value):
            return f"No FSR ({self._against()}): {self.note}"
        head = f"FSR {self.number()} ({self._against()}; {self.n})"
        if self.note:
            return f"{head}: {self.note}"
        if math.isnan(self.low):
            return f"{head}: one seed is no interval; raise diagnostics.fsr_seeds before believing it."
        target = "this domain" if self.is_oracle else "the target"
        if self.may_be_one:
            meaning = f"the sample may well represent {target}"
            advice = "λ = 1 is the first guess"
        elif self.value < 1:
            meaning = f"the sample under-represents {target}"
            advice = "λ > 1 is expected to help"
        else:
            meaning = f"the norms moved more than data of {target} move them"
            advice = "λ < 1 is expected to help"
        if self.is_oracle:
            return f"{head}: {meaning}."
        guess = "" if self.may_be_one else f", first guess λ = {self.lam:.2f}"
        return f"{head}: {meaning}; {advice}{guess}."

    @property
    def basis(self) -> str:
        """What the interval is over."""
        return "seeds and training subsamples" if self.draws > 1 else "seeds"

    @property
    def n(self) -> str:
        """Numbers behind the ratio.

        Example:
            >>> FsrEstimate("full", 0.6, seeds=3, draws=3, images=120).n
            'n = 3 seeds, 3 training subsamples of 120 images'
        """
        draws = counted(self.draws, "training subsample")
        size = "" if self.images is None else f" of {self.images:,} images"
        return f"n = {counted(self.seeds, 'seed')}, {draws}{size}"

    def _against(self) -> str:
        if self.is_oracle:
            return f"oracle on {self.reference.removeprefix(ORACLE)}, for analysis only"
        return {FULL: "against the full pool"}.get(self.reference, self.reference)

    def metrics(self) -> dict[str, float]:
        """Recorded name → value, finite ones only; empty where FSR is not determined."""
        if math.isnan(self.value):
            return {}
        reference = self.reference.replace(":", "/")
        values = {FSR.of(reference): self.value, FSR_LOW.of(reference): self.low, FSR_HIGH.of(reference): self.high}
        return {name: value for name, value in values.items() if math.isfinite(value)}


def estimates(records: Iterable[TrialRecord]) -> list[FsrEstimate]:
    """FSR against every reference in the records: full, extrapolated, then the oracles by name.

    Only complete reference trials with a recorded shift count. Several configurations may have references (the study
    was continued, and another one is best now): the one with the latest trial counts.
    """
    samples = reference_samples(records)
    if OWN not in samples:
        return []
    own = samples[OWN]
    oracles = sorted(name for name in samples if name.startswith(ORACLE))
    nested = {name: trials for name, trials in samples.items() if name not in (OWN, FULL, *oracles)}
    ratios = []
    if FULL in samples:
        ratios.append(_ratio(FULL, own, samples[FULL]))
    if len(nested) >= 2:
        ratios.append(_extrapolated(own, nested))
    return ratios + [_ratio(name, own, samples[name]) for name in oracles]


def reference_samples(records: Iterable[TrialRecord]) -> Samples:
    """The reference trials that `estimates` uses."""
    runs = [r for r in records if r.role == "reference" and r.state == "complete" and r.metric(SHIFT) is not None]
    samples: dict[str, dict[int, TrialRecord]] = defaultdict(dict)
    # A continued study may have references of a former best configuration; the two must not be mixed.
    latest = max(runs, key=lambda r: r.number).config_hash if runs else None
    for record in runs:
        if record.config_hash == latest and record.sample is not None:
            sample, draw = draw_of(record.sample)
            # A study that was begun by an earlier version may have both; the drawn one is of this version.
            if draw or record.seed not in samples[sample]:
                samples[sample][record.seed] = record
    return dict(samples)


def suggested(ratios: Sequence[FsrEstimate]) -> FsrEstimate | None:
    """The estimate that a first λ is taken from; None = λ = 1.

    The full pool's, else the extrapolation's.

    Oracles are excluded, since they have seen test labels, and so are estimates with a note or without an interval.
    """
    usable = [e for e in ratios if not e.is_oracle and not e.note and not math.isnan(e.low)]
    if not usable or usable[0].may_be_one:
        return None
    return usable[0]


def study_metrics(ratios: Sequence[FsrEstimate]) -> dict[str, float]:
    """Metrics of the study's own run: every estimate, and `fsr/lambda` where one suggests a λ."""
    values = {name: value for estimate in ratios for name, value in estimate.metrics().items()}
    first = suggested(ratios)
    return values if first is None else {**values, FSR_LAMBDA.name: first.lam}


def _shift(record: TrialRecord) -> float:
    value = record.metric(SHIFT)
    assert value is not None
    return value


def _ratio(reference: str, own: Mapping[int, TrialRecord], other: Mapping[int, TrialRecord]) -> FsrEstimate:
    """Mean over seeds of the ratio of two trials.

    Of trials of equal seed, so that effects of the seed cancel.
    """
    # Seeds that only one of the two samples has are left out: a pair differs in the sample alone.
    pairs = {seed: (_shift(own[seed]), _shift(other[seed])) for seed in sorted(own.keys() & other.keys())}
    if not pairs:
        return FsrEstimate(reference, math.nan, note="no seed has a trial on both samples.")
    own_shifts = [pair[0] for pair in pairs.values()]
    reference_shifts = [pair[1] for pair in pairs.values()]
    for name, shifts in (("reference's", reference_shifts), ("study's own", own_shifts)):
        if any(shift <= 0 for shift in shifts):
            note = f"the {name} norms did not move: train with a higher rate or for longer."
            return FsrEstimate(reference, math.nan, seeds=len(pairs), note=note)
    ratios = {seed: own_shift / reference_shift for seed, (own_shift, reference_shift) in pairs.items()}
    mean, half = mean_interval(list(ratios.values()), LEVEL)
    return FsrEstimate(
        reference=reference,
        value=mean,
        low=mean - half,
        high=mean + half,
        shift=float(np.mean(own_shifts)),
        reference_shift=float(np.mean(reference_shifts)),
        seeds=len(ratios),
        draws=_draws_of([own], list(ratios)),
        images=_images(own.values()),
        by_seed=ratios,
    )


def _draws_of(samples: Iterable[Mapping[int, TrialRecord]], seeds: Sequence[int]) -> int:
    """Number of training subsamples: the most that one of the samples has over these seeds."""
    return max(len({draw_of(sample[seed].sample or "")[1] for seed in seeds}) for sample in samples)


def _images(trials: Iterable[TrialRecord]) -> int | None:
    """Size of a sample."""
    sizes = [size for trial in trials if (size := trial.metric(IMAGES)) is not None]
    return round(sizes[0]) if sizes else None


def _extrapolated(own: Mapping[int, TrialRecord], nested: Samples) -> FsrEstimate:
    """FSR as a share of the limit of Shift(n), with a bootstrap interval over seeds and their subsamples."""
    samples = [*nested.values(), own]
    seeds = sorted(set.intersection(*(set(sample) for sample in samples)))
    if not seeds:
        return FsrEstimate(EXTRAPOLATED, math.nan, note="no seed has a trial on every nested sample.")
    images = np.array([[sample[seed].metric(IMAGES) or 1.0 for seed in seeds] for sample in samples]).mean(axis=1)
    shifts = np.array([[_shift(sample[seed]) for seed in seeds] for sample in samples])
    mean = shifts.mean(axis=1)
    at = len(samples) - 1
    try:
        limit = ShiftLimit(images)
    except ValueError as error:
        note = f"{error} List other diagnostics.fsr_fractions."
        return FsrEstimate(EXTRAPOLATED, math.nan, shift=float(mean[at]), seeds=len(seeds), note=note)
    fit = limit.fit(mean)
    (value,) = limit.share(mean[None], at)
    low, high = limit.interval(shifts, at, LEVEL)
    bounded = 0 < value < math.inf
    reliable = bounded and fit.limit <= MAX_EXTRAPOLATION * mean.max()
    note = "" if reliable else _unbounded_note(shifts[np.argsort(images)])
    return FsrEstimate(
        reference=EXTRAPOLATED,
        value=float(value) if bounded else math.nan,
        low=low,
        high=high,
        shift=float(mean[at]),
        reference_shift=fit.limit if bounded else math.nan,
        seeds=len(seeds),
        draws=_draws_of(samples, seeds),
        images=_images(own.values()),
        note=note,
        curve=_curve(images, mean, fit),
    )


def _unbounded_note(shifts: Floats) -> str:
    """Why shifts have no limit, and what further growth would mean.

    The shifts (k, n) are those of samples, the smallest first, and seeds. The second part is given only where the seeds
    together distinguish growth from chance.
    """
    change, half = mean_interval((shifts[-1] - shifts[0]).tolist(), LEVEL)
    direction = "falls" if change < 0 else "grows"
    note = f"the shift still {direction} at the whole sample, so that its limit cannot be told"
    if change - half > 0:
        note += " (should it go on growing, the sample under-represents the target: λ > 1)"
    return f"{note}; take `full` or more data."


def _curve(images: Floats, shifts: Floats, fit: Fit) -> dict[str, Any]:
    """The measured shifts, and the fit within and beyond their range."""
    rows: list[tuple[float, float | None]] = [(float(n), float(s)) for n, s in zip(images, shifts, strict=True)]
    rows += [(float(n), None) for n in np.geomspace(images.min(), DRAWN_RANGE * images.max(), GRID)[1:]]
    rows.sort(key=lambda row: row[0])
    at = np.array([n for n, _ in rows])
    columns = {"images": at.tolist(), "shift": [shift for _, shift in rows], "fit": fit.at(at).tolist()}
    return {"columns": columns, "note": f"Shift(n) = {fit.limit:.4g} − {fit.slope:.4g}·n^(−{fit.exponent:.3g})"}
