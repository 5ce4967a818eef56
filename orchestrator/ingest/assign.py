"""From a list of samples to the splits of a store: which domains are ID and OOD, the classes, who goes where.

Nothing is read here, so that a study's data are judged in the time it takes to list them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.ingest.errors import DataError, counted, did_you_mean, few
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import Sample, Source
from trainables.data.splits import TEST, TRAIN, VAL, nested_order, stratified_split

Integers = NDArray[np.int64]
PARTS = {"train": TRAIN, "val": VAL, "test": TEST}


@dataclass(frozen=True)
class Assignment:
    """Where every used sample goes."""

    classes: list[str]
    id_domains: list[str]
    ood_domains: list[str]
    unused_domains: list[str]
    splits: dict[str, Integers]
    """Split → positions in `source.samples`, in the order of the store."""
    labels: Integers
    """Index into `classes` of each sample of the source; -1 = not used."""
    domain_ids: Integers
    """Index into `domains`; -1 = not used."""

    @property
    def domains(self) -> list[str]:
        """The ID domains, then the OOD domains."""
        return [*self.id_domains, *self.ood_domains]

    @property
    def used(self) -> Integers:
        """Positions of all used samples, rising."""
        return np.flatnonzero(self.labels >= 0)


def assign(source: Source, request: IngestRequest, bad: Collection[int] = ()) -> Assignment:
    """Decide on domains, classes and splits.

    The splits that the source gives are kept; what it lacks of validation and test is cut from its training part, by
    class. OOD domains are wholly for evaluation, whatever splits they have. Every split is stored in nested stratified
    order, so that any prefix of it is a stratified sample.

    Args:
        request: domains, fractions and seed. No ID domains = all that are not OOD; no OOD domains = those that the
            source marks as such.
        bad: positions of unreadable samples, which are left out.

    Raises:
        DataError: domains unknown, empty or in both roles; no ID domain; fewer than two classes; a class that is never
            in training; a class too small for the splits.
    """
    samples = source.samples
    inside, outside, unused = _roles(source, request.id, request.ood, bad)
    note = f" ({counted(len(bad), 'unreadable image')} left out)" if bad else ""
    numbers = {name: i for i, name in enumerate([*inside, *outside])}
    domain_ids = np.array([numbers.get(s.domain, -1) for s in samples], dtype=np.int64)
    domain_ids[list(bad)] = -1
    members = np.flatnonzero((domain_ids >= 0) & (domain_ids < len(inside)))
    classes = _classes(source, members, np.flatnonzero(domain_ids >= len(inside)), inside, note)
    indices = {name: i for i, name in enumerate(classes)}
    labels = np.full(len(samples), -1, dtype=np.int64)
    for position in np.flatnonzero(domain_ids >= 0):
        labels[position] = indices[samples[position].label]
    codes = _split_codes(samples, members, labels, domain_ids, classes, request, note)
    splits = {name: members[codes == code] for name, code in PARTS.items()}
    for domain in outside:
        splits[f"ood/{domain}"] = np.flatnonzero(domain_ids == numbers[domain])
    for name, rows in splits.items():
        splits[name] = rows[nested_order(labels[rows], domain_ids[rows], request.seed)]
    return Assignment(classes, inside, outside, unused, splits, labels, domain_ids)


def _roles(
    source: Source, id_domains: Collection[str], ood_domains: Collection[str], bad: Collection[int]
) -> tuple[list[str], list[str], list[str]]:
    """ID, OOD and unused domains; each used one has images."""
    listed = sorted({s.domain for s in source.samples})
    known = sorted({*listed, *source.empty_domains})
    for key, names in (("data.id", id_domains), ("data.ood", ood_domains)):
        for name in names:
            if name not in known:
                raise DataError(
                    f"The domains of {key} must be among those of the data, but {name!r} is not."
                    f"{did_you_mean(name, known)} The domains are: {few(known, 20)}."
                )
    both = sorted({*id_domains} & {*ood_domains})
    if both:
        raise DataError(f"A domain is either ID or OOD, but {few(both)} stands in data.id and in data.ood.")
    outside = sorted({*(ood_domains or source.evaluation_domains - {*id_domains})})
    inside = sorted(id_domains or {*known} - {*outside} - source.evaluation_domains)
    if not inside:
        raise DataError(
            f"At least one domain must be ID, to train on, but all are OOD: {few(outside)}. Take one out of data.ood."
        )
    bad = set(bad)
    filled = {s.domain for i, s in enumerate(source.samples) if i not in bad} if bad else set(listed)
    empty = [d for d in (*inside, *outside) if d not in filled]
    if empty:
        none = "no readable one" if bad else "none"
        raise DataError(
            f"Every domain needs images, but there is {none} in {few(empty)}. Add some, remove the folder, "
            "or name the domains to use in data.id and data.ood."
        )
    return inside, outside, sorted({*known} - {*inside} - {*outside})


def _classes(source: Source, inner: Integers, outer: Integers, inside: list[str], note: str) -> list[str]:
    samples = source.samples
    learnt = {samples[i].label for i in inner}
    stray = Counter((samples[i].label, samples[i].domain) for i in outer if samples[i].label not in learnt)
    if stray:
        (label, domain), number = stray.most_common(1)[0]
        others = len({name for name, _ in stray} - {label})
        more = f", and so {'does' if others == 1 else 'do'} {others} more" if others else ""
        raise DataError(
            f"Every class must have ID images to learn from, but {label!r} occurs only in OOD domains "
            f"({counted(number, 'image')} in {domain}){more}{note}. Remove these images, or add the class to "
            f"{few(inside)}."
        )
    if len(learnt) < 2:
        only = few(sorted(learnt)) or "none"
        raise DataError(
            f"There must be at least two classes, but the ID images have only {only}{note}. Add "
            "images of another class, or more domains to data.id."
        )
    order = [name for name in source.class_order or () if name in learnt]
    return order + _by_name(learnt - {*order})


def _by_name(names: Collection[str]) -> list[str]:
    """Sorted, as numbers where all of them are."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _split_codes(
    samples: Sequence[Sample],
    members: Integers,
    labels: Integers,
    domain_ids: Integers,
    classes: list[str],
    request: IngestRequest,
    note: str,
) -> Integers:
    """`TRAIN`, `VAL` or `TEST` of each ID sample: as the source says, else drawn."""
    codes = np.array([PARTS.get(samples[i].split or "", -1) for i in members], dtype=np.int64)
    present = {int(code) for code in np.unique(codes)}
    if -1 in present and len(present) > 1:
        without = samples[members[codes == -1][0]].name
        raise DataError(
            f"Either all ID images belong to a split or none, but {without} does not while others do{note}."
        )
    if -1 not in present and TRAIN not in present:
        raise DataError(f"There must be training images, but the ID images only have other splits{note}.")
    free = codes <= TRAIN
    pool = members[free]
    val = 0.0 if VAL in present else request.val_fraction
    test = 0.0 if TEST in present else request.test_fraction
    _check_sizes(labels[pool], classes, ["validation"] * (val > 0) + ["testing"] * (test > 0), note)
    codes[free] = stratified_split(labels[pool], domain_ids[pool], val, test, request.seed)
    return codes


def _check_sizes(labels: Integers, classes: list[str], cut: list[str], note: str) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    needed = 1 + len(cut)
    small = np.flatnonzero(counts < needed)
    if not len(small):
        return
    listed = few([f"{classes[i]} has {counts[i]}" for i in small])
    purpose = " and ".join(["one for training", *(f"one for {name}" for name in cut)]) if cut else "to learn from"
    hint = ""
    if len(small) > max(10, len(classes) // 2):
        hint = " That many tiny classes look like an identifier or a measured value, not like classes."
    raise DataError(
        f"Every class needs at least {counted(needed, 'ID training image')}, {purpose}, but {listed}{note}. "
        f"Add images, or remove the class.{hint}"
    )
