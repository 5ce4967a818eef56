"""Equal and nearly equal images: what is found, what must not be merged, and what splits do with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance

from orchestrator.ingest.check import check
from orchestrator.ingest.errors import DataError
from orchestrator.ingest.images import pixels_digest, thumbnail
from orchestrator.ingest.near_equal import (
    MAX_GROUP,
    ImageGroups,
    candidate_pairs,
    connected,
    group_images,
    perceptual_hashes,
)
from orchestrator.ingest.source import Outcome
from tests.orchestrator.ingest.pictures import read
from tests.support.albums import album, as_jpeg, scene, split_of
from trainables.data.store import DATA
from trainables.data.trial_data import select_samples
from trainables.demo.digits import handwritten_digits, printed_digits
from trainables.specs.metrics import HELD_OUT
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec


def cropped(image: Image.Image, share: float = 0.04) -> Image.Image:
    """Without this share of each axis, all of it at the left and at the top."""
    return image.crop((round(image.width * share), round(image.height * share), image.width, image.height))


VARIANTS = {
    "jpeg 90": lambda image: as_jpeg(image, 90),
    "jpeg 40": lambda image: as_jpeg(image, 40),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "cropped": cropped,
    "cropped, smaller and jpeg": lambda image: as_jpeg(cropped(image).resize((70, 70)), 70),
}


def outcome(image: Image.Image) -> Outcome:
    return Outcome(None, image.tobytes(), pixels_digest(image), *image.size, "PNG", (), thumbnail(image))


def groups_of(images: list[Image.Image]) -> ImageGroups:
    return group_images({position: outcome(image) for position, image in enumerate(images)})


class TestFound:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_one_picture_saved_in_two_ways(self, name: str) -> None:
        originals = [scene(number) for number in range(40)]
        groups = groups_of([*originals, *map(VARIANTS[name], originals[:10])])
        expected = {(number, 40 + number) for number in range(10)}
        assert set(groups.near) <= expected
        # Of crops about four in five are found (benchmarks/near_equal.py), of the others all.
        assert len(groups.near) >= (7 if "cropped" in name else 10)
        assert groups.equal == ()

    def test_equal_copies_belong_to_the_group_of_their_picture(self) -> None:
        images = [scene(number) for number in range(20)]
        groups = groups_of([*images, images[3].copy(), as_jpeg(images[3], 80), images[5].copy()])
        assert groups.equal == ((3, 20), (5, 22))
        assert groups.near == ((3, 20, 21),)
        assert groups.together() == [(3, 20, 21), (5, 22)]
        assert groups.together(near=False) == [(3, 20), (5, 22)]

    def test_the_order_of_files_changes_nothing(self) -> None:
        images = [scene(number) for number in range(30)]
        images += [as_jpeg(image, 60) for image in images[:12]]
        outcomes = [outcome(image) for image in images]
        expected = group_images(dict(enumerate(outcomes)))
        shuffled = np.random.default_rng(0).permutation(len(outcomes)).tolist()
        assert group_images({position: outcomes[position] for position in shuffled}) == expected


class TestNotMerged:
    def test_different_scenes(self) -> None:
        assert groups_of([scene(number) for number in range(200)]) == ImageGroups()

    def test_handwritten_and_printed_digits_do_not_chain(self) -> None:
        """1,797 and 1,000 digits, which resemble each other by nature: at most one pair in a hundred images."""
        for images in (handwritten_digits()[0], printed_digits(100, 0)[0]):
            groups = groups_of([Image.fromarray(image) for image in images])
            different = [group for group in groups.near if len(group) > 1]
            assert sum(map(len, different)) <= len(images) // 50
            assert max(map(len, different), default=0) <= 4
            assert groups.crowded == 0

    def test_icons_of_one_shape_in_several_colours(self) -> None:
        shape = np.asarray(scene(1).convert("L")) > 128
        colours = [(200, 30, 30), (30, 160, 30), (40, 60, 220), (220, 180, 20), (120, 20, 150)]
        icons = [np.where(shape[..., None], np.uint8(255), np.uint8(colour)) for colour in colours]
        assert groups_of([Image.fromarray(icon.astype(np.uint8)) for icon in icons]) == ImageGroups()

    def test_pictures_without_contrast(self) -> None:
        levels = np.random.default_rng(0).integers(118, 122, (20, 32, 32, 3), dtype=np.uint8)
        assert groups_of([Image.fromarray(level) for level in levels]) == ImageGroups()

    def test_a_cloud_is_taken_apart_and_counted(self) -> None:
        groups, crowded = connected(100, [(row, row + 1) for row in range(MAX_GROUP)])
        assert groups == []
        assert crowded == list(range(MAX_GROUP + 1))


class TestCandidates:
    def test_the_hash_is_phash(self) -> None:
        """A bit per low coefficient of scipy's cosine transform that exceeds their median, DC included."""
        from scipy.fft import dctn

        pictures = np.stack([np.frombuffer(thumbnail(scene(number)), np.uint8) for number in range(8)])
        hashes, _ = perceptual_hashes(pictures)
        for value, picture in zip(hashes, pictures, strict=True):
            low = dctn(picture[:1024].reshape(32, 32).astype(float))[:8, :8].ravel()
            bits = "".join("1" if bit else "0" for bit in low > np.median(low))
            assert f"{value:064b}" == bits

    def test_comparisons_are_linear_in_the_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compared = []
        count_bits = np.bitwise_count

        def counting(values: np.ndarray) -> np.ndarray:
            compared.append(len(values))
            return np.asarray(count_bits(values))

        monkeypatch.setattr(np, "bitwise_count", counting)
        per_image = []
        for count in (2000, 4000):
            compared.clear()
            hashes = np.random.default_rng(0).integers(0, 2**63, count).astype(np.uint64)
            candidate_pairs(hashes, np.zeros((count, 64), np.float32))
            per_image.append(sum(compared) / count)
        assert per_image[1] == pytest.approx(per_image[0], rel=0.02)

    def test_near_hashes_are_found_among_many(self) -> None:
        """400 pairs that differ in up to ten bits, among 20,000 random hashes: at least 98 % are candidates."""
        generator = np.random.default_rng(0)
        hashes = generator.integers(0, 2**63, 20_000).astype(np.uint64)
        for row in range(0, 800, 2):
            flipped = generator.choice(63, int(generator.integers(1, 11)), replace=False)
            hashes[row + 1] = hashes[row] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
        pairs = set(zip(*candidate_pairs(hashes, np.zeros((len(hashes), 64), np.float32)), strict=True))
        assert sum((row, row + 1) in pairs for row in range(0, 800, 2)) >= 392


class TestStore:
    def test_versions_of_a_picture_lie_in_one_split(self, tmp_path: Path) -> None:
        root = album(tmp_path / "album")
        for seed in range(3):
            store = read(root, tmp_path / "stores", seed=seed)
            splits = split_of(store)
            for name in ("cat", "dog"):
                for number in range(5):
                    versions = (f"{number:03d}.png", f"again-{number:03d}.jpg", f"copy-{number:03d}.png")
                    assert len({splits[f"{name}/{version}"] for version in versions}) == 1
            # 30 images of each class: round(30 · 0.15) for validation and for the test.
            assert store.manifest["class_counts"]["val"] == {"cat": 4, "dog": 4}
            assert store.manifest["class_counts"]["test"] == {"cat": 4, "dog": 4}
            assert store.manifest["kept_together"] == {"groups": 10, "images": 30, "near_groups": 10, "near_images": 30}
            assert store.manifest["duplicates"]["leaks"] == store.manifest["duplicates"]["near_leaks"] == []

    def test_the_pixels_stay_with_their_names(self, tmp_path: Path) -> None:
        """Rows move once the groups are known; each keeps its image."""
        root = album(tmp_path / "album")
        store = read(root, tmp_path / "stores")
        other = read(root, tmp_path / "stores", copies="apart")
        assert split_of(store) != split_of(other)
        pixels = {n: p.tobytes() for s in other.splits for n, p in zip(other.names(s), other.images(s), strict=True)}
        for split in store.splits:
            for name, image, label in zip(store.names(split), store.images(split), store.labels(split), strict=True):
                assert image.tobytes() == pixels[name]
                assert store.classes[label] == name.split("/")[0]

    def test_equal_alone(self, tmp_path: Path) -> None:
        store = read(album(tmp_path / "album"), tmp_path / "stores", copies="equal")
        splits = split_of(store)
        assert all(splits[f"cat/{i:03d}.png"] == splits[f"cat/copy-{i:03d}.png"] for i in range(5))
        assert store.manifest["kept_together"] == {"groups": 10, "images": 20, "near_groups": 0, "near_images": 0}

    def test_without_copies_the_splits_are_those_of_single_images(self, tmp_path: Path) -> None:
        root = album(tmp_path / "album", copies=0)
        digests = {read(root, tmp_path / "stores", copies=copies).digest for copies in ("near", "equal", "apart")}
        assert len(digests) == 1

    def test_a_class_of_one_picture_is_refused(self, tmp_path: Path) -> None:
        root = album(tmp_path / "album", copies=0)
        (root / "elk").mkdir()
        for number in range(6):
            scene(7).save(root / "elk" / f"{number}.png")
        with pytest.raises(DataError) as error:
            read(root, tmp_path / "stores")
        assert str(error.value) == (
            "Every class needs at least 3 different ID training images, because equal ones stay in one split, but elk "
            "has 1. Add images, remove the class, or give the splits yourself as folders train, val and test."
        )

    def test_a_class_of_one_picture_in_several_versions_is_divided(self, tmp_path: Path) -> None:
        """A threshold decides what is nearly equal: it may cost a warning, not the study."""
        root = album(tmp_path / "album", copies=0)
        (root / "elk").mkdir()
        for quality in (95, 85, 75, 65, 55, 45):
            scene(7).save(root / "elk" / f"{quality}.jpg", quality=quality)
        store = read(root, tmp_path / "stores")
        assert store.manifest["class_counts"]["test"]["elk"] == 1
        assert store.manifest["duplicates"]["near_leaks_groups"] == 1

    def test_splits_of_the_source_stay_and_are_warned_about(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = tmp_path / "album"
        for split, first in (("train", 0), ("val", 20), ("test", 30)):
            for index, name in enumerate(("cat", "dog")):
                (root / split / name).mkdir(parents=True)
                for number in range(first, first + 10):
                    scene(1000 * index + number).save(root / split / name / f"{number}.png")
        as_jpeg(scene(3), 70).save(root / "test" / "cat" / "again.jpg")
        store = read(root, tmp_path / "stores", on_leak="fail")
        assert split_of(store)["test/cat/again.jpg"] == "test"
        assert store.manifest["duplicates"]["leaks"] == []
        assert (
            "1 group of nearly equal images in more than one of training, validation and what is measured, which may "
            "flatter the numbers: test/cat/again.jpg (test) = train/cat/3.png (train) (nearly equal). Where they are "
            "one picture, remove the copies; data.on_leak: fail does not refuse them, because a threshold decides."
        ) in [record.getMessage() for record in caplog.records]
        report = check(root, workers=1, fail_on_leak=True)
        assert report.problems == []
        assert report.duplicates["near_leaks_groups"] == 1

    def test_the_report_counts_what_is_kept_together(self, tmp_path: Path) -> None:
        report = check(album(tmp_path / "album"), workers=1)
        assert report.to_dict()["kept_together"] == {"groups": 10, "images": 30, "near_groups": 10, "near_images": 30}


class TestFolds:
    def test_a_fold_does_not_train_on_copies_of_its_held_out_images(self, tmp_path: Path) -> None:
        root = tmp_path / "album"
        for domain, first in (("photo", 0), ("sketch", 100)):
            for index, name in enumerate(("cat", "dog")):
                (root / domain / name).mkdir(parents=True)
                for number in range(first, first + 14):
                    scene(1000 * index + number).save(root / domain / name / f"{number}.png")
        # Two pictures of the photos lie among the sketches: one as it is, one saved again.
        shutil.copy(root / "photo/cat/3.png", root / "sketch/cat/copy.png")
        as_jpeg(scene(1005), 70).save(root / "sketch/dog/again.jpg")
        store = read(root, tmp_path / "stores")
        assert store.manifest["kept_together"]["groups"] == 2
        originals = {"photo/cat/3.png", "photo/dog/5.png"}
        copies = {"sketch/cat/copy.png", "sketch/dog/again.jpg"}
        for held_out, tested, left_out in (("photo", originals, copies), ("sketch", copies, originals)):
            spec = TrialSpec(
                shared=SharedTrialSettings(store="", model=ModelSpec(name="resnet18")),
                strategy="full",
                role="fold",
                held_out=held_out,
            )
            parts = select_samples(spec, store)
            names = {
                split: {store.names(source)[i] for source, indices in parts[split] for i in indices.tolist()}
                for split in ("train", "val", HELD_OUT)
            }
            splits = split_of(store)
            assert tested & names[HELD_OUT] == {name for name in tested if splits[name] != "test"}
            dropped = {name for name in left_out if splits[name] != "test"}
            assert dropped
            assert not dropped & (names["train"] | names["val"])
            expected = sum(splits[name] != "test" and not name.startswith(held_out) for name in splits)
            assert len(names["train"] | names["val"]) == expected - len(dropped)

    def test_stores_without_such_images_have_no_column(self, tmp_path: Path) -> None:
        store = read(album(tmp_path / "album"), tmp_path / "stores")
        assert (store.groups("train") == -1).all()
        with pa.memory_map(str(store.path / DATA)) as file:
            assert pa.ipc.open_file(file).schema.names == ["image", "label", "domain", "name"]
