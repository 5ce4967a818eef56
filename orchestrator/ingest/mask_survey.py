"""What the masks of a source hold, before any pixel is stored: classes, sizes, ignored pixels and problems.

    survey_masks(source, request)      → Source      reads headers of pictures and values of masks, once per machine
    judge(source, outcomes, request)   → Source      the rules below; problems are raised or listed

A mask has the size of its picture as shown, is saved without loss, and every value has a meaning: declared, found in a
file that is named, or a class of its own. In this order: the survey; the judgement; sizes; values; splits.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.ingest.decoding import DecodeJob, DecodingProgress, decode_all
from orchestrator.ingest.errors import DataError, first_few
from orchestrator.ingest.label_map import MAX_CLASSES, LabelMap, MaskRequest, colour_text, parse_raw
from orchestrator.ingest.masks import COLOUR, GREY, MISSING, MaskOutcome, Translation, grey_colour, raw_text
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import MaskSurvey, Outcome, Sample, SkippedEntry, Source
from orchestrator.wording import bytes_text, counted, listed
from trainables.data.store import IGNORED
from trainables.specs.short_hash import short_hash
from trainables.storage.atomic_files import write_text
from trainables.storage.compute_once import cache_root, compute_once

log = logging.getLogger("luthier")

SURVEY_VERSION = 1
"""Version of the kept surveys."""
FEW_VALUES = 3
"""Up to this many values that never fill 2 x 2 pixels are taken for thin classes."""

LARGE_STORE_BYTES = 64 * 2**30
"""Size of a store of whole pictures from which a study warns. One that does not fit on the disk is refused."""

WAYS_TO_DECLARE = "data.labels: {name: value, …} (in commands: --labels name=value,…)"


def survey_masks(source: Source, request: IngestRequest, progress: DecodingProgress | None = None) -> Source:
    """The source with the survey of its masks; pictures are opened, not decoded.

    What the masks hold is kept in this machine's cache by the source's digest, so that a plan and the run after it read
    them once.

    Raises:
        DataError: all problems of the masks, in one message.
    """
    assert request.masks is not None
    return judge(source, _outcomes(source, request, progress), request.masks, _used_domains(source, request))


def _used_domains(source: Source, request: IngestRequest) -> Collection[str] | None:
    """Domains that a study uses; None = all."""
    if not request.id:
        return None
    return {*request.id, *(request.ood or source.evaluation_domains)}


def _outcomes(source: Source, request: IngestRequest, progress: DecodingProgress | None) -> dict[int, Outcome]:
    key = short_hash([SURVEY_VERSION, source.digest, str(Path(str(request.root)).absolute())], digits=24)
    path = cache_root() / "masks" / f"{key}.json"

    def load(path: Path) -> dict[int, Outcome] | None:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            outcomes = {i: _outcome_of(row) for i, row in enumerate(rows)}
        except (OSError, ValueError, TypeError):
            return None
        return outcomes if len(outcomes) == len(source.samples) else None

    def save(outcomes: dict[int, Outcome], path: Path) -> None:
        write_text(path, json.dumps([_row_of(outcomes[i]) for i in range(len(outcomes))]))

    def compute() -> dict[int, Outcome]:
        log.info("Reading the masks of %d pictures, once per machine", len(source.samples))
        return decode_all(source, range(len(source.samples)), DecodeJob(None, "nearest"), progress=progress)

    return compute_once(path, load, compute, save)


def _row_of(outcome: Outcome) -> list[Any]:
    mask = None if outcome.mask is None else outcome.mask.to_json()
    return [outcome.reason, outcome.width, outcome.height, list(outcome.notes), mask]


def _outcome_of(row: Sequence[Any]) -> Outcome:
    reason, width, height, notes, mask = row
    summary = None if mask is None else MaskOutcome.from_json(mask)
    return Outcome(reason, b"", b"", width, height, "", tuple(notes), mask=summary)


def judge(
    source: Source, outcomes: Mapping[int, Outcome], request: MaskRequest, domains: Collection[str] | None = None
) -> Source:
    """The source with the survey of its masks, of what decoding them has shown.

    Samples of a split without any labelled pixel are left out.

    Args:
        source: the scan.
        outcomes: of all samples, with summaries of their masks.
        request: what the study declares.
        domains: those that the study uses, the others make no class and no problem; None = all.

    Raises:
        DataError: all problems of the masks, in one message.
    """
    used = [i for i, sample in enumerate(source.samples) if domains is None or sample.domain in domains]
    readable = {i: outcomes[i] for i in used if outcomes[i].reason is None}
    masks = {i: outcome.mask for i, outcome in readable.items() if outcome.mask is not None}
    if not masks:
        reasons = first_few([f"{source.samples[i].name} ({outcome.reason})" for i, outcome in outcomes.items()])
        raise DataError(f"Pictures and their masks must be readable, but none of {len(outcomes)} pairs is: {reasons}.")
    problems = [*_lossy(source.samples, masks), *_sizes(source.samples, readable)]
    label_map = request.labels or source.label_map
    ignored = _ignored(request, label_map)
    remarks: list[str] = []
    warnings: list[str] = []
    translation = Translation(())
    if label_map is not None:
        translation = _of_map(label_map, ignored)
        # Interpolated values are unknown ones, too: of a lossy file they are named once.
        if not problems:
            problems += _unknown(source.samples, masks, translation, label_map)
        remarks += _map_remarks(label_map, request)
    elif not problems:
        translation, problems = _by_value(masks, ignored)
    if problems:
        raise DataError(" ".join(problems))
    pixels = _pixels(masks, translation, len(source.samples))
    absent = [name for name, count in zip(translation.classes, pixels[:, :-1].sum(axis=0), strict=True) if not count]
    if absent:
        remarks.append(f"{counted(len(absent), 'class', 'classes')} occur nowhere: {first_few(absent, 20)}.")
    turned = sum("rotated_by_exif" in outcome.notes for outcome in readable.values())
    if turned:
        remarks.append(
            f"{counted(turned, 'picture')} turned upright by EXIF orientation; masks are read as they are stored."
        )
    survey = MaskSurvey(
        translation=translation,
        sizes=np.array([_size(outcomes[i]) for i in range(len(source.samples))], np.int64).reshape(-1, 2),
        pixels=pixels,
        digests=tuple(masks[i].digest if i in masks else "" for i in range(len(source.samples))),
        positions=tuple(range(len(source.samples))),
        unreadable={i: str(outcome.reason) for i, outcome in outcomes.items() if outcome.reason is not None},
    )
    size = int(survey.sizes.prod(axis=1).sum()) * 4
    if size > LARGE_STORE_BYTES:
        warnings.append(
            f"The store of whole pictures takes {bytes_text(size)}, 4 bytes a pixel. Where the network sees less, "
            "scale pictures and masks down beforehand (masks without interpolation)."
        )
    surveyed = replace(
        source,
        survey=survey,
        declared_labels=label_map is not None,
        remarks=[*source.remarks, *remarks, *_void(source.samples, survey, masks)],
        warnings=[*source.warnings, *warnings],
    )
    return _without_void_splits(surveyed, masks)


def _size(outcome: Outcome) -> tuple[int, int]:
    return (outcome.height, outcome.width) if outcome.reason is None else (0, 0)


def _pixels(masks: Mapping[int, MaskOutcome], translation: Translation, count: int) -> Any:
    """(n, K + 1) pixels of each class, then ignored ones."""
    classes = len(translation.classes)
    pixels = np.zeros((count, classes + 1), np.int64)
    for position, mask in masks.items():
        for value, number in mask.counts.items():
            index = translation.index(value, mask.kind, mask.palette)
            pixels[position, classes if index == IGNORED else index] += number
    return pixels


def _lossy(samples: Sequence[Sample], masks: Mapping[int, MaskOutcome]) -> list[str]:
    """Masks in a format that changes values."""
    lossy = {i: mask for i, mask in masks.items() if mask.lossy}
    if not lossy:
        return []
    totals: Counter[int] = Counter()
    colours = any(mask.kind == COLOUR for mask in lossy.values())
    for mask in lossy.values():
        grey = colours and mask.kind != COLOUR
        totals.update({grey_colour(value) if grey else value: count for value, count in mask.counts.items()})
    kind = COLOUR if colours else GREY
    common = sorted(value for value, _ in totals.most_common(2))
    other = totals.total() - sum(totals[value] for value in common)
    values = f"{counted(len(totals), 'value')}"
    if len(totals) > 2:
        neither = " nor ".join(raw_text(value, kind) for value in common)
        values += f"; {other:,} of {totals.total():,} pixels are neither {neither}"
    formats = listed(sorted({mask.format for mask in lossy.values()}))
    return [
        f"Masks must be saved without loss, but {len(lossy)} of {len(masks)} are {formats} "
        f"({_mask_names(samples, lossy)}), which changes small numbers in silence: they hold {values}. Save the masks "
        "as PNG, from where they were drawn."
    ]


def _mask_names(samples: Sequence[Sample], positions: Sequence[int] | Mapping[int, Any]) -> str:
    """Names of masks, quoted: the file's, or the sample's where masks are no files."""
    return first_few([f"'{_mask_name(samples[i])}'" for i in positions])


def _mask_name(sample: Sample) -> str:
    return sample.mask if isinstance(sample.mask, str) else sample.name


def _sizes(samples: Sequence[Sample], outcomes: Mapping[int, Outcome]) -> list[str]:
    """Masks of another size than their pictures as shown."""
    kinds: dict[tuple[tuple[int, int], tuple[int, int], bool], list[int]] = defaultdict(list)
    for i, outcome in outcomes.items():
        mask = outcome.mask
        if mask is not None and (mask.width, mask.height) != (outcome.width, outcome.height):
            turned = "rotated_by_exif" in outcome.notes and (mask.height, mask.width) == (outcome.width, outcome.height)
            kinds[(outcome.width, outcome.height), (mask.width, mask.height), turned].append(i)
    problems = []
    for (picture, mask_size, turned), positions in sorted(kinds.items(), key=lambda kind: kind[1][0])[:3]:
        upright = f"{picture[0]} x {picture[1]}"
        stored = f"{mask_size[0]} x {mask_size[1]}"
        share = f"{len(positions)} of {len(outcomes)}"
        if turned:
            names = first_few([f"'{samples[i].name}'" for i in positions])
            problems.append(
                f"A mask lies on its picture as shown, but EXIF turns {share} pictures ({names}) to {upright}, and "
                f"their masks are {stored}. Turn these masks, too, or save the pictures upright."
            )
            continue
        problems.append(
            f"A mask has the size of its picture as shown and is never scaled, but {share} masks "
            f"({_mask_names(samples, positions)}) {'is' if len(positions) == 1 else 'are'} {stored} where the picture "
            f"is {upright}. Save masks at the size of their pictures."
        )
    if len(kinds) > 3:
        more = sum(map(len, kinds.values()))
        problems.append(f"In all {more} of {len(outcomes)} masks differ in size from their pictures.")
    return problems


def _ignored(request: MaskRequest, label_map: LabelMap | None) -> set[tuple[bool, int]]:
    """(is a colour, value) of what counts nowhere."""
    if request.ignore is not None:
        return {parse_raw(value) for value in request.ignore}
    if label_map is not None and label_map.values.get(IGNORED) is not None:
        return set()
    return {(False, IGNORED)}


def _of_map(label_map: LabelMap, ignored: set[tuple[bool, int]]) -> Translation:
    integers = {value: IGNORED if index is None else index for value, index in label_map.values.items()}
    colours = {value: IGNORED if index is None else index for value, index in label_map.colours.items()}
    for is_colour, value in ignored:
        # The default ignored value belongs to index masks: a map of colours alone has no integers.
        if is_colour or integers:
            (colours if is_colour else integers)[value] = IGNORED
    return Translation(label_map.classes, integers, colours)


def _map_remarks(label_map: LabelMap, request: MaskRequest) -> list[str]:
    if request.labels is not None and label_map.origin == "data.labels":
        return []
    remarks = [f"The values of the masks have the classes of {label_map.origin}."]
    ignored = [*label_map.values.values(), *label_map.colours.values()].count(None)
    if ignored:
        remarks.append(f"{counted(ignored, 'value')} of it {'is' if ignored == 1 else 'are'} ignored.")
    return remarks


def _unknown(
    samples: Sequence[Sample], masks: Mapping[int, MaskOutcome], translation: Translation, label_map: LabelMap
) -> list[str]:
    """Values that the map does not have."""
    strays: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, mask in masks.items():
        for value, count in mask.counts.items():
            if translation.index(value, mask.kind, mask.palette) == MISSING:
                strays[_text(value, mask, translation)].append((i, count))
    if not strays:
        return []
    described = [
        f"{text} ({_mask_names(samples, [i for i, _ in masks_with])}: "
        f"{counted(sum(count for _, count in masks_with), 'pixel')})"
        for text, masks_with in sorted(strays.items(), key=lambda entry: -len(entry[1]))
    ]
    return [
        f"Every value of a mask must have a meaning, but {label_map.origin} has none for "
        f"{first_few(described, 3)}. Correct the masks, or name these values in data.labels or data.ignore."
    ]


def _text(value: int, mask: MaskOutcome, translation: Translation) -> str:
    """A value as it is looked up: by its colour where labels are given by colour alone."""
    if mask.kind != COLOUR and translation.colours and not translation.integers:
        return colour_text(mask.palette.get(value, grey_colour(value)))
    return raw_text(value, mask.kind)


def _by_value(masks: Mapping[int, MaskOutcome], ignored: set[tuple[bool, int]]) -> tuple[Translation, list[str]]:
    """A class per value, named by it; or problems."""
    if any(mask.kind == COLOUR for mask in masks.values()):
        return Translation(()), [_colours_alone(masks)]
    clash = _palette_clash(masks)
    if clash is not None:
        return Translation(()), [clash]
    totals: Counter[int] = Counter()
    solid: set[int] = set()
    for mask in masks.values():
        totals.update(mask.counts)
        solid |= mask.solid
    without_meaning = {value for is_colour, value in ignored if not is_colour}
    values = sorted(set(totals) - without_meaning)
    thin = [value for value in values if value not in solid]
    if len(thin) > FEW_VALUES and 2 * len(thin) >= len(values):
        return Translation(()), [
            f"The values of a mask are labels, but {len(thin)} of {len(values)} values ({first_few(map(str, thin))}) "
            "never fill 2 x 2 pixels, as interpolation and lossy formats leave them. Save the masks from where they "
            f"were drawn, without scaling or smoothing, or declare the values: {WAYS_TO_DECLARE}."
        ]
    if values and (len(values) > MAX_CLASSES or values[-1] > IGNORED):
        return Translation(()), [
            f"Values above {IGNORED} are labels only where a map gives them a class, at most {MAX_CLASSES} of them, "
            f"but the masks hold {counted(len(values), 'value')} up to {values[-1]}, as instance numbers do. Give "
            f"masks of classes, or declare the values: {WAYS_TO_DECLARE}."
        ]
    if len(values) < 2:
        return Translation(()), [_one_class(values, totals, sorted(without_meaning & totals.keys()))]
    integers = {value: i for i, value in enumerate(values)}
    integers.update(dict.fromkeys(without_meaning, IGNORED))
    return Translation(tuple(map(str, values)), integers), []


def _one_class(values: Sequence[int], totals: Mapping[int, int], ignored: Sequence[int]) -> str:
    """The message where at most one class would be left."""
    left = f"only the value {values[0]} ({totals[values[0]]:,} pixels)" if values else "no value"
    if not ignored:
        return (
            f"Masks must hold at least two classes, but there is {left}. Add masks of other classes, or declare the "
            f"values: {WAYS_TO_DECLARE}."
        )
    both = listed([str(value) for value in sorted({*values, *ignored})])
    number = ignored[0]
    return (
        f"Masks must hold at least two classes, but their values are {both}, and {number} is the ignored value "
        f"({totals[number]:,} pixels), so that {left} would be left. Where {number} is a class, declare the values, "
        f"such as data.labels: {{background: {values[0] if values else 0}, object: {number}}}, or another ignored "
        "value, such as data.ignore: [254] (in commands: --labels background=0,object=255, or --ignore 254)."
    )


def _colours_alone(masks: Mapping[int, MaskOutcome]) -> str:
    """The message for colours without a map."""
    totals: Counter[str] = Counter()
    for mask in masks.values():
        for value, count in mask.counts.items():
            colour = value if mask.kind == COLOUR else mask.palette.get(value, grey_colour(value))
            totals[colour_text(colour)] += count
    colours = "; ".join(f"{colour}: {count:,}" for colour, count in totals.most_common(10))
    more = f"; and {len(totals) - 10} more" if len(totals) > 10 else ""
    first, *others = totals
    example = f"{{background: '{first}', object: '{others[0] if others else '#ffffff'}'}}"
    return (
        f"A colour of a mask is a class only through a label map, but none is given and the masks hold "
        f"{counted(len(totals), 'colour')} (red,green,blue: pixels): {colours}{more}. Put CVAT's labelmap.txt beside "
        f"the masks, or declare the colours, such as data.labels: {example} (in commands: --labels FILE)."
    )


def _palette_clash(masks: Mapping[int, MaskOutcome]) -> str | None:
    """The message where one palette index has different colours in different masks."""
    colours: dict[int, dict[int, int]] = defaultdict(dict)
    for i, mask in masks.items():
        for value, colour in mask.palette.items():
            colours[value].setdefault(colour, i)
    for value, seen in sorted(colours.items()):
        if len(seen) > 1:
            one, other = (colour_text(colour) for colour in list(seen)[:2])
            return (
                "The index of a palette mask is its label, but the palettes differ from mask to mask: index "
                f"{value} is {one} in one and {other} in another, so that an index is no class. Give the colours their "
                "classes: data.labels: {name: 'red,green,blue', …} (in commands: --labels FILE)."
            )
    return None


def _void(samples: Sequence[Sample], survey: MaskSurvey, masks: Collection[int]) -> list[str]:
    """Readable masks without a labelled pixel."""
    void = [i for i in np.flatnonzero(survey.labelled == 0).tolist() if i in masks]
    if not void:
        return []
    has = "has" if len(void) == 1 else "have"
    return [f"{counted(len(void), 'mask')} {has} no labelled pixel: {_mask_names(samples, void)}."]


def _without_void_splits(source: Source, masks: Collection[int]) -> Source:
    """The source without those of its own splits that have no labelled pixel.

    Args:
        source: with the survey.
        masks: positions of the masks that a study uses and that can be read.

    Raises:
        DataError: these are training pictures, or a whole domain.
    """
    survey = source.survey
    assert survey is not None
    per_split: dict[str | None, int] = defaultdict(int)
    per_domain: dict[str, int] = defaultdict(int)
    labelled = survey.labelled.tolist()
    for i in masks:
        sample = source.samples[i]
        # Pictures of OOD domains have no split of their own beside `train`.
        if sample.domain not in source.evaluation_domains:
            per_split[sample.split] += labelled[i]
        per_domain[sample.domain] += labelled[i]
    empty_domains = [domain for domain, count in per_domain.items() if not count]
    void = {split for split, count in per_split.items() if not count}
    if not sum(per_domain.values()) or void & {None, "train"}:
        raise DataError("Training needs labelled pixels, but all pixels of the training masks are ignored.")
    if void:
        keep = [
            i
            for i, sample in enumerate(source.samples)
            if sample.split not in void or sample.domain in source.evaluation_domains
        ]
        dropped = listed(sorted(str(split) for split in void))
        warning = (
            f"{counted(len(survey.sizes) - len(keep), 'picture')} of the split {dropped} left out: their masks have no "
            "labelled pixel."
        )
        source = _selected(source, keep, "its split has no labelled pixel")
        source = replace(source, warnings=[*source.warnings, warning])
    elif empty_domains:
        raise DataError(
            f"Every domain needs labelled pixels, but all of {first_few(empty_domains)} are ignored. Remove it, or "
            "name the domains to use in data.id and data.ood."
        )
    return source


def _selected(source: Source, keep: Sequence[int], reason: str) -> Source:
    """The source with some of its samples; the others are listed with a reason."""
    survey = source.survey
    assert survey is not None
    kept = set(keep)
    number = {position: i for i, position in enumerate(keep)}
    left_out = [SkippedEntry(s.name, reason) for i, s in enumerate(source.samples) if i not in kept]
    return replace(
        source,
        samples=[source.samples[i] for i in keep],
        ignored=sorted([*source.ignored, *left_out]),
        survey=replace(
            survey,
            sizes=survey.sizes[keep],
            pixels=survey.pixels[keep],
            digests=tuple(survey.digests[i] for i in keep),
            positions=tuple(survey.positions[i] for i in keep),
            unreadable={number[i]: reason for i, reason in survey.unreadable.items() if i in kept},
        ),
    )
