"""The model card: what a model is, what its numbers stand on, and what its format cannot say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainables.data.masked_pictures import Evaluation
from trainables.models.backbone import DataConfig

UNKNOWN_LICENCE = "not stated by timm's table of weights; see where the weights come from before you pass them on"

PIXEL_RULES = (
    "A picture is turned upright by its EXIF orientation.",
    "Transparency is composited on white.",
    "16-bit values are scaled by v / 257, not clipped.",
    "Of an animation the first frame is used; CMYK is converted to RGB.",
)
"""How pictures become RGB in training and in `luthier predict`: no setting of timm can say it."""


@dataclass(frozen=True)
class Score:
    """One number of the record."""

    name: str
    """Recorded name, such as `test/acc`."""
    value: str
    """Of this model, as text with its unit and, where there is one, its interval over pictures."""
    samples: int | None = None
    """Pictures behind it; None = unknown."""
    over_seeds: str = ""
    """Mean over the configuration's seeds as text, with its interval and what that is over; empty = there is none."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts about a model that its tensors do not hold. Everything is text of a study, so untrusted."""

    study: str
    trial: int | None
    label: str
    strategy: str
    choice: str
    """Why this trial and no other, in a sentence."""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    scores: Sequence[Score] = ()
    data_digest: str = ""
    pretrained: str = ""
    """Name and origin of the pretrained weights."""
    pretrained_digest: str = ""
    licence: str | None = None
    """Of the pretrained weights; None = unknown."""
    limits: Sequence[str] = ()
    """Sentences on what the numbers do not show."""
    taken_over: Mapping[str, float] | None = None
    """Of a refit: recorded name → value of what the search chose or fitted on validation; None = no refit."""


def render_card(
    facts: CardFacts,
    classes: Sequence[str],
    pictures: Sequence[str],
    usage: str,
    proof: Sequence[str],
    pipeline: str = "image-classification",
) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Args:
        facts: of the model.
        classes: names, in the order of the logits.
        pictures: sentences on how a picture becomes the network's input, see `square_lines`.
        usage: Python code that loads the model, of its format.
        proof: sentences on the comparisons that were made when it was exported.
        pipeline: the hubs' name of the task.
    """
    lines = [
        "---",
        "tags:",
        f"- {pipeline}",
        "- timm",
        "- luthier",
        f"pipeline_tag: {pipeline}",
        "library_name: timm",
        "license: other",
        "---",
        f"# {_text(facts.study)}: {_text(facts.label)}",
        "",
        f"{_text(facts.choice)}",
        "",
        *_section("Model", _model_lines(facts)),
        *_section("Classes", [f"{index}. {_text(name)}" for index, name in enumerate(classes)], bullet=""),
        *_section("Pictures", pictures),
        *_scores(facts),
        *_section("Comparisons at export", proof),
        *_section("Limits", [_text(limit) for limit in facts.limits]),
        "## Use",
        "",
        "```python",
        usage.strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _model_lines(facts: CardFacts) -> list[str]:
    hparams = json.dumps(dict(facts.hparams), sort_keys=True, ensure_ascii=False)
    trial = "none" if facts.trial is None else str(facts.trial)
    seed = "unknown" if facts.seed is None else str(facts.seed)
    return [
        f"Strategy: {_text(facts.strategy)}",
        f"Trial: {trial}, seed {seed}",
        f"Hyperparameters: {_code(hparams)}",
        f"Pretrained weights: {_text(facts.pretrained or 'unknown')}",
        f"SHA-256 of the pretrained network: {_code(facts.pretrained_digest or 'unknown')}",
        *_taken_over_lines(facts.taken_over),
        f"Licence of the pretrained weights: {_text(facts.licence or UNKNOWN_LICENCE)}",
        f"SHA-256 of the training data: {_code(facts.data_digest or 'unknown')}",
    ]


def _taken_over_lines(taken_over: Mapping[str, float] | None) -> list[str]:
    if not taken_over:
        return []
    values = ", ".join(f"{_code(name)} = {value:.6g}" for name, value in taken_over.items())
    return [f"Chosen or fitted on validation in the search, and taken over: {values}"]


def square_lines(preprocessing: DataConfig) -> list[str]:
    """How a picture becomes the square that a classifier sees."""
    stored = preprocessing.stored_size
    side = preprocessing.image_size
    return [
        *PIXEL_RULES,
        f"The shorter side is resized to {stored} pixels ({preprocessing.interpolation}), and the centre square of "
        f"{side} pixels is cropped.",
        f"Normalised by mean {list(preprocessing.mean)} and standard deviation {list(preprocessing.std)}.",
        "The first two rules are not part of timm's settings: another program has to follow them itself.",
    ]


def view_lines(preprocessing: DataConfig, evaluation: Evaluation, any_size: bool) -> list[str]:
    """How a picture becomes the views that a segmentation model sees, and their logits its mask.

    Args:
        preprocessing: side and normalisation.
        evaluation: views of a picture.
        any_size: whether the exported model takes images of any size.
    """
    side = preprocessing.image_size
    if evaluation == "resize":
        view = (
            f"The whole picture is one view: its longer side is scaled to {side} pixels, bilinearly with a filter that "
            "widens where it shrinks."
        )
    else:
        view = (
            f"Windows of {side} pixels go over the picture at its own size, evenly spread and overlapping by at least "
            "a third; logits of overlapping windows are averaged."
        )
    sizes = (
        f"any height and width; the numbers are of views of {side} x {side}"
        if any_size
        else f"{side} x {side} pixels and no others"
    )
    return [
        *PIXEL_RULES,
        view,
        f"Normalised by mean {list(preprocessing.mean)} and standard deviation {list(preprocessing.std)}, then padded "
        f"with zeros below and to the right to {side} x {side}.",
        "Logits (batch, classes, h, w) have the decoder's stride. They are scaled bilinearly (align_corners=False) to "
        "the picture's own pixels before the largest gives a pixel's class; masks are never scaled.",
        f"The exported model takes batches of any size, of images of {sizes}.",
    ]


def _scores(facts: CardFacts) -> list[str]:
    if not facts.scores:
        return []
    title = "Numbers of the record" if facts.taken_over is None else "Numbers of the refit"
    trained = "" if facts.taken_over is None else ", trained without the validation pictures"
    rows = []
    for score in facts.scores:
        samples = "" if score.samples is None else f"{score.samples:,}"
        rows.append(f"| {_code(score.name)} | {_text(score.value)} | {_text(score.over_seeds or '–')} | {samples} |")
    head = f"| metric | this model | its configuration, mean over seeds{trained} | pictures |"
    return [f"## {title}", "", head, "|---|---|---|---|", *rows, ""]


def _section(title: str, lines: Sequence[str], bullet: str = "- ") -> list[str]:
    if not lines:
        return []
    return [f"## {title}", "", *(f"{bullet}{line}" for line in lines), ""]


def _text(text: str) -> str:
    """One line of Markdown that shows the text as it is: it may hold names of files, which are untrusted."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"
