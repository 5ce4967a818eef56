"""What `luthier data check` reports of masks: pixels per class, split and domain, and what was decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from orchestrator.ingest.manifest import pixel_counts
from orchestrator.ingest.masks import MaskOutcome, raw_text
from orchestrator.ingest.source import MaskSurvey, Outcome, Source
from orchestrator.wording import bytes_text
from trainables.data.store import IGNORED

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class MaskReport:
    """What the masks of a source hold, in pixels."""

    classes: list[str]
    """By class index."""
    pixels: dict[str, dict[str, dict[str, Any]]]
    """Split → domain → `classes` (class → pixels), `ignored` and `ignored_values` (value → pixels); the split is `all`
    where the source has none."""
    total: dict[str, int]
    """Class → pixels, of all readable pairs."""
    ignored: int
    """Ignored pixels of all readable pairs."""
    store_bytes: int
    """Size of a study's data store, in bytes."""
    remarks: list[str]
    """What was decided about the data, one sentence each."""
    warnings: list[str]
    """What affects the numbers of a study, one sentence each."""

    def render(self, console: Console, ood_domains: Collection[str]) -> None:
        """Print pixels of every class, a row per split and domain.

        Classes that occur nowhere are left to a remark.
        """
        table = Table("split", "domain", "class", "pixels", "share")
        for split, domains in self.pixels.items():
            for domain, counts in domains.items():
                everything = sum(counts["classes"].values()) + counts["ignored"]
                rows = {name: count for name, count in counts["classes"].items() if self.total[name]}
                values = counts["ignored_values"]
                ignored = "(ignored)"
                if len(values) > 1:
                    ignored = f"(ignored: {', '.join(f'{value}: {count:,}' for value, count in values.items())})"
                for name, count in [*rows.items(), (ignored, counts["ignored"])]:
                    role = " (OOD)" if domain in ood_domains else ""
                    share = f"{count / max(1, everything):.2%}"
                    table.add_row(escape(split), escape(domain) + role, escape(name), f"{count:,}", share)
                table.add_section()
        console.print(table)
        total = ", ".join(f"{escape(name)} {count:,}" for name, count in self.total.items() if count)
        console.print(f"Pixels in all: {total}, ignored {self.ignored:,}", soft_wrap=True)
        for sentence in self.remarks:
            console.print(escape(sentence), soft_wrap=True)
        for sentence in self.warnings:
            console.print(f"[yellow]Warning:[/yellow] {escape(sentence)}", soft_wrap=True)
        console.print(f"Size of a data store (whole pictures and masks): {bytes_text(self.store_bytes)}")


def mask_report(source: Source, survey: MaskSurvey, outcomes: Mapping[int, Outcome]) -> MaskReport:
    """Pixels by the splits and domains of the source itself."""
    samples = source.samples
    readable = [i for i, outcome in outcomes.items() if outcome.reason is None]
    domains = sorted({sample.domain for sample in samples})
    index = {domain: number for number, domain in enumerate(domains)}
    domain_ids = np.array([index[sample.domain] for sample in samples], np.int64)
    has_splits = any(sample.split is not None for sample in samples)
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []} if has_splits else {}
    for i in readable:
        outside = has_splits and samples[i].domain in source.evaluation_domains
        split = f"ood/{samples[i].domain}" if outside else samples[i].split or "all"
        splits.setdefault(split, []).append(i)
    positions = {split: np.array(rows, np.int64) for split, rows in splits.items() if rows}
    pixels = {
        split: {
            domain: {
                "classes": dict(zip(survey.classes, counts["classes"], strict=True)),
                "ignored": counts["ignored"],
                "ignored_values": _ignored_values(
                    survey, [outcomes[i].mask for i in positions[split].tolist() if samples[i].domain == domain]
                ),
            }
            for domain, counts in of_split.items()
        }
        for split, of_split in pixel_counts(survey, domain_ids, domains, positions).items()
    }
    total = survey.pixels[readable].sum(axis=0).tolist()
    return MaskReport(
        classes=survey.classes,
        pixels=pixels,
        total=dict(zip(survey.classes, total[:-1], strict=True)),
        ignored=total[-1],
        store_bytes=int(survey.sizes[readable].prod(axis=1).sum()) * 4,
        remarks=source.remarks,
        warnings=source.warnings,
    )


def _ignored_values(survey: MaskSurvey, masks: list[MaskOutcome | None]) -> dict[str, int]:
    """Pixels of each ignored value, as it stands in the masks."""
    counts: Counter[str] = Counter()
    for mask in masks:
        if mask is None:
            continue
        for value, count in mask.counts.items():
            if survey.translation.index(value, mask.kind, mask.palette) == IGNORED:
                counts[raw_text(value, mask.kind)] += count
    return dict(counts)
