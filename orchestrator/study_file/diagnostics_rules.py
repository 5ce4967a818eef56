"""Rules of the section `diagnostics` that need other parts of the study: its data and its network."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from orchestrator.errors import Path as KeyPath
from orchestrator.errors import did_you_mean

if TYPE_CHECKING:
    from orchestrator.study_file.spec import StudySpec

Rules = Iterator[tuple[KeyPath, str]]


def sample_problems(spec: StudySpec) -> Rules:
    """What the study file alone shows: references that would compare a sample with itself, or with too few others."""
    wanted = spec.diagnostics
    for index, reference in enumerate(wanted.fsr):
        if reference == "full" and spec.data.train_fraction == 1:
            yield (
                ("diagnostics", "fsr", index),
                "the reference 'full' compares a sample with the pool that it is drawn from, but data.train_fraction "
                "is 1: they are the same, and FSR is 1. Lower data.train_fraction, or use extrapolated.",
            )
    fractions = sorted(set(wanted.fsr_fractions))
    if "extrapolated" in wanted.fsr and len(fractions) < 2:
        got = ", ".join(f"{fraction:g}" for fraction in fractions) or "none"
        yield (
            ("diagnostics", "fsr_fractions"),
            f"an extrapolation needs 2 different fractions beside the whole, but got {got}. List another one.",
        )


def domain_problems(spec: StudySpec, ood: Collection[str]) -> Rules:
    """What only the data show.

    Args:
        ood: names of the OOD domains.
    """
    wanted, listed = spec.diagnostics, ", ".join(ood) or "none"
    source = wanted.plasticity_source
    if source is not None and source not in ood:
        yield (
            ("diagnostics", "plasticity_source"),
            f"plasticity_source is one of the OOD domains, but got {source!r} and the data have {listed}."
            f"{did_you_mean(source, ood)} Leave it out for pairs of training images.",
        )
    for index, reference in enumerate(wanted.fsr):
        if reference == "oracle" and not ood:
            yield (
                ("diagnostics", "fsr", index),
                "the reference 'oracle' trains on labelled images of each OOD domain, but the data have none. List "
                "them under data.ood, or leave it out.",
            )


def network_problems(spec: StudySpec, kinds: Collection[str]) -> Rules:
    """What only the network shows.

    Args:
        kinds: see `orchestrator.planning.preflight.layer_kinds`.
    """
    if spec.diagnostics.fsr and "layer_norm" not in kinds:
        shift = " `luthier run` reports the shift of its BatchNorms as bn_shift." if "batch_norm" in kinds else ""
        yield (
            ("diagnostics", "fsr"),
            f"FSR is measured by tuning LayerNorms, but {spec.model.name} has none. Leave it out.{shift}",
        )
