"""Assignment of samples to splits: ID and OOD domains, classes, train, validation and test.

Works on the scan alone, so that data are judged before any image is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import did_you_mean
from orchestrator.ingest.errors import DataError, first_few
from orchestrator.ingest.near_equal import ImageGroups
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import MaskSurvey, Sample, Source
from orchestrator.wording import counted
from trainables.data.splits import TEST, TRAIN, VAL, nested_order, stratified_split

Integers = NDArray[np.int64]

SPLIT_CODES = {"train": TRAIN, "val": VAL, "test": TEST}
PAIRS = "pictures with masks"
"""The only stratum of pictures with masks."""
UNUSED = -1
"""Label or domain of a sample that is not used; split code of one whose split is to be drawn."""


@dataclass(frozen=True)
class Assignment:
    """Splits, classes and domains of a store."""

    classes: list[str]
    id_domains: list[str]
    ood_domains: list[str]
    unused_domains: list[str]
    splits: dict[str, Integers]
    """Split → positions in `source.samples`, in the order of the store."""
    labels: Integers
    """Index into `classes` of each sample of the source; `UNUSED` = not used."""
    domain_ids: Integers
    """Index into `domains`; `UNUSED` = not used."""
    together: list[tuple[int, ...]] = field(default_factory=list)
    """Groups of equal and nearly equal images that the drawn splits do not divide, as positions."""
    across_domains: dict[int, int] = field(default_factory=dict)
    """Position → number of its group, for groups with images of several ID domains: a fold of leave-one-domain-out does
    not train on copies of what it is tested on."""

    @property
    def domains(self) -> list[str]:
        """The ID domains, then the OOD domains."""
        return [*self.id_domains, *self.ood_domains]

    @property
    def used(self) -> Integers:
        """Positions of all used samples, ascending."""
        return np.flatnonzero(self.labels >= 0)

    def has_rows_of(self, other: Assignment) -> bool:
        """Whether a store has the same rows under both, in the same order."""
        return (
            self.classes == other.classes
            and self.domains == other.domains
            and self.splits.keys() == other.splits.keys()
            and self.across_domains == other.across_domains
            and all(np.array_equal(rows, other.splits[name]) for name, rows in self.splits.items())
        )

    @property
    def split_of(self) -> dict[int, str]:
        """Position of each used sample → its split."""
        return {int(i): name for name, positions in self.splits.items() for i in positions}


def assign(
    source: Source, request: IngestRequest, bad: Collection[int] = (), groups: ImageGroups | None = None
) -> Assignment:
    """Assign domains, classes and splits.

    Splits of the source are kept; missing validation and test splits are drawn from its training split, by class, so
    that no group of equal or nearly equal images is divided. OOD domains are for evaluation only, whatever splits they
    have. Every split is stored in nested stratified order, so that any prefix of it is a stratified sample; a prefix
    may divide a group, because nothing is measured on the images beyond it.

    Args:
        source: the scan.
        request: domains, fractions and seed. No ID domains = all that are not OOD; no OOD domains = those that the
            source marks as such.
        bad: positions of unreadable samples, which are left out.
        groups: equal and nearly equal images; None = not known yet.

    Raises:
        DataError: domains unknown, empty or in both roles; no ID domain; fewer than two classes; a class that is never
            in training; a class too small for the splits.
    """
    samples = source.samples
    id_domains, ood_domains, unused_domains = _domain_roles(source, request.id, request.ood, bad)
    note = f" ({counted(len(bad), 'unreadable image')} left out)" if bad else ""

    domain_index = {name: i for i, name in enumerate([*id_domains, *ood_domains])}
    domain_ids = np.array([domain_index.get(s.domain, UNUSED) for s in samples], dtype=np.int64)
    # Before classes are collected: a class whose only images are unreadable is no class.
    domain_ids[list(bad)] = UNUSED
    id_positions = np.flatnonzero((domain_ids >= 0) & (domain_ids < len(id_domains)))
    ood_positions = np.flatnonzero(domain_ids >= len(id_domains))

    labels = np.full(len(samples), UNUSED, dtype=np.int64)
    if source.survey is None:
        classes = _classes(source, id_positions, ood_positions, id_domains, note)
        strata = classes
        class_index = {name: i for i, name in enumerate(classes)}
        for position in np.flatnonzero(domain_ids >= 0):
            labels[position] = class_index[samples[position].label]
    else:
        classes = _classes_of_masks(source, source.survey, id_positions, ood_positions, id_domains)
        # A picture has pixels of many classes: all pictures are one stratum.
        strata = [PAIRS]
        labels[domain_ids >= 0] = 0

    codes, together = _split_codes(samples, id_positions, labels, domain_ids, strata, request, groups, note)
    splits = {name: id_positions[codes == code] for name, code in SPLIT_CODES.items()}
    for domain in ood_domains:
        splits[f"ood/{domain}"] = np.flatnonzero(domain_ids == domain_index[domain])
    for name, positions in splits.items():
        splits[name] = positions[nested_order(labels[positions], domain_ids[positions], request.seed)]
    across = _groups_across_domains(groups, request, id_positions, domain_ids)
    return Assignment(classes, id_domains, ood_domains, unused_domains, splits, labels, domain_ids, together, across)


def _groups_across_domains(
    groups: ImageGroups | None, request: IngestRequest, id_positions: Integers, domain_ids: Integers
) -> dict[int, int]:
    """See `Assignment.across_domains`."""
    if groups is None or request.copies == "apart":
        return {}
    inside = _restricted(groups.together(request.copies == "near"), set(id_positions.tolist()))
    across = [group for group in inside if len({int(domain_ids[position]) for position in group}) > 1]
    return {position: number for number, group in enumerate(across) for position in group}


def _domain_roles(
    source: Source, requested_id: Collection[str], requested_ood: Collection[str], bad: Collection[int]
) -> tuple[list[str], list[str], list[str]]:
    """ID, OOD and unused domains; every ID and OOD domain has images."""
    listed = {sample.domain for sample in source.samples}
    domains = {*listed, *source.empty_domains}
    _check_domain_names("data.id", requested_id, sorted(domains))
    _check_domain_names("data.ood", requested_ood, sorted(domains))
    both = sorted({*requested_id} & {*requested_ood})
    if both:
        raise DataError(f"A domain is either ID or OOD, but {first_few(both)} stands in data.id and in data.ood.")

    ood_domains = sorted({*(requested_ood or source.evaluation_domains - {*requested_id})})
    id_domains = sorted(requested_id or domains - {*ood_domains} - source.evaluation_domains)
    if not id_domains:
        raise DataError(
            f"At least one domain must be ID, to train on, but all are OOD: {first_few(ood_domains)}. Take one out of "
            "data.ood."
        )
    readable = listed
    if bad:
        unreadable = set(bad)
        readable = {sample.domain for i, sample in enumerate(source.samples) if i not in unreadable}
    empty = [domain for domain in (*id_domains, *ood_domains) if domain not in readable]
    if empty:
        none = "no readable one" if bad else "none"
        raise DataError(
            f"Every domain needs images, but there is {none} in {first_few(empty)}. Add some, remove the folder, "
            "or name the domains to use in data.id and data.ood."
        )
    return id_domains, ood_domains, sorted(domains - {*id_domains} - {*ood_domains})


def _check_domain_names(key: str, requested: Collection[str], domains: Sequence[str]) -> None:
    for name in requested:
        if name not in domains:
            raise DataError(
                f"The domains of {key} must be among those of the data, but {name!r} is not."
                f"{did_you_mean(name, domains)} The domains are: {first_few(domains, 20)}."
            )


def _classes(
    source: Source, id_positions: Integers, ood_positions: Integers, id_domains: list[str], note: str
) -> list[str]:
    """Class names of the ID images, in the order of their labels."""
    samples = source.samples
    names = {samples[i].label for i in id_positions}
    ood_only = Counter((samples[i].label, samples[i].domain) for i in ood_positions if samples[i].label not in names)
    if ood_only:
        (label, domain), count = ood_only.most_common(1)[0]
        others = len({name for name, _ in ood_only} - {label})
        more = ""
        if others:
            more = f", and so {'does' if others == 1 else 'do'} {others} more"
        raise DataError(
            f"Every class must have ID images to learn from, but {label!r} occurs only in OOD domains "
            f"({counted(count, 'image')} in {domain}){more}{note}. Remove these images, or add the class to "
            f"{first_few(id_domains)}."
        )
    if len(names) < 2:
        only = first_few(sorted(names)) or "none"
        raise DataError(
            f"There must be at least two classes, but the ID images have only {only}{note}. Add "
            "images of another class, or more domains to data.id."
        )
    # The source's own order of classes (such as a data set's label numbers) is kept where it has one.
    in_source_order = [name for name in source.class_order or () if name in names]
    return in_source_order + _sorted_names(names - {*in_source_order})


def _classes_of_masks(
    source: Source, survey: MaskSurvey, id_positions: Integers, ood_positions: Integers, id_domains: list[str]
) -> list[str]:
    """Classes of the pixels; a declared class may be absent, a value that only OOD pictures have is an error."""
    classes = survey.classes
    inside = survey.pixels[id_positions].sum(axis=0)
    outside = survey.pixels[ood_positions].sum(axis=0)
    ood_only = np.flatnonzero((inside[:-1] == 0) & (outside[:-1] > 0))
    if len(ood_only) and not source.declared_labels:
        first = int(ood_only[0])
        raise DataError(
            f"Every class must have ID pixels to learn from, but the value {classes[first]} occurs only in OOD domains "
            f"({outside[first]:,} pixels). Add masks with it to {first_few(id_domains)}, ignore it (data.ignore), or "
            "declare the classes in data.labels."
        )
    if not inside[:-1].any():
        raise DataError(f"Training needs labelled pixels, but {first_few(id_domains)} have none.")
    return classes


def _sorted_names(names: Collection[str]) -> list[str]:
    """Names in ascending order, by value where all are numbers."""
    if all(name.isdecimal() for name in names):
        # By value: as text "10" would come before "2", and labels would not be the numbers.
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _split_codes(
    samples: Sequence[Sample],
    positions: Integers,
    labels: Integers,
    domain_ids: Integers,
    classes: list[str],
    request: IngestRequest,
    groups: ImageGroups | None,
    note: str,
) -> tuple[Integers, list[tuple[int, ...]]]:
    """`TRAIN`, `VAL` or `TEST` of each ID sample: the source's own split, else drawn.

    Returned with the groups that the drawing kept together.
    """
    codes = np.array([SPLIT_CODES.get(samples[i].split or "", UNUSED) for i in positions], dtype=np.int64)
    present = {int(code) for code in np.unique(codes)}
    if UNUSED in present and len(present) > 1:
        without = samples[positions[codes == UNUSED][0]].name
        raise DataError(
            f"Either all ID images belong to a split or none, but {without} does not while others do{note}."
        )
    if UNUSED not in present and TRAIN not in present:
        raise DataError(f"There must be training images, but the ID images only have other splits{note}.")
    val_fraction = 0.0 if VAL in present else request.val_fraction
    test_fraction = 0.0 if TEST in present else request.test_fraction
    purposes = []
    if val_fraction > 0:
        purposes.append("validation")
    if test_fraction > 0:
        purposes.append("testing")
    drawable = codes <= TRAIN  # training images and those without a split
    pool = positions[drawable]
    _check_class_sizes(labels[pool], classes, purposes, note)
    together: list[tuple[int, ...]] = []
    if groups is not None and request.copies != "apart" and purposes:
        together = _undivided(groups, pool, labels, classes, request.copies == "near", purposes, note)
    index = {position: i for i, position in enumerate(pool.tolist())}
    codes[drawable] = stratified_split(
        labels[pool],
        domain_ids[pool],
        val_fraction,
        test_fraction,
        request.seed,
        [[index[position] for position in group] for group in together],
    )
    return codes, together


def _undivided(
    groups: ImageGroups,
    pool: Integers,
    labels: Integers,
    classes: list[str],
    near: bool,
    purposes: list[str],
    note: str,
) -> list[tuple[int, ...]]:
    """Groups among the images that are drawn.

    A class that nearly equal images would leave with fewer groups than splits is divided by equal images alone.

    Raises:
        DataError: a class has fewer different pictures than splits.
    """
    inside = set(pool.tolist())
    equal = _restricted(groups.together(near=False), inside)
    _check_different(equal, pool, labels, classes, purposes, note)
    if not near:
        return equal
    loose = _restricted(groups.together(), inside)
    few = {
        label for label, count in _group_counts(loose, pool, labels, len(classes)).items() if count < 1 + len(purposes)
    }
    undivided = [group for group in loose if not few & {int(labels[position]) for position in group}]
    covered = {position for group in undivided for position in group}
    return sorted([*undivided, *(group for group in equal if group[0] not in covered)])


def _restricted(groups: Sequence[tuple[int, ...]], inside: Collection[int]) -> list[tuple[int, ...]]:
    """What groups have inside, where that is more than one image."""
    parts = [tuple(position for position in group if position in inside) for group in groups]
    return [part for part in parts if len(part) > 1]


def _group_counts(groups: Sequence[tuple[int, ...]], pool: Integers, labels: Integers, classes: int) -> dict[int, int]:
    """Class → groups with images of it, an image without copies being a group of its own."""
    counts = Counter(dict(enumerate(np.bincount(labels[pool], minlength=classes).tolist())))
    for group in groups:
        for label, images in Counter(int(labels[position]) for position in group).items():
            counts[label] -= images - 1
    return dict(counts)


def _check_different(
    equal: Sequence[tuple[int, ...]],
    pool: Integers,
    labels: Integers,
    classes: list[str],
    purposes: list[str],
    note: str,
) -> None:
    """Raise DataError where a class has fewer different pictures than splits."""
    needed = 1 + len(purposes)
    counts = _group_counts(equal, pool, labels, len(classes))
    small = [label for label, count in counts.items() if count < needed]
    if not small:
        return
    if classes == [PAIRS]:
        raise DataError(
            f"There must be at least {counted(needed, 'different ID picture')}, because equal ones stay in one split, "
            f"but there {'is' if counts[small[0]] == 1 else 'are'} {counts[small[0]]}{note}. Add pictures, or give the "
            "splits yourself as folders train, val and test."
        )
    listed = first_few([f"{classes[label]} has {counts[label]}" for label in small])
    raise DataError(
        f"Every class needs at least {counted(needed, 'different ID training image')}, because equal ones stay in one "
        f"split, but {listed}{note}. Add images, remove the class, or give the splits yourself as folders "
        "train, val and test."
    )


def _check_class_sizes(labels: Integers, classes: list[str], purposes: list[str], note: str) -> None:
    """Raise DataError unless every class has enough images.

    One for training and one for each split that is drawn from it.
    """
    counts = np.bincount(labels, minlength=len(classes))
    needed = 1 + len(purposes)
    small = np.flatnonzero(counts < needed)
    if not len(small):
        return
    if classes == [PAIRS]:
        raise DataError(
            f"There must be at least {counted(needed, 'ID picture')} with masks, one for every split, but there "
            f"{'is' if counts[0] == 1 else 'are'} {counts[0]}{note}. Add pictures."
        )
    listed = first_few([f"{classes[i]} has {counts[i]}" for i in small])
    uses = "to learn from"
    if purposes:
        uses = " and ".join(["one for training", *(f"one for {purpose}" for purpose in purposes)])
    hint = ""
    if len(small) > max(10, len(classes) // 2):
        hint = " That many tiny classes look like an identifier or a measured value, not like classes."
    raise DataError(
        f"Every class needs at least {counted(needed, 'ID training image')}, {uses}, but {listed}{note}. "
        f"Add images, or remove the class.{hint}"
    )
