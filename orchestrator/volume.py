"""How many images a source has and how much disk a study takes, estimated without reading any image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.spec import DataSpec, StudySpec

OVERHEAD = 1.05
"""Labels, domains, indices and the manifest beside the pixels."""
TRIAL_BYTES = 200_000
"""Journal lines, Optuna rows and MLflow rows of one trial, without its checkpoints."""


def count_images(data: DataSpec) -> int | None:
    """Images of a source by names and headers alone; None where neither tells (`digits`, an odd layout)."""
    if data.root is None:
        return None
    root = Path(data.root).expanduser()
    if data.source == "folder":
        from orchestrator.ingest.folder import EXTENSIONS

        return sum(1 for file in root.rglob("*") if file.suffix.lower() in EXTENSIONS)
    if data.source == "parquet":
        import pyarrow.parquet as pq

        files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
        return sum(int(pq.read_metadata(file).num_rows) for file in files)
    return None


def store_bytes(spec: StudySpec, images: int) -> int:
    """Estimated bytes of the data store (uint8 pixels at the stored side) and of the study's records."""
    from orchestrator.setup import ingest_request

    side = ingest_request(spec).image_size
    trials = spec.search.trials + spec.confirm.top_k * spec.confirm.seeds
    return int(images * side * side * 3 * OVERHEAD) + trials * TRIAL_BYTES
