"""How many images a source has and how much disk a study takes, estimated without reading any image."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.ingest.assign import Assignment
    from orchestrator.ingest.source import Source
    from orchestrator.study_file.schema import DataSpec, StudySpec

OVERHEAD = 1.05
"""Labels, domains, indices and the manifest beside the pixels."""
TRIAL_BYTES = 200_000
"""Journal lines, Optuna rows and MLflow rows of one trial, without its checkpoints."""


def examine(data: DataSpec) -> tuple[Source, Assignment]:
    """What a source offers to a study, and what the study makes of it, by names and headers alone: no image is decoded.

    Raises:
        DataError: the source is missing or has no images, a domain is missing or empty, a class is never ID or has too
            few images.
    """
    from orchestrator.ingest.pipeline import IngestRequest, survey

    return survey(
        IngestRequest(
            source=data.source,
            root=data.root,
            id=tuple(data.id),
            ood=tuple(data.ood),
            val_fraction=data.val_fraction,
            test_fraction=data.test_fraction,
            seed=data.seed,
            label=data.label,
        )
    )


def store_bytes(spec: StudySpec, images: int, trials: int) -> int:
    """Estimated bytes of the data store (uint8 pixels at the stored side) and of the records of so many trials."""
    from orchestrator.planning.setup import ingest_request

    side = ingest_request(spec).image_size
    return int(images * side * side * 3 * OVERHEAD) + trials * TRIAL_BYTES
