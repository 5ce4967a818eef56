"""`luthier fsr`: the reference trials of a study alone, and what they say."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.fsr import FsrEstimate, estimates, suggested
from orchestrator.fsr_stage import STRATEGY

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.records import TrialRecord
    from orchestrator.study import Study

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class FsrReport:
    """What the references say."""

    study: str
    found: Sequence[FsrEstimate]
    records: Sequence[TrialRecord]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        first = suggested(self.found)
        rows = [
            {name: getattr(e, name) for name in ("reference", "shift", "reference_shift", "seeds", "note")}
            | {"fsr": _finite(e.value), "low": _finite(e.low), "high": _finite(e.high), "sentence": e.sentence()}
            for e in self.found
        ]
        return {"study": self.study, "fsr": rows, "lambda": None if first is None else first.lam}

    def render(self, console: Console) -> None:
        """Print a sentence per reference, and the λ that a search takes."""
        if not self.found:
            console.print("No reference trial has finished, so that there is no FSR. `luthier status` says why.")
        for estimate in self.found:
            console.print(estimate.sentence(), markup=False, highlight=False, soft_wrap=True)
        if (first := suggested(self.found)) is not None:
            text = (
                f"A later search of {self.study} begins with λ = {first.lam:.2f} (other studies: diagnostics.fsr_from)."
            )
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def measure_fsr(study: Study, progress: bool = True) -> FsrReport:
    """Run what is missing of a study's reference trials, in its own folder and journal, and read them all.

    References are those of the study file; where it names none, `extrapolated`, and `full` where the study trains on a
    fraction of its pool.

    Raises:
        StudyError: the study could not run, or its network has no LayerNorm.
    """
    from orchestrator.drive import Drive
    from orchestrator.errors import Problem, StudyError
    from orchestrator.preflight import layer_kinds
    from orchestrator.setup import make_task, references_of

    spec = study.spec
    store = study.prepare()
    if "layer_norm" not in layer_kinds(spec.model.name):
        rule = (
            f"FSR is measured by tuning LayerNorms, but {spec.model.name} has none. `luthier run` reports the shift of"
        )
        raise StudyError([Problem(("model", "name"), f"{rule} its BatchNorms as bn_shift.")])
    if not any(entry.name == STRATEGY for entry in spec.strategies):
        log.warning("%s has no %s entry: its default point is measured.", spec.name, STRATEGY)
    names: list[str] = [*spec.diagnostics.fsr]
    if not names:
        names = ["extrapolated", "full"] if spec.data.train_fraction < 1 else ["extrapolated"]
    task = make_task(spec, store)
    stage = references_of(spec, task, store, names)
    Drive(spec, study.folder, store, task, progress, stages=[stage]).run()
    records = [r for r in study.results().records if r.role == "reference"]
    return FsrReport(spec.name, estimates(records), records)


def _finite(value: float) -> float | None:
    return value if value == value else None
