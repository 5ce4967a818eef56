"""Report of `luthier data check PATH`: detected layout, contents and problems of a source.

In this order: the report (values, JSON, tables), the check that makes it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from orchestrator.ingest.assign import Assignment, assign
from orchestrator.ingest.decoding import DecodeJob, DecodingProgress, decode_all
from orchestrator.ingest.errors import DataError, existing, first_few
from orchestrator.ingest.label_map import MaskRequest
from orchestrator.ingest.manifest import (
    find_duplicates,
    in_words,
    kept_together,
    split_warnings,
    together_in_words,
)
from orchestrator.ingest.manifest_source import SUFFIXES, has_masks
from orchestrator.ingest.mask_folders import masks_of_folder
from orchestrator.ingest.mask_report import MaskReport, mask_report
from orchestrator.ingest.mask_survey import judge
from orchestrator.ingest.near_equal import MAX_GROUP, ImageGroups, group_images
from orchestrator.ingest.parquet import has_mask_column, parquet_files
from orchestrator.ingest.request import IngestRequest, scan
from orchestrator.ingest.source import Outcome, Source
from orchestrator.wording import counted

if TYPE_CHECKING:
    from rich.console import Console


MAX_LISTED = 20
"""Names per list in the printed report; JSON has all."""
THUMBNAIL_SIDE = 8
"""Side to which images are decoded for a check, in pixels."""

NOTES = {
    "animated": "with several frames or pages; the first is used",
    "sixteen_bit": "with 16 bits per channel; scaled by 1/257, not clipped",
    "transparent": "with transparency; put on white",
    "cmyk": "in CMYK; converted without colour profile",
    "rotated_by_exif": "turned upright by their EXIF orientation",
}
"""Notes on images → what was done about them."""


@dataclass(frozen=True)
class Sizes:
    """(width, height) in pixels, ordered by area."""

    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    most_common: dict[str, int]
    """`WIDTHxHEIGHT` → images, the five most frequent."""


@dataclass(frozen=True)
class DataReport:
    """Contents and problems of a source. Counts are of readable images."""

    path: str
    source: str
    """`folder`, `parquet`, `npz` or `digits`."""
    layout: str
    images: int
    domains: dict[str, dict[str, int]]
    """Domain → class → images; an empty domain has no classes."""
    ood_domains: list[str]
    """Domains that the source itself marks as OOD."""
    splits: dict[str, int]
    """Splits of the source itself → images; empty = they will be drawn."""
    sizes: Sizes | None
    """None = no readable image."""
    formats: dict[str, int]
    notes: dict[str, int]
    """Kinds of `NOTES` → images."""
    unreadable: list[dict[str, str]]
    """Name and reason of each image that would be quarantined."""
    ignored: list[dict[str, str]]
    """Name and reason of each file or folder that is not a sample."""
    duplicates: dict[str, Any]
    """See `orchestrator.ingest.manifest.Duplicates.to_dict`."""
    kept_together: dict[str, int]
    """See `orchestrator.ingest.manifest.kept_together`."""
    problems: list[str]
    """Why a study with default settings would refuse the data; empty = it would accept them."""
    task: str = "classification"
    """The task that the data are for, `classification` or `segmentation`."""
    masks: MaskReport | None = None
    """None = images with a label each, or the masks have problems."""

    @property
    def classes(self) -> list[str]:
        """All class names."""
        if self.task == "segmentation":
            return [] if self.masks is None else self.masks.classes
        return sorted({label for counts in self.domains.values() for label in counts})

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**dataclasses.asdict(self), "classes": self.classes}

    def render(self, console: Console) -> None:
        """Print the report as text and tables."""
        console.print(f"[bold]{escape(self.path)}[/bold]: {escape(self.source)}, {escape(self.layout)}")
        counts = [
            counted(self.images, "readable image" if self.task == "classification" else "readable pair"),
            counted(len(self.domains), "domain"),
            counted(len(self.classes), "class", "classes"),
        ]
        console.print(", ".join(counts))
        if self.task == "segmentation":
            console.print("Pairs of a picture and its mask: the study file needs [bold]task: segmentation[/bold].")
        if self.splits:
            console.print("Splits of the source: " + ", ".join(f"{name} {n}" for name, n in self.splits.items()))
        else:
            per_class = " per class" if self.task == "classification" else ""
            console.print(f"No splits in the source: train, val and test are drawn{per_class}, by seed.")
            console.print(together_in_words(self.kept_together))
        if self.masks is not None:
            self.masks.render(console, self.ood_domains)
        elif self.task == "classification":
            self._print_counts(console)
        if self.sizes is not None:
            smallest, median, largest = (f"{w}x{h}" for w, h in dataclasses.astuple(self.sizes)[:3])
            console.print(f"Sizes (width x height): {smallest} to {largest}, median {median}")
        console.print("Formats: " + (", ".join(f"{escape(name)} {n}" for name, n in self.formats.items()) or "none"))
        for note, count in self.notes.items():
            console.print(f"{count} {NOTES[note]}")
        self._print_lists(console)
        for problem in self.problems:
            console.print(f"[bold red]Problem:[/bold red] {escape(problem)}", soft_wrap=True)
        if not self.problems:
            console.print("[green]A study can use this.[/green]")

    def _print_counts(self, console: Console) -> None:
        table = Table("domain", "images", "classes", "images per class", "classes missing")
        for domain, counts in self.domains.items():
            role = " (OOD)" if domain in self.ood_domains else ""
            missing = sorted(set(self.classes) - set(counts))
            least = min(counts.values(), default=0)
            most = max(counts.values(), default=0)
            table.add_row(
                escape(domain) + role,
                str(sum(counts.values())),
                str(len(counts)),
                str(most) if least == most else f"{least} to {most}",
                escape(first_few(missing)),
            )
        console.print(table)

    def _print_lists(self, console: Console) -> None:
        unreadable = [f"{entry['name']}: {entry['reason']}" for entry in self.unreadable]
        _print_list(console, f"Unreadable, will be left out: {len(unreadable)}", unreadable)
        splits = "splits" if self.splits else "splits (as a study draws them by default)"
        different = "in several classes" if self.task == "classification" else "with different masks"
        for key, how in (("across", f"in several {splits} or domains"), ("contradictory", different)):
            title = f"The same image {how}: {counted(self.duplicates[f'{key}_groups'], 'group')}"
            _print_list(console, title, [in_words(group) for group in self.duplicates[key]])
        nearly = counted(self.duplicates["near_leaks_groups"], "group")
        title = f"Nearly equal images in training, validation or what is measured: {nearly}"
        _print_list(console, title, [in_words(group) for group in self.duplicates["near_leaks"]])
        if self.duplicates["crowded"]:
            crowded = counted(self.duplicates["crowded"], "image")
            console.print(f"Drawn one by one, because they resemble more than {MAX_GROUP} others: {crowded}")
        if self.duplicates["repeats"]:
            repeats = counted(self.duplicates["repeats"], "image")
            console.print(f"Repeats of another image of the same domain, split and class: {repeats}")
        reasons = Counter(_kind_of_reason(entry["reason"]) for entry in self.ignored)
        if reasons:
            listed = ", ".join(f"{escape(reason)}: {count}" for reason, count in reasons.most_common())
            console.print(f"Not used as images: {listed}", soft_wrap=True)


def _kind_of_reason(reason: str) -> str:
    """The reason without the target of a link, by which reasons are counted."""
    return "a link back into the data" if reason.startswith("a link to") else reason


def _print_list(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print(f"[yellow]{escape(title)}[/yellow]")
    for line in lines[:MAX_LISTED]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    if len(lines) > MAX_LISTED:
        console.print(f"  and {len(lines) - MAX_LISTED} more (all with --json)")


def check(
    path: str | Path,
    workers: int | None = None,
    progress: DecodingProgress | None = None,
    label: str | None = None,
    fail_on_leak: bool = False,
    task: str | None = None,
    masks: MaskRequest | None = None,
) -> DataReport:
    """Decode every image of a source and report contents and problems; nothing is written.

    Args:
        path: folder, `.parquet` or `.npz` file, or `digits` for the built-in images where no such path exists.
        workers: decoder processes; None = one per CPU.
        progress: called from several threads, see `DecodingProgress`.
        label: column with the classes of a Parquet source; None = the first with a usual name.
        fail_on_leak: report the same image, pixel for pixel, in several splits or domains as a problem; nearly equal
            ones are listed only, because a threshold decides.
        task: `classification` or `segmentation`; None = segmentation where masks are found.
        masks: what the values of masks mean; it implies segmentation.

    Raises:
        DataError: nothing there, or no data that can be interpreted.
    """
    source_kind = detect(Path(path))
    if task is None:
        task = "segmentation" if masks is not None else detect_task(Path(path), source_kind)
    if task == "segmentation":
        masks = masks or MaskRequest()
    elif masks is not None:
        raise DataError(f"Only segmentation has masks, but labels of masks are given and the task is {task!r}.")
    request = IngestRequest(source=source_kind, root=str(path), label=label, masks=masks)
    source = scan(request)
    # Decoded as for a store, but to a thumbnail: the check needs to know only whether they can be.
    job = DecodeJob(THUMBNAIL_SIDE, interpolation="nearest")
    outcomes = decode_all(source, range(len(source.samples)), job, workers, progress)
    report = _report(Path(path), source, request, outcomes)
    return replace(report, problems=[*report.problems, *_leaks(report)]) if fail_on_leak else report


def detect_task(path: Path, source: str) -> str:
    """`segmentation` where a source holds pictures with masks by the names of its files or columns."""
    root = path.expanduser()
    if source == "folder":
        has_masks_by_name = masks_of_folder(root) is not None
    elif source == "manifest":
        has_masks_by_name = has_masks(root)
    elif source == "parquet":
        has_masks_by_name = has_mask_column(parquet_files(root)[0])
    else:
        has_masks_by_name = False
    return "segmentation" if has_masks_by_name else "classification"


def _leaks(report: DataReport) -> list[str]:
    count = report.duplicates["across_groups"]
    if not count:
        return []
    groups = first_few(map(in_words, report.duplicates["across"]))
    return [
        "No image may lie in more than one split or domain (--fail-on-leak), but "
        f"{counted(count, 'image')} {'does' if count == 1 else 'do'}: {groups}. Remove the copies; --json lists them "
        "all."
    ]


def detect(path: Path) -> str:
    """The kind of source at a path.

    By its suffix, or by the files in the folder.

    Raises:
        DataError: nothing there, or a file of no known kind.
    """
    if str(path) == "digits" and not path.exists():
        return "digits"
    root = existing(path.expanduser())
    kinds = {".parquet": "parquet", ".npz": "npz", **dict.fromkeys(SUFFIXES, "manifest")}
    if root.is_file():
        if root.suffix.lower() not in kinds:
            raise DataError(
                "Data must be a folder, a .parquet file, a manifest (.csv, .jsonl) or an .npz file, but "
                f"{path} is none of these. Unpack archives into <class>/<image>."
            )
        return kinds[root.suffix.lower()]
    if any(root.glob("*.npz")):
        return "npz"
    return "parquet" if next(root.rglob("*.parquet"), None) else "folder"


def _report(path: Path, source: Source, request: IngestRequest, outcomes: Mapping[int, Outcome]) -> DataReport:
    problems: list[str] = []
    if request.masks is not None:
        try:
            source = judge(source, outcomes, request.masks)
        except DataError as error:
            problems.append(str(error))
        if source.survey is not None:
            # Without the samples of splits that are left out.
            outcomes = {i: outcomes[position] for i, position in enumerate(source.survey.positions)}
    samples = source.samples
    readable = [i for i, outcome in outcomes.items() if outcome.reason is None]
    domains: dict[str, dict[str, int]] = {domain: {} for domain in source.empty_domains}
    for (domain, label), count in sorted(Counter((samples[i].domain, samples[i].label) for i in readable).items()):
        domains.setdefault(domain, {})[label] = count
    splits = Counter(samples[i].split for i in readable if samples[i].split is not None)
    bad = [i for i, outcome in outcomes.items() if outcome.reason is not None]
    groups = group_images(outcomes)
    assignment = None
    if not problems:
        assignment, problems = _default_splits(source, request, bad, groups)
    if assignment is not None:
        source = replace(source, warnings=[*source.warnings, *split_warnings(source.survey, assignment)])
    split_of = {i: sample.split or "" for i, sample in enumerate(samples)}
    together = {"groups": 0, "images": 0, "near_groups": 0, "near_images": 0}
    if assignment is not None:
        split_of = assignment.split_of
        together = kept_together(assignment, outcomes)
    return DataReport(
        path=str(path),
        source=source.kind,
        layout=source.layout,
        images=len(readable),
        domains={domain: domains[domain] for domain in sorted(domains)},
        ood_domains=sorted(source.evaluation_domains),
        splits={name: splits[name] for name in ("train", "val", "test") if name in splits},
        sizes=_sizes([outcomes[i] for i in readable]),
        formats=dict(Counter(outcomes[i].format for i in readable).most_common()),
        notes=dict(Counter(note for i in readable for note in outcomes[i].notes).most_common()),
        unreadable=[{"name": samples[i].name, "reason": str(outcomes[i].reason)} for i in bad],
        ignored=[entry._asdict() for entry in source.ignored],
        duplicates=find_duplicates(samples, outcomes, split_of, groups, source.survey).to_dict(),
        kept_together=together,
        problems=problems,
        task="classification" if request.masks is None else "segmentation",
        masks=None if source.survey is None else mask_report(source, source.survey, outcomes),
    )


def _default_splits(
    source: Source, request: IngestRequest, bad: list[int], groups: ImageGroups
) -> tuple[Assignment | None, list[str]]:
    """Splits of a study with default settings, and problems: why such a study would refuse the data."""
    if len(bad) == len(source.samples):
        return None, [f"Images must be readable, but none of {len(bad)} is."]
    try:
        return assign(source, request, bad, groups), []
    except DataError as error:
        return None, [str(error)]


def _sizes(outcomes: list[Outcome]) -> Sizes | None:
    if not outcomes:
        return None
    sizes = sorted(((o.width, o.height) for o in outcomes), key=lambda size: (size[0] * size[1], size))
    common = Counter((o.width, o.height) for o in outcomes).most_common(5)
    return Sizes(
        smallest=sizes[0],
        median=sizes[len(sizes) // 2],
        largest=sizes[-1],
        most_common={f"{width}x{height}": count for (width, height), count in common},
    )
