"""The report's section on errors of segmentation: IoU per class, confusion of pixels, and the worst pictures.

Values for the template: tables of the trial's record, and predicted masks that are kept beside its statistics.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orchestrator.record.kept_paths import predictions_file
from orchestrator.report.thumbnails import Thumbnails, thumbnail
from orchestrator.results.predictions import INTERSECTION, UNION, PredictionsError, matrix, read_predictions
from trainables.data.store import IGNORED
from trainables.specs.metrics import IOU_TABLE, PIXEL_CONFUSION_TABLE, TEST, ood_domain

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestrator.record.records import TrialRecord
    from orchestrator.results.study_results import Results

PREDICTION = "stat/prediction"
"""Column of predicted masks, PNG."""
MOST_PICTURES = 8
"""Worst pictures per split."""
OVERLAY = 0.6
"""Share of the class's colour where a mask lies over a picture."""
IGNORED_GREY = 128
MATRIX_CLASSES = 21
"""Up to this many classes the confusion matrix is shown."""


def mask_entry(results: Results, record: TrialRecord, thumbnails: Thumbnails) -> dict[str, Any]:
    """One entry's values.

    Raises:
        PredictionsError: its trial has no readable predictions.
    """
    if results.folder is None:
        raise PredictionsError("The folder of the study is not known.")
    table = read_predictions(predictions_file(results.folder, record.number), outputs=False)
    in_file = np.asarray(table.column("split").to_pylist())
    keys = [key for key in dict.fromkeys(in_file.tolist()) if key == TEST or ood_domain(key) is not None]
    classes = _class_names(record)
    scores = picture_scores(matrix(table, INTERSECTION), matrix(table, UNION))
    return {
        "label": record.label,
        "title": f"trial {record.number}",
        "open": False,
        "classes": _class_table(record, classes, keys),
        "legend": legend(classes),
        "splits": [
            {
                "title": _title(key),
                "note": f"{int((in_file == key).sum())} pictures",
                "matrix": _matrix(record, classes, key) if len(classes) <= MATRIX_CLASSES else None,
                "pictures": list(_worst(table, scores, np.flatnonzero(in_file == key), key, classes, thumbnails)),
            }
            for key in keys
        ],
    }


def _title(split: str) -> str:
    domain = ood_domain(split)
    return "ID test" if domain is None else f"OOD {domain}"


def _class_names(record: TrialRecord) -> list[str]:
    """Classes in the order of their indices."""
    return list(dict.fromkeys(str(name) for name in _column(record, IOU_TABLE, "class")))


def _column(record: TrialRecord, table: str, name: str) -> Sequence[Any]:
    """A column of a table in the record; empty where the trial has none."""
    values: Sequence[Any] = record.curves.get(table, {}).get("columns", {}).get(name, ())
    return values


def _class_table(record: TrialRecord, classes: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Pixels and IoU of every class on every split."""
    columns = [_column(record, IOU_TABLE, name) for name in ("class", "split", "pixels", "iou")]
    cells = {(name, split): (pixels, iou) for name, split, pixels, iou in zip(*columns, strict=True)}
    rows = []
    for name in classes:
        row = [name]
        for key in keys:
            pixels, iou = cells.get((name, key), (0, None))
            row += [f"{pixels:,.0f}", "–" if iou is None else f"{100 * iou:.1f}"]
        rows.append(row)
    return {"groups": [_title(key) for key in keys], "rows": rows}


def _matrix(record: TrialRecord, classes: Sequence[str], split: str) -> dict[str, Any]:
    """Confusion of pixels: shares of the true class's, in per cent."""
    counts = np.zeros((len(classes), len(classes)))
    columns = [_column(record, PIXEL_CONFUSION_TABLE, name) for name in ("label", "prediction", "split", "pixels")]
    for label, prediction, of, pixels in zip(*columns, strict=True):
        if of == split:
            counts[classes.index(label), classes.index(prediction)] = pixels
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = [
        {
            "name": name,
            "cells": [
                {
                    "text": f"{100 * shares[label, predicted]:.0f}" if counts[label, predicted] else "",
                    "share": round(float(shares[label, predicted]), 3),
                    "right": label == predicted,
                }
                for predicted in range(len(classes))
            ],
        }
        for label, name in enumerate(classes)
    ]
    return {"classes": list(classes), "rows": rows}


def picture_scores(intersection: NDArray[np.int64], union: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean IoU (n,) of each picture by itself, over the classes that it has or that are predicted; NaN where none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotients = np.where(union > 0, intersection / np.maximum(union, 1), np.nan)
        present = (union > 0).sum(1)
        return np.asarray(np.where(present > 0, np.nansum(quotients, 1) / present, np.nan))


def _worst(
    table: pa.Table,
    scores: NDArray[np.float64],
    rows: NDArray[np.int64],
    split: str,
    classes: Sequence[str],
    thumbnails: Thumbnails,
) -> Iterator[dict[str, Any]]:
    """The pictures of a split with the lowest IoU by themselves: picture, mask and prediction.

    Args:
        scores: of all pictures of the table.
        rows: of the split.
    """
    names = table.column("name").take(rows).to_pylist()
    if PREDICTION not in table.column_names or not thumbnails.has(split, names):
        return
    assert thumbnails.store is not None
    of_split = scores[rows]
    order = np.argsort(np.where(np.isfinite(of_split), of_split, math.inf), kind="stable")[:MOST_PICTURES]
    palette = class_colours(len(classes))
    for position in order.tolist():
        # Three pictures each; the page has a limit of them.
        if thumbnails.left < 3:
            return
        thumbnails.left -= 3
        pixels = np.asarray(thumbnails.store.pictures(split)[position])
        mask = np.asarray(thumbnails.store.masks(split)[position])
        predicted = np.asarray(Image.open(io.BytesIO(table.column(PREDICTION)[int(rows[position])].as_py())))
        yield {
            "name": names[position],
            "number": f"IoU {100 * of_split[position]:.1f}\N{NO-BREAK SPACE}%",
            "classes": ", ".join(classes[value] for value in np.unique(mask[mask != IGNORED])),
            "sources": [
                thumbnail(pixels),
                thumbnail(overlay(pixels, mask, palette)),
                thumbnail(overlay(pixels, predicted, palette)),
            ],
        }


def class_colours(count: int) -> NDArray[np.uint8]:
    """Colours (256, 3) by class: the first is not drawn, ignored pixels are grey."""
    colours = np.full((256, 3), IGNORED_GREY, np.uint8)
    shades = matplotlib.colormaps["hsv"](np.arange(max(1, count - 1)) / max(1, count - 1))[:, :3]
    colours[1:count] = np.rint(255 * shades[: count - 1])
    return colours


def overlay(pixels: NDArray[np.uint8], mask: NDArray[np.uint8], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) under the colours of a mask (H, W); class 0 leaves it as it is."""
    share = np.where(mask == 0, 0.0, OVERLAY)[:, :, None]
    return np.asarray(np.rint((1 - share) * pixels + share * colours[mask]), np.uint8)


def legend(classes: Sequence[str]) -> list[Mapping[str, str]]:
    """Name and colour of every class that is drawn."""
    colours = class_colours(len(classes))
    return [
        {"name": name, "colour": "#" + bytes(colours[value].tolist()).hex()}
        for value, name in enumerate(classes)
        if value > 0
    ]
