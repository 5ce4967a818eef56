"""`luthier fsr`: the FSR reference trials of a study.

Without its search; and the estimates from them.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from orchestrator.errors import PreflightError, Problem
from orchestrator.planning.build import make_task, references_of
from orchestrator.planning.fsr import STRATEGY
from orchestrator.planning.preflight import layer_kinds, preflight
from orchestrator.results.fsr import IMAGES, SHIFT, FsrEstimate, estimates, reference_samples, suggested
from orchestrator.results.intervals import mean_interval
from orchestrator.running.study_run import StudyRun

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.planning.fsr import ReferenceStage
    from orchestrator.record.records import TrialRecord
    from orchestrator.study import Study
    from orchestrator.study_file.schema import StudySpec
    from trainables.data.store import Store
    from trainables.specs.trial_spec import SharedTrialSettings

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class FsrReport:
    """FSR estimates of a study and the reference trials that they come from."""

    study: str
    estimates: Sequence[FsrEstimate]
    records: Sequence[TrialRecord]
    """The reference trials."""

    def samples(self) -> list[dict[str, Any]]:
        """One row per sample, the smallest first: `sample, images, shift, ci95, seeds`."""
        rows = []
        for name, trials in reference_samples(self.records).items():
            shifts = [trial.metric(SHIFT) for trial in trials.values()]
            measured = [shift for shift in shifts if shift is not None]
            mean, half_width = mean_interval(measured)
            rows.append(
                {
                    "sample": name,
                    "images": next(iter(trials.values())).metric(IMAGES),
                    "shift": mean,
                    "ci95": _finite(half_width),
                    "seeds": len(measured),
                }
            )
        return sorted(rows, key=lambda row: (row["images"] or 0, row["sample"]))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; unknown values and the open end of an interval are null."""
        first = suggested(self.estimates)
        rows = [
            {
                "reference": e.reference,
                "fsr": _finite(e.value),
                "low": _finite(e.low),
                "high": _finite(e.high),
                "shift": _finite(e.shift),
                "reference_shift": _finite(e.reference_shift),
                "seeds": e.seeds,
                "training_subsamples": e.draws,
                "images": e.images,
                "interval_over": e.basis,
                "by_seed": {str(seed): ratio for seed, ratio in e.by_seed.items()},
                "note": e.note,
                "sentence": e.sentence(),
            }
            for e in self.estimates
        ]
        return {
            "study": self.study,
            "samples": self.samples(),
            "fsr": rows,
            "lambda": None if first is None else first.lam,
            "lambda_interval": None if first is None else [_finite(end) for end in first.lam_interval],
        }

    def render(self, console: Console) -> None:
        """Print the shift of every sample, a sentence per reference, and the suggested λ."""

        def print_line(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        if not self.estimates:
            print_line("Too few reference trials have finished for an FSR. `luthier status` shows why.")
            return
        table = Table(title=f"{self.study}: shift of the LayerNorms by training sample", title_justify="left")
        for column in ("sample", "images", "shift", "seeds"):
            table.add_column(column, justify="left" if column == "sample" else "right")
        for row in self.samples():
            spread = "" if row["ci95"] is None else f" ± {row['ci95']:.3f}"
            name = {"1": "1 (the study's own)"}.get(row["sample"], row["sample"])
            table.add_row(escape(name), f"{row['images'] or 0:.0f}", f"{row['shift']:.3f}{spread}", str(row["seeds"]))
        console.print(table)
        for estimate in self.estimates:
            print_line(estimate.sentence())
        if (first := suggested(self.estimates)) is not None:
            low, high = first.lam_interval
            upper = "∞)" if math.isinf(high) else f"{high:.2f}]"
            print_line(
                f"Suggested λ = {first.lam:.2f} [{low:.2f}, {upper} (95 % interval over {first.basis}; {first.n}): a "
                f"later search of {self.study} tries it early (another study on the same network and sample: "
                "diagnostics.fsr_from)."
            )


def measure_fsr(study: Study, progress: bool = True, allow_change: Collection[str] = ()) -> FsrReport:
    """Run the missing reference trials of a study, and estimate FSR.

    In its own folder and journal; the estimates are from all of its reference trials. References are those of the study
    file; if it names none, `extrapolated`, and `full` if the study trains on a fraction of its pool. Neither a second
    call nor `luthier run` repeats them, as long as the same LayerNorm configuration is the best.

    Args:
        study: the study.
        progress: see `orchestrator.study.Study.run`.
        allow_change: see `orchestrator.study.Study.run`.

    Raises:
        PreflightError: the study cannot run, its network has no LayerNorm, or its training sample is too small to be
            compared with shares of itself; nothing was spent.
    """
    spec = study.spec
    _check_network(spec)
    store = study.prepare(progress)
    if not any(entry.name == STRATEGY for entry in spec.strategies):
        log.warning("%s has no %s entry: the strategy's default point is measured.", spec.name, STRATEGY)
    names: list[str] = [*spec.diagnostics.fsr]
    if not names:
        names = ["extrapolated", "full"] if spec.data.train_fraction < 1 else ["extrapolated"]
    task = make_task(spec, store)
    stage = references_of(spec, task, store, names)
    if not stage.samples():
        rule = "FSR needs other samples to compare the study's own with, but there are none of another size."
        way_out = "List other diagnostics.fsr_fractions, or train on more images."
        problem = Problem(("diagnostics", "fsr_fractions"), f"{rule} {way_out}")
        raise PreflightError([problem], f"The study {spec.name!r}")
    stages = functools.partial(_stage, spec, store, names)
    StudyRun(spec, study.folder, store, task, stages, search=False, progress=progress, allow_change=allow_change).run()
    records = [r for r in study.results().records if r.role == "reference"]
    return FsrReport(spec.name, estimates(records), records)


def _stage(spec: StudySpec, store: Store, references: Sequence[str], task: SharedTrialSettings) -> list[ReferenceStage]:
    return [references_of(spec, task, store, references)]


def _check_network(spec: StudySpec) -> None:
    preflight(spec)
    kinds = layer_kinds(spec.model.name)
    if "layer_norm" not in kinds:
        rule = f"FSR is measured by tuning LayerNorms, but {spec.model.name} has none."
        if "batch_norm" in kinds:
            rule += " `luthier run` reports the shift of its BatchNorms as bn_shift."
        raise PreflightError([Problem(("model", "name"), rule)], f"The study {spec.name!r}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
