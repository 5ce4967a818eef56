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
from orchestrator.ingest.manifest import find_duplicates, in_words, kept_together, together_in_words
from orchestrator.ingest.near_equal import MAX_GROUP, ImageGroups, group_images
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

    @property
    def classes(self) -> list[str]:
        """All class names."""
        return sorted({label for counts in self.domains.values() for label in counts})

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**dataclasses.asdict(self), "classes": self.classes}

    def render(self, console: Console) -> None:
        """Print the report as text and tables."""
        console.print(f"[bold]{escape(self.path)}[/bold]: {escape(self.source)}, {escape(self.layout)}")
        counts = [
            counted(self.images, "readable image"),
            counted(len(self.domains), "domain"),
            counted(len(self.classes), "class", "classes"),
        ]
        console.print(", ".join(counts))
        if self.splits:
            console.print("Splits of the source: " + ", ".join(f"{name} {n}" for name, n in self.splits.items()))
        else:
            console.print("No splits in the source: train, val and test are drawn per class, by seed.")
            console.print(together_in_words(self.kept_together))
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
        for key, groups in (("across", f"{splits} or domains"), ("contradictory", "classes")):
            title = f"The same image in several {groups}: {counted(self.duplicates[f'{key}_groups'], 'group')}"
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
) -> DataReport:
    """Decode every image of a source and report contents and problems; nothing is written.

    Args:
        path: folder, `.parquet` or `.npz` file, or `digits` for the built-in images where no such path exists.
        workers: decoder processes; None = one per CPU.
        progress: called from several threads, see `DecodingProgress`.
        label: column with the classes of a Parquet source; None = the first with a usual name.
        fail_on_leak: report the same image, pixel for pixel, in several splits or domains as a problem; nearly equal
            ones are listed only, because a threshold decides.

    Raises:
        DataError: nothing there, or no data that can be interpreted.
    """
    request = IngestRequest(source=detect(Path(path)), root=str(path), label=label)
    source = scan(request)
    # Decoded as for a store, but to a thumbnail: the check needs to know only whether they can be.
    job = DecodeJob(THUMBNAIL_SIDE, interpolation="nearest")
    outcomes = decode_all(source, range(len(source.samples)), job, workers, progress)
    report = _report(Path(path), source, request, outcomes)
    return replace(report, problems=[*report.problems, *_leaks(report)]) if fail_on_leak else report


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
    kinds = {".parquet": "parquet", ".npz": "npz"}
    if root.is_file():
        if root.suffix.lower() not in kinds:
            raise DataError(
                f"Data must be a folder, a .parquet file or an .npz file, but {path} is none of these. Unpack archives "
                "into <class>/<image>, and put the images that a table names there too."
            )
        return kinds[root.suffix.lower()]
    if any(root.glob("*.npz")):
        return "npz"
    return "parquet" if next(root.rglob("*.parquet"), None) else "folder"


def _report(path: Path, source: Source, request: IngestRequest, outcomes: Mapping[int, Outcome]) -> DataReport:
    samples = source.samples
    readable = [i for i, outcome in outcomes.items() if outcome.reason is None]
    domains: dict[str, dict[str, int]] = {domain: {} for domain in source.empty_domains}
    for (domain, label), count in sorted(Counter((samples[i].domain, samples[i].label) for i in readable).items()):
        domains.setdefault(domain, {})[label] = count
    splits = Counter(samples[i].split for i in readable if samples[i].split is not None)
    bad = [i for i, outcome in outcomes.items() if outcome.reason is not None]
    groups = group_images(outcomes)
    assignment, problems = _default_splits(source, request, bad, groups)
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
        duplicates=find_duplicates(samples, outcomes, split_of, groups).to_dict(),
        kept_together=together,
        problems=problems,
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
