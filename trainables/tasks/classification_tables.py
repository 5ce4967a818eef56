"""Tables of a classifier's predictions.

Recall and precision of every class, and which classes are confused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from trainables.specs.measurements import Curve
from trainables.tasks.classification_metrics import class_counts, confusion_matrix

PER_CLASS = "per_class"
CONFUSION = "confusion"
MOST_CELLS = 2500
"""Rows of a split's confusion table: all cells of fifty classes."""

Predictions = tuple[Tensor, Tensor]
"""Logits (N, K) and labels (N,)."""
Columns = dict[str, list[float | str | None]]


def per_class_table(splits: Mapping[str, Predictions], classes: Sequence[str]) -> Curve:
    """Images, recall, precision and F1 of every class on every split.

    Recall is missing where a class has no image, precision where it is never predicted, F1 where neither is the case.
    """
    columns: Columns = {name: [] for name in ("class", "split", "images", "predicted", "recall", "precision", "f1")}
    for split, (logits, labels) in splits.items():
        counts = {name: values.tolist() for name, values in class_counts(logits, labels).items()}
        for name, images, predicted, right in zip(
            classes, counts["images"], counts["predicted"], counts["right"], strict=True
        ):
            columns["class"].append(name)
            columns["split"].append(split)
            columns["images"].append(images)
            columns["predicted"].append(predicted)
            columns["recall"].append(_ratio(right, images))
            columns["precision"].append(_ratio(right, predicted))
            columns["f1"].append(_ratio(2 * right, images + predicted))
    return Curve(columns, "Recall, precision and F1 of each class against the others.")


def confusion_table(splits: Mapping[str, Predictions], classes: Sequence[str]) -> Curve:
    """Confusion matrices as rows (label, prediction, images), see `confusion_rows`."""
    confusions = {split: confusion_matrix(logits, labels) for split, (logits, labels) in splits.items()}
    return confusion_rows(confusions, classes, "images", "Images")


def confusion_rows(confusions: Mapping[str, Tensor], classes: Sequence[str], unit: str, counted: str) -> Curve:
    """Confusion matrices as rows (label, prediction, count), the cells that are not zero.

    Of more than `MOST_CELLS` cells of a split those with the lowest counts are left out, and the note says how many.

    Args:
        confusions: split → counts (K, K), label by prediction.
        classes: names.
        unit: of the counts, which is the name of their column: `images`, `pixels`.
        counted: the unit at the beginning of a sentence.
    """
    columns: Columns = {name: [] for name in ("label", "split", "prediction", unit)}
    left_out: dict[str, int] = {}
    for split, matrix in confusions.items():
        cells = matrix.nonzero()
        if len(cells) > MOST_CELLS:
            left_out[split] = len(cells) - MOST_CELLS
            counts = matrix[cells[:, 0], cells[:, 1]]
            # Stable: of equal counts the cells that come first stay, on every machine.
            largest = counts.argsort(descending=True, stable=True)[:MOST_CELLS]
            cells = cells[largest.sort().values]
        for label, prediction in cells.tolist():
            columns["label"].append(classes[label])
            columns["split"].append(split)
            columns["prediction"].append(classes[prediction])
            columns[unit].append(float(matrix[label, prediction]))
    note = f"{counted} by label and prediction; cells without {unit} are left out."
    if left_out:
        parts = ", ".join(f"{count} of {split}" for split, count in left_out.items())
        note += f" So are the cells with the fewest {unit} where a split has more than {MOST_CELLS}: {parts}."
    return Curve(columns, note)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
