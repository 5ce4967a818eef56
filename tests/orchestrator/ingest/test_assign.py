"""Assignment of domains, classes and splits; every refusal in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from orchestrator.ingest.assign import Assignment, assign
from orchestrator.ingest.errors import DataError
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import Sample, Source


@dataclass
class Listed(Source):
    """A source without images."""


def source(counts: dict[tuple[str, str], int], split: str | None = None, **fields: Any) -> Listed:
    """Samples by (domain, class)."""
    samples = [
        Sample(f"{domain}/{label}/{i}", label, domain, split, None)
        for (domain, label), count in counts.items()
        for i in range(count)
    ]
    return Listed(kind="folder", layout="", samples=samples, digest="", **fields)


def plan(listed: Source, bad: tuple[int, ...] = (), **fields: Any) -> Assignment:
    return assign(listed, IngestRequest(source="folder", root="x", **fields), bad)


def refusal(listed: Source, bad: tuple[int, ...] = (), **fields: Any) -> str:
    with pytest.raises(DataError) as error:
        plan(listed, bad, **fields)
    return str(error.value)


TWO = {("photo", "cat"): 20, ("photo", "dog"): 20, ("art", "cat"): 10, ("art", "dog"): 10}


class TestRoles:
    def test_without_names_every_domain_is_id(self) -> None:
        assignment = plan(source(TWO))
        assert (assignment.id_domains, assignment.ood_domains, assignment.domains) == (
            ["art", "photo"],
            [],
            ["art", "photo"],
        )
        assert {name: len(rows) for name, rows in assignment.splits.items()} == {"train": 44, "val": 8, "test": 8}

    def test_what_is_not_ood_is_id(self) -> None:
        assignment = plan(source(TWO), ood=("art",))
        assert assignment.domains == ["photo", "art"]
        assert list(assignment.splits) == ["train", "val", "test", "ood/art"]
        assert len(assignment.splits["ood/art"]) == 20

    def test_domains_that_are_not_named_are_not_used(self) -> None:
        assignment = plan(source({**TWO, ("clay", "cat"): 9}), id=("photo",), ood=("art",))
        assert assignment.unused_domains == ["clay"]
        assert len(assignment.used) == 60

    def test_the_source_may_say_itself_what_is_ood(self) -> None:
        assignment = plan(source(TWO, evaluation_domains=frozenset({"art"})))
        assert (assignment.id_domains, assignment.ood_domains) == (["photo"], ["art"])

    def test_ood_images_are_wholly_for_evaluation_even_with_a_split(self) -> None:
        assignment = plan(source(TWO, split="train"), ood=("art",))
        assert len(assignment.splits["ood/art"]) == 20

    def test_unknown(self) -> None:
        assert refusal(source(TWO), ood=("arts",)) == (
            "The domains of data.ood must be among those of the data, but 'arts' is not. Did you mean 'art'? "
            "The domains are: art, photo."
        )

    def test_in_both_roles(self) -> None:
        assert refusal(source(TWO), id=("art", "photo"), ood=("art",)) == (
            "A domain is either ID or OOD, but art stands in data.id and in data.ood."
        )

    def test_none_is_id(self) -> None:
        assert refusal(source(TWO), ood=("art", "photo")) == (
            "At least one domain must be ID, to train on, but all are OOD: art, photo. Take one out of data.ood."
        )

    def test_empty_domain(self) -> None:
        text = (
            "Every domain needs images, but there is none in clay. Add some, remove the folder, or name the domains "
            "to use in data.id and data.ood."
        )
        listed = source(TWO, empty_domains=("clay",))
        assert refusal(listed) == text
        assert refusal(listed, id=("photo",), ood=("clay",)) == text
        assert plan(listed, id=("photo",), ood=("art",)).unused_domains == ["clay"]

    def test_a_domain_of_unreadable_images(self) -> None:
        listed = source({("photo", "cat"): 9, ("photo", "dog"): 9, ("art", "cat"): 2})
        assert refusal(listed, bad=(18, 19), ood=("art",)).startswith(
            "Every domain needs images, but there is no readable one in art."
        )


class TestClasses:
    def test_d18_a_class_may_be_missing_in_an_ood_domain(self) -> None:
        assignment = plan(source({**TWO, ("clay", "dog"): 3}), ood=("clay", "art"))
        assert assignment.labels[assignment.splits["ood/clay"]].tolist() == [1, 1, 1]
        assert assignment.classes == ["cat", "dog"]

    def test_d19_a_class_only_in_ood(self) -> None:
        assert refusal(source({**TWO, ("art", "fox"): 3}), ood=("art",)) == (
            "Every class must have ID images to learn from, but 'fox' occurs only in OOD domains (3 images in art). "
            "Remove these images, or add the class to photo."
        )
        many = {**TWO, ("art", "fox"): 3, ("art", "gnu"): 1, ("art", "hen"): 1}
        assert "'fox' occurs only in OOD domains (3 images in art), and so do 2 more." in refusal(
            source(many), ood=("art",)
        )

    def test_d19_a_class_only_in_the_given_test_split(self) -> None:
        listed = source({("id", "cat"): 9, ("id", "dog"): 9}, split="train")
        listed.samples += [Sample(f"t{i}", "fox", "id", "test", None) for i in range(3)]
        assert refusal(listed) == (
            "Every class needs at least 2 ID training images, one for training and one for validation, but fox has 0. "
            "Add images, or remove the class."
        )

    def test_d17_a_class_of_one_image(self) -> None:
        assert refusal(source({("id", "cat"): 9, ("id", "dog"): 1})) == (
            "Every class needs at least 3 ID training images, one for training and one for validation and one for "
            "testing, but dog has 1. Add images, or remove the class."
        )

    def test_unreadable_images_are_mentioned_where_they_are_the_cause(self) -> None:
        assert refusal(source({("id", "cat"): 9, ("id", "dog"): 4}), bad=(9, 10)) == (
            "Every class needs at least 3 ID training images, one for training and one for validation and one for "
            "testing, but dog has 2 (2 unreadable images left out). Add images, or remove the class."
        )

    def test_d24_a_column_of_identifiers(self) -> None:
        text = refusal(source({("id", str(i)): 1 for i in range(50)}))
        assert text.endswith("That many tiny classes look like an identifier or a measured value, not like classes.")

    def test_one_class(self) -> None:
        assert refusal(source({("id", "cat"): 9})) == (
            "There must be at least two classes, but the ID images have only cat. Add images of another class, or more "
            "domains to data.id."
        )

    def test_names_that_are_numbers_are_sorted_as_such_and_the_source_may_have_an_order(self) -> None:
        numbers = {("id", str(i)): 3 for i in (10, 9, 2)}
        assert plan(source(numbers)).classes == ["2", "9", "10"]
        assert plan(source(numbers, class_order=["9", "7", "2"])).classes == ["9", "2", "10"]


class TestSplits:
    def test_given_splits_are_kept_and_what_is_missing_is_cut_from_training(self) -> None:
        listed = source({("id", "cat"): 20, ("id", "dog"): 20}, split="train")
        tests = range(len(listed.samples), len(listed.samples) + 6)
        listed.samples += [Sample(f"t{i}", "cat", "id", "test", None) for i in tests]
        assignment = plan(listed, val_fraction=0.1)
        assert sorted(assignment.splits["test"]) == list(tests)
        assert {name: len(rows) for name, rows in assignment.splits.items()} == {"train": 36, "val": 4, "test": 6}

    def test_every_sample_is_in_one_place_and_labels_are_right(self) -> None:
        listed = source(TWO)
        assignment = plan(listed, ood=("art",))
        rows = np.concatenate(list(assignment.splits.values()))
        assert sorted(rows) == list(range(60))
        for i in rows:
            assert assignment.classes[assignment.labels[i]] == listed.samples[i].label
            assert assignment.domains[assignment.domain_ids[i]] == listed.samples[i].domain

    def test_training_is_in_nested_order(self) -> None:
        assignment = plan(source({("id", "cat"): 40, ("id", "dog"): 20}))
        labels = assignment.labels[assignment.splits["train"]]
        assert np.bincount(labels[: round(len(labels) / 2)]).tolist() == [14, 7]

    def test_the_seed_decides(self) -> None:
        first, again, other = (plan(source(TWO), seed=seed).splits["train"].tolist() for seed in (0, 0, 1))
        assert first == again != other

    def test_some_with_and_some_without_a_split(self) -> None:
        listed = source({("id", "cat"): 9, ("id", "dog"): 9}, split="train")
        listed.samples.append(Sample("loose.png", "cat", "id", None, None))
        assert refusal(listed) == (
            "Either all ID images belong to a split or none, but loose.png does not while others do."
        )

    def test_no_training_images(self) -> None:
        assert refusal(source({("id", "cat"): 9, ("id", "dog"): 9}, split="test")) == (
            "There must be training images, but the ID images only have other splits."
        )
