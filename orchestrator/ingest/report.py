"""The answer of `luthier data check`: plain values, JSON, or tables for a person."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.ingest.duplicates import in_words
from orchestrator.ingest.errors import counted

if TYPE_CHECKING:
    from rich.console import Console

LISTED = 20
"""Names that are shown to a person; JSON has them all."""

NOTES = {
    "animated": "with several frames or pages; the first is used",
    "sixteen_bit": "with 16 bits per channel; scaled by 1/257, not clipped",
    "transparent": "with transparency; put on white",
    "cmyk": "in CMYK; converted without colour profile",
    "rotated_by_exif": "turned upright by their EXIF orientation",
}


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
    """What is in a source of data. Counts are of readable images."""

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
    """Splits that the source itself gives → images; empty = they will be drawn."""
    sizes: Sizes | None
    """None = no readable image."""
    formats: dict[str, int]
    notes: dict[str, int]
    """What was special about images (see `NOTES`) → how many."""
    unreadable: list[dict[str, str]]
    """Name and reason of each image that would be quarantined."""
    ignored: list[dict[str, str]]
    """Name and reason of everything that is not a sample."""
    duplicates: dict[str, Any]
    """See `orchestrator.ingest.duplicates.Duplicates.to_dict`."""
    problems: list[str]
    """Why a study with default settings would refuse the data; empty = it would not."""

    @property
    def classes(self) -> list[str]:
        """All class names."""
        return sorted({label for counts in self.domains.values() for label in counts})

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**dataclasses.asdict(self), "classes": self.classes}

    def render(self, console: Console) -> None:
        """Print the report for a person."""
        from rich.markup import escape

        console.print(f"[bold]{escape(self.path)}[/bold]: {escape(self.source)}, {escape(self.layout)}")
        counts = counted(len(self.domains), "domain"), counted(len(self.classes), "class", "classes")
        console.print(f"{counted(self.images, 'readable image')}, {', '.join(counts)}")
        if self.splits:
            console.print("Splits of the source: " + ", ".join(f"{name} {n}" for name, n in self.splits.items()))
        else:
            console.print("No splits in the source: train, val and test are drawn per class, by seed.")
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
        from rich.markup import escape
        from rich.table import Table

        table = Table("domain", "images", "classes", "images per class", "classes missing")
        for domain, counts in self.domains.items():
            role = " (OOD)" if domain in self.ood_domains else ""
            missing = sorted(set(self.classes) - set(counts))
            least, most = min(counts.values(), default=0), max(counts.values(), default=0)
            table.add_row(
                escape(domain) + role,
                str(sum(counts.values())),
                str(len(counts)),
                str(most) if least == most else f"{least} to {most}",
                escape(", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")),
            )
        console.print(table)

    def _print_lists(self, console: Console) -> None:
        from rich.markup import escape

        unreadable = [f"{entry['name']}: {entry['reason']}" for entry in self.unreadable]
        _print_list(console, f"Unreadable, will be left out: {len(unreadable)}", unreadable)
        drawn = "splits" if self.splits else "splits (as a study draws them by default)"
        for key, text in (("across", f"{drawn} or domains"), ("contradictory", "classes")):
            title = f"The same image in several {text}: {counted(self.duplicates[f'{key}_groups'], 'group')}"
            _print_list(console, title, [in_words(group) for group in self.duplicates[key]])
        if self.duplicates["repeats"]:
            repeats = counted(self.duplicates["repeats"], "image")
            console.print(f"Repeats of another image of the same domain, split and class: {repeats}")
        reasons = Counter(_kind(entry["reason"]) for entry in self.ignored)
        if reasons:
            listed = ", ".join(f"{escape(reason)}: {count}" for reason, count in reasons.most_common())
            console.print(f"Not used as images: {listed}", soft_wrap=True)


def _kind(reason: str) -> str:
    return "a link back into the data" if reason.startswith("a link to") else reason


def _print_list(console: Console, title: str, lines: list[str]) -> None:
    from rich.markup import escape

    if not lines:
        return
    console.print(f"[yellow]{escape(title)}[/yellow]")
    for line in lines[:LISTED]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    if len(lines) > LISTED:
        console.print(f"  and {len(lines) - LISTED} more (all with --json)")
