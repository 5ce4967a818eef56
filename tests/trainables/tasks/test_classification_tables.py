"""Tables of a classifier's predictions against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor

from trainables.tasks import classification_tables
from trainables.tasks.classification_tables import confusion_table, per_class_table

CLASSES = ("a", "b", "c", "d")


def predictions(seed: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Logits of four classes, labels of the first `classes`."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(60, 4, generator=random), torch.randint(classes, (60,), generator=random)


SPLITS = {"test": predictions(0, classes=4), "ood/x": predictions(1)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_has_its_recall_precision_and_f1(split: str) -> None:
    logits, labels = SPLITS[split]
    table = per_class_table(SPLITS, CLASSES).columns
    rows = [i for i, name in enumerate(table["split"]) if name == split]
    assert [table["class"][i] for i in rows] == list(CLASSES)
    precision, recall, f1, images = precision_recall_fscore_support(
        labels, logits.argmax(1), labels=range(4), zero_division=0
    )
    expected = {"precision": precision, "recall": recall, "f1": f1, "images": images}
    for name, values in expected.items():
        assert [table[name][i] or 0.0 for i in rows] == pytest.approx(values.tolist())


def test_what_a_class_without_images_lacks_is_missing() -> None:
    logits, labels = SPLITS["ood/x"]
    logits = logits.clone()
    logits[:, 3] = -100
    table = per_class_table({"ood/x": (logits, labels)}, CLASSES).columns
    assert (table["images"][3], table["predicted"][3]) == (0.0, 0.0)
    assert [table[name][3] for name in ("recall", "precision", "f1")] == [None, None, None]
    assert None not in [table["recall"][i] for i in range(3)]


def test_the_confusion_table_holds_every_cell_that_is_not_zero() -> None:
    table = confusion_table(SPLITS, CLASSES)
    for split, (logits, labels) in SPLITS.items():
        matrix = np.zeros((4, 4))
        for label, name, prediction, images in zip(*table.columns.values(), strict=True):
            if name == split:
                matrix[CLASSES.index(str(label)), CLASSES.index(str(prediction))] = images
        assert matrix.tolist() == confusion_matrix(labels, logits.argmax(1), labels=range(4)).tolist()
    assert 0.0 not in table.columns["images"]
    assert table.note == "Images by label and prediction; cells without images are left out."


def test_too_many_cells_are_cut_and_the_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = confusion_table(SPLITS, CLASSES).columns["images"]
    monkeypatch.setattr(classification_tables, "MOST_CELLS", 10)
    table = confusion_table({"test": SPLITS["test"]}, CLASSES)
    kept = table.columns["images"]
    assert len(kept) == 10
    assert sorted(kept) == sorted(whole[:16], key=float)[-10:]
    assert table.note.endswith("where a split has more than 10: 6 of test.")
