"""Accuracy of predictions where the true classes are known, per class and per domain; classes go by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.export.pictures import Listing
from orchestrator.export.predictions import Predictions
from orchestrator.ingest.errors import DataError, first_few, printable
from orchestrator.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

MAX_PAIRS = 10
"""Confusions that are printed; `--json` has all."""


@dataclass(frozen=True)
class DomainReport:
    """What a model gets right on labelled pictures."""

    classes: tuple[str, ...]
    """Of the model."""
    pairs: list[tuple[str, str, str]]
    """(domain, true class, predicted class) of every picture."""

    def accuracy(self, domain: str | None = None) -> float:
        """Share of right predictions, of all pictures or of one domain."""
        chosen = [pair for pair in self.pairs if domain is None or pair[0] == domain]
        return sum(true == predicted for _, true, predicted in chosen) / len(chosen)

    def domains(self) -> list[str]:
        """Names of the domains, sorted."""
        return sorted({domain for domain, _, _ in self.pairs})

    def absent(self) -> list[str]:
        """Classes of the model without a picture."""
        there = {true for _, true, _ in self.pairs}
        return [name for name in self.classes if name not in there]

    def recalls(self) -> dict[str, tuple[int, int]]:
        """Class → (pictures predicted right, pictures), for the classes that occur."""
        count = Counter(true for _, true, _ in self.pairs)
        right = Counter(true for _, true, predicted in self.pairs if true == predicted)
        return {name: (right[name], count[name]) for name in self.classes if count[name]}

    def confusions(self) -> list[tuple[str, str, int]]:
        """(true class, predicted class, pictures), most frequent first."""
        wrong = Counter((true, predicted) for _, true, predicted in self.pairs if true != predicted)
        ordered = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
        return [(true, predicted, count) for (true, predicted), count in ordered]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "pictures": len(self.pairs),
            "accuracy": self.accuracy(),
            "domains": {
                domain: {"pictures": sum(pair[0] == domain for pair in self.pairs), "accuracy": self.accuracy(domain)}
                for domain in self.domains()
            },
            "classes": {
                name: {"pictures": count, "right": right, "recall": right / count}
                for name, (right, count) in self.recalls().items()
            },
            "absent_classes": self.absent(),
            "confusions": [list(confusion) for confusion in self.confusions()],
        }

    def render(self, console: Console) -> None:
        """Print the report as text."""
        for line in self._lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _lines(self) -> Iterator[str]:
        right = sum(true == predicted for _, true, predicted in self.pairs)
        yield (
            f"Accuracy {self.accuracy():.2%} on {counted(len(self.pairs), 'picture')} of known class ({right} right)"
        )
        domains = self.domains()
        if len(domains) > 1:
            for domain in domains:
                count = sum(pair[0] == domain for pair in self.pairs)
                yield f"  domain {printable(domain)}: {self.accuracy(domain):.2%} of {counted(count, 'picture')}"
        for name, (correct, count) in self.recalls().items():
            yield f"  class {printable(name)}: {correct} of {count} right"
        for true, predicted, count in self.confusions()[:MAX_PAIRS]:
            yield f"  {printable(true)} taken for {printable(predicted)}: {count}"
        if self.absent():
            names = first_few(map(printable, self.absent()), 20)
            yield f"No picture of {names}: nothing is said about these classes"


def folder_classes(listing: Listing, classes: Sequence[str]) -> dict[str, str]:
    """Name of each picture → its true class, from the name of the folder that it lies in.

    Raises:
        DataError: a folder with pictures is no class of the model.
    """
    parents = {picture.name: printable(Path(picture.location).parent.name) for picture in listing.pictures}
    unknown = Counter(parent for parent in parents.values() if parent not in classes)
    if unknown:
        names = first_few(f"{name} ({counted(count, 'picture')})" for name, count in unknown.items())
        raise DataError(
            f"A report needs pictures in folders that are named after the model's classes "
            f"({first_few(map(printable, classes), 12)}), but these folders are none of them: {names}. Leave them out, "
            "rename them, or leave out --domain-report."
        )
    return parents


def report(predictions: Predictions, labels: Sequence[str]) -> DomainReport:
    """The report on predictions with their true classes; a domain is the folder above the class's, if there is one."""
    predicted = predictions.predicted()
    domains = [_domain(path) for path in predictions.paths]
    return DomainReport(predictions.classes, list(zip(domains, labels, predicted, strict=True)))


def _domain(path: str) -> str:
    folders = path.split("/")[:-2]
    return folders[-1] if folders else ""
