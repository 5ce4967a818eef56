"""The report's section on errors of segmentation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import TrialRecord
from orchestrator.report.error_section import TEMPLATES, error_section
from orchestrator.report.mask_section import class_colours, overlay, picture_scores
from orchestrator.results.study_results import Results
from trainables.storage.kept_predictions import SplitPredictions, save_predictions
from trainables.tasks.segmentation_metrics import encoded_mask

CLASSES = ["ground", "<b>", "blue"]


def test_a_picture_s_score_is_over_the_classes_that_it_has() -> None:
    intersection = np.array([[4, 0, 0], [2, 1, 0], [0, 0, 0]])
    union = np.array([[4, 0, 0], [4, 4, 0], [0, 0, 0]])
    assert picture_scores(intersection, union) == pytest.approx([1.0, (0.5 + 0.25) / 2, float("nan")], nan_ok=True)


def test_an_overlay_leaves_the_first_class_and_greys_ignored_pixels() -> None:
    pixels = np.full((1, 3, 3), 100, np.uint8)
    drawn = overlay(pixels, np.array([[0, 1, 255]], np.uint8), class_colours(3))
    assert drawn[0, 0].tolist() == [100, 100, 100]
    assert drawn[0, 1].tolist() == [193, 40, 40]
    assert drawn[0, 2].tolist() == [117, 117, 117]


def test_classes_have_colours_of_their_own() -> None:
    for count in (2, 11, 21, 255):
        assert len({tuple(colour) for colour in class_colours(count)[:count].tolist()}) == count


def table(columns: dict[str, list[Any]]) -> dict[str, Any]:
    return {"columns": columns, "note": ""}


def study(folder: Path) -> Results:
    """One trial with kept predictions of two pictures, the second of which is wrong."""
    right = np.array([[0, 1], [1, 2]], np.uint8)
    wrong = np.zeros((2, 2), np.uint8)
    save_predictions(
        predictions_file(folder, 0),
        {
            "test": SplitPredictions(
                names=["a.png", "b.png"],
                targets=None,
                outputs=None,
                statistics={
                    "intersection": np.array([[1, 2, 1], [1, 0, 0]]),
                    "union": np.array([[1, 2, 1], [4, 2, 1]]),
                    "prediction": [encoded_mask(right), encoded_mask(wrong)],
                },
            )
        },
        {"classes": CLASSES},
    )
    iou = {
        "class": CLASSES,
        "split": ["test"] * 3,
        "pixels": [2.0, 4.0, 2.0],
        "predicted": [5.0, 2.0, 1.0],
        "iou": [0.4, 0.5, None],
    }
    confusion = {
        "label": ["ground", "<b>", "<b>"],
        "split": ["test"] * 3,
        "prediction": ["ground", "<b>", "ground"],
        "pixels": [2.0, 2.0, 2.0],
    }
    record = TrialRecord(
        trial_id="0", number=0, strategy="full", label="full", hparams={}, seed=0, role="search", state="complete",
        config_hash="a", metrics={"val/miou": 0.5, "best/val/miou": 0.5, "test/miou": 0.5},
        curves={"iou_per_class": table(iou), "pixel_confusion": table(confusion)},
    )  # fmt: skip
    return Results([record], {"name": "masks", "task": "segmentation"}, folder=folder)


def test_the_section_has_iou_per_class_and_shares_of_confused_pixels(tmp_path: Path) -> None:
    section = error_section(study(tmp_path), "no store")
    assert section["template"] == TEMPLATES["segmentation"]
    (entry,) = section["entries"]
    assert entry["classes"]["groups"] == ["ID test"]
    assert entry["classes"]["rows"] == [["ground", "2", "40.0"], ["<b>", "4", "50.0"], ["blue", "2", "–"]]
    (split,) = entry["splits"]
    assert split["note"] == "2 pictures"
    assert [[cell["text"] for cell in row["cells"]] for row in split["matrix"]["rows"]] == [
        ["100", "", ""],
        ["50", "50", ""],
        ["", "", ""],
    ]
    assert split["pictures"] == []
    assert "data store is not beside" in section["problem"]


def test_kept_masks_are_what_was_predicted() -> None:
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded_mask(mask)))), mask)
