"""Errors of a classifier: numbers by hand, and those of scikit-learn and torchmetrics on random predictions."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import confusion_matrix as confusion_of_sklearn
from sklearn.metrics import precision_recall_fscore_support
from torchmetrics.functional.classification import multiclass_calibration_error

from orchestrator.results.errors import (
    ConfusedPair,
    TopClasses,
    class_counts,
    class_names,
    confident_errors,
    confused_pairs,
    confusion_matrix,
    extremes_by_class,
    reliability,
    split_names,
    top_classes,
)

CLASSES = 7
SPLITS = {"val": 40, "test": 300, "ood/sketch": 200}


def predictions(chunks: int = 1) -> pa.Table:
    """Random logits that are right more often than not; class 6 is never a label on sketch."""
    generator = np.random.default_rng(4)
    splits = np.repeat(list(SPLITS), list(SPLITS.values()))
    targets = generator.integers(0, CLASSES, len(splits))
    targets[(splits == "ood/sketch") & (targets == 6)] = 0
    logits = generator.normal(0, 2, (len(splits), CLASSES)).astype(np.float32)
    logits[np.arange(len(splits)), targets] += 2
    values = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), CLASSES)
    table = pa.table(
        {
            "split": pa.array(splits.tolist()).dictionary_encode(),
            "name": [f"{split}/{index}.png" for index, split in enumerate(splits.tolist())],
            "target": pa.array(targets, pa.int64()),
            "output": values,
        }
    )
    parts = np.linspace(0, len(table), chunks + 1).astype(int)
    table = pa.concat_tables([table.slice(a, b - a) for a, b in itertools.pairwise(parts)])
    return table.replace_schema_metadata({"classes": json.dumps([f"class {k}" for k in range(CLASSES)])})


def top(targets: list[int], predicted: list[int], confidence: list[float] | None = None) -> TopClasses:
    names = [str(index) for index in range(len(targets))]
    given = np.ones(len(targets)) if confidence is None else np.array(confidence)
    return TopClasses(names, np.array(targets), np.array(predicted), given)


@pytest.mark.parametrize("chunks", [1, 3])
def test_top_classes_are_those_of_the_softmax_split_by_split(chunks: int) -> None:
    table = predictions(chunks)
    assert split_names(table) == list(SPLITS)
    assert class_names(table) == [f"class {k}" for k in range(CLASSES)]
    rows = table.filter(pa.compute.equal(table.column("split"), "test"))
    logits = torch.tensor(rows.column("output").to_pylist(), dtype=torch.float64)
    for scale in (1.0, 2.5):
        given = top_classes(table, "test", temperature=scale)
        probabilities, classes = (logits / scale).softmax(1).max(1)
        assert given.predicted.tolist() == classes.tolist()
        np.testing.assert_allclose(given.scaled, probabilities, rtol=1e-12)
    np.testing.assert_allclose(given.confidence, logits.softmax(1).max(1).values, rtol=1e-12)
    assert given.names == rows.column("name").to_pylist()
    assert given.targets.tolist() == rows.column("target").to_pylist()


def test_predictions_that_are_not_finite_have_no_confidence() -> None:
    table = predictions()
    logits = np.array(table.column("output").to_pylist(), np.float32)
    first = SPLITS["val"]
    logits[first, 3] = np.nan
    values = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), CLASSES)
    given = top_classes(table.set_column(3, "output", values), "test")
    assert np.flatnonzero(np.isnan(given.confidence)).tolist() == [0]
    assert 0 not in confident_errors(given, most=300)
    assert reliability(given.confidence, given.right).count.sum() == SPLITS["test"] - 1


def test_counts_of_classes_and_confusion_are_those_of_scikit_learn() -> None:
    for split in ("test", "ood/sketch"):
        given = top_classes(predictions(), split)
        counts = class_counts(given, CLASSES)
        labels = list(range(CLASSES))
        precision, recall, f1, images = precision_recall_fscore_support(
            given.targets, given.predicted, labels=labels, zero_division=math.nan
        )
        assert counts.images.tolist() == images.tolist()
        np.testing.assert_allclose(counts.recall, recall)
        np.testing.assert_allclose(counts.precision, precision)
        np.testing.assert_allclose(counts.f1, f1)
        matrix = confusion_matrix(given.targets, given.predicted, CLASSES)
        assert (matrix == confusion_of_sklearn(given.targets, given.predicted, labels=labels)).all()


def test_a_class_without_samples_has_no_recall() -> None:
    counts = class_counts(top([0, 0, 1], [0, 1, 1]), 3)
    assert counts.recall.tolist()[:2] == [0.5, 1.0]
    assert np.isnan([counts.recall[2], counts.precision[2], counts.f1[2]]).all()


def test_the_pairs_that_are_confused_most_come_first() -> None:
    targets = [2, 2, 2, 2, 0, 0, 1, 1]
    predicted = [1, 1, 2, 0, 1, 1, 0, 1]
    expected = [ConfusedPair(0, 1, 2, 1.0), ConfusedPair(2, 1, 2, 0.5), ConfusedPair(1, 0, 1, 0.5)]
    assert confused_pairs(top(targets, predicted), most=3) == expected
    assert confused_pairs(top([0, 1], [0, 1]), most=3) == []


def test_errors_of_the_highest_confidence_come_first_and_right_ones_never() -> None:
    given = top([0, 0, 1, 1, 0], [1, 0, 0, 0, 1], [0.6, 0.99, 0.9, 0.6, 0.7])
    assert confident_errors(given, most=4).tolist() == [2, 4, 0, 3]
    assert confident_errors(given, most=1).tolist() == [2]


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    for split in ("test", "ood/sketch"):
        given = top_classes(predictions(), split, temperature=3.0)
        table = predictions()
        rows = table.filter(pa.compute.equal(table.column("split"), split))
        logits = torch.tensor(rows.column("output").to_pylist(), dtype=torch.float64) / 3
        labels = torch.tensor(given.targets)
        expected = multiclass_calibration_error(logits.softmax(1), labels, CLASSES, n_bins=15, norm="l1")
        assert given.scaled is not None
        assert reliability(given.scaled, given.right).error == pytest.approx(float(expected), abs=1e-6)


def test_bins_of_a_reliability_diagram_by_hand() -> None:
    diagram = reliability(np.array([0.31, 0.33, 0.97, 1.0]), np.array([True, False, True, True]))
    assert diagram.count.tolist() == [2, 2]
    np.testing.assert_allclose(diagram.confidence, [0.32, 0.985])
    np.testing.assert_allclose(diagram.accuracy, [0.5, 1.0])
    assert diagram.error == pytest.approx(0.5 * 0.18 + 0.5 * 0.015)
    assert math.isnan(reliability(np.zeros(0), np.zeros(0, bool)).error)


def test_the_extreme_image_of_each_class_as_in_the_paper() -> None:
    values = np.array([0.1, 0.2, 0.3, 0.8, 0.9, 0.7, np.nan])
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    assert extremes_by_class(values, labels, most=3, largest=False).tolist() == [0, 5, 3]
    assert extremes_by_class(values, labels, most=3, largest=True).tolist() == [4, 5, 2]


def test_of_many_classes_those_with_the_most_extreme_images_and_of_few_several_images_each() -> None:
    values = np.array([0.5, 0.1, 0.4, 0.2])
    assert extremes_by_class(values, np.arange(4), most=2, largest=False).tolist() == [1, 3]
    assert extremes_by_class(values, np.array([0, 0, 0, 1]), most=3, largest=False).tolist() == [1, 3, 2]
    assert extremes_by_class(values, np.zeros(4, int), most=9, largest=False).tolist() == [1, 3, 2, 0]
