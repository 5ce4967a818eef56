"""`luthier data check` of pictures with masks: layouts, pixel counts, problems, as text, as JSON and from Python."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.commands.exit_status import OK, PREFLIGHT, USAGE
from orchestrator.ingest.check import DataReport, check
from orchestrator.ingest.errors import DataError
from orchestrator.ingest.label_map import mask_request
from tests.support.masked import (
    VOID,
    boxes,
    painted,
    palette_image,
    photo,
    save,
    write_cityscapes,
    write_colours,
    write_domains,
    write_lists,
    write_names,
    write_pairs,
    write_sizes,
    write_voc,
    write_voids,
)


def report(root: Path, labels: Any = None, ignore: Any = None) -> DataReport:
    masks = None if labels is None and ignore is None else mask_request(labels, ignore)
    return check(root, workers=1, masks=masks)


def pixels(made: DataReport, split: str = "all", domain: str = "id") -> dict[str, int]:
    """Class → pixels; the classes that occur, and the ignored pixels."""
    assert made.problems == []
    assert made.masks is not None
    counts = made.masks.pixels[split][domain]
    return {name: count for name, count in counts["classes"].items() if count} | {"ignored": counts["ignored"]}


def remarks(made: DataReport) -> list[str]:
    assert made.masks is not None
    return made.masks.remarks


def problem(root: Path, labels: Any = None) -> str:
    made = report(root, labels)
    assert made.masks is None
    (text,) = made.problems
    return text


def text_of(made: DataReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    made.render(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def command(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["data", "check", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


class TestVoc:
    """M01: the index is the label, lists decide about splits."""

    @pytest.mark.parametrize("palette", [True, False])
    def test_m01_counts(self, tmp_path: Path, palette: bool) -> None:
        made = report(write_voc(tmp_path, palette))
        assert made.task == "segmentation"
        assert made.classes == ["0", "1", "15"]
        assert made.splits == {"train": 6, "val": 3}
        assert pixels(made, "train") == {"0": 9576, "1": 768, "15": 768, "ignored": 408}
        assert pixels(made, "val") == {"0": 4788, "1": 512, "15": 256, "ignored": 204}
        assert {
            "trainval.txt is the union of other lists, and no split.",
            "4 pictures in no list are not used.",
        } <= set(remarks(made))
        assert "SegmentationObject, which numbers objects, is not read." in remarks(made)
        reasons = [entry["reason"] for entry in made.ignored]
        assert reasons.count("in no list") == 4
        assert reasons.count("numbers of objects (SegmentationObject), not classes") == 9

    def test_m01_folders_above(self, tmp_path: Path) -> None:
        write_voc(tmp_path / "VOCdevkit" / "VOC2012")
        made = report(tmp_path)
        assert pixels(made, "train") == {"0": 9576, "1": 768, "15": 768, "ignored": 408}

    def test_m01_a_list_of_nothing_else_and_files_without_partners(self, tmp_path: Path) -> None:
        write_voc(tmp_path)
        write_lists(tmp_path, {"train": range(6), "val": range(6, 10)}, "2007_{:06d}")
        with pytest.raises(DataError, match=r"'2007_000009.jpg' has no mask"):
            report(tmp_path)
        write_lists(tmp_path, {"val": [6, 99]}, "2007_{:06d}")
        with pytest.raises(DataError, match=r"1 name has none: '2007_000099' \(val.txt\)"):
            report(tmp_path)
        write_lists(tmp_path, {"val": [0, 6]}, "2007_{:06d}")
        with pytest.raises(DataError, match=r"'2007_000000' in train and val"):
            report(tmp_path)

    def test_m01_a_published_test_list_without_masks_and_other_writings_of_lists(self, tmp_path: Path) -> None:
        write_voc(tmp_path)
        folder = tmp_path / "ImageSets" / "Segmentation"
        pairs = [f"/2007_{n:06d}" for n in range(6)]
        lines = [f"JPEGImages{name}.jpg SegmentationClass{name}.png" for name in pairs]
        (folder / "train.txt").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
        write_lists(tmp_path, {"val": range(6, 9)}, "2007_{:06d}  1")
        write_lists(tmp_path, {"test": range(9, 13)}, "2007_{:06d}.jpg")
        made = report(tmp_path)
        assert made.splits == {"train": 6, "val": 3}
        assert made.masks is not None
        assert "4 pictures of the split test left out: none of them has a mask." in made.masks.warnings

    def test_m01_palettes_that_number_the_same_colours_differently(self, tmp_path: Path) -> None:
        for number in range(6):
            mask = boxes(32, 32, (4, 4, 16, 16, 1), (20, 20, 28, 28, 2))
            colours = [0, 0, 0, 200, 0, 0, 0, 200, 0] if number % 2 else [0, 0, 0, 0, 200, 0, 200, 0, 0]
            save(photo(mask, number), tmp_path / "images" / f"{number}.png")
            save(palette_image(mask, colours), tmp_path / "masks" / f"{number}.png")
        assert "index 1 is 0,200,0 in one and 200,0,0 in another" in problem(tmp_path)
        made = report(tmp_path, labels={"no": "0,0,0", "red": "#c80000", "green": "0,200,0"})
        assert pixels(made) == {"no": 4896, "red": 624, "green": 624, "ignored": 0}


class TestCityscapes:
    """M02: the file with label ids is read and mapped by the published table."""

    def test_m02_counts(self, tmp_path: Path) -> None:
        made = report(write_cityscapes(tmp_path))
        assert len(made.classes) == 19
        assert made.splits == {"train": 4, "val": 2}
        assert pixels(made, "train") == {"road": 2288, "building": 2752, "sky": 1984, "car": 384, "ignored": 784}
        assert pixels(made, "val") == {"road": 1144, "building": 1376, "sky": 992, "car": 192, "ignored": 392}
        assert made.masks is not None
        assert made.masks.pixels["train"]["id"]["ignored_values"] == {"1": 496, "3": 256, "30": 32}
        assert made.masks.warnings == [
            "2 pictures of the split test left out: their masks have no labelled pixel.",
        ]
        said = " ".join(remarks(made))
        assert "Of the files of a picture *_labelIds is its mask; color and instanceIds are not read." in said
        assert "Cityscapes' table of label ids" in said
        assert "15 classes occur nowhere: sidewalk, wall, fence" in said
        assert "(ignored: 1: 496, 3: 256, 30: 32)" in text_of(made)

    def test_m02_train_ids(self, tmp_path: Path) -> None:
        for city in "abc":
            for number in range(2):
                mask = boxes(64, 32, (0, 0, 64, 8, 10), (0, 30, 64, 32, VOID))
                stem = f"{city}_{number:06d}_000019"
                save(photo(mask, ord(city) + number), tmp_path / "leftImg8bit/train" / city / f"{stem}_leftImg8bit.png")
                save(mask, tmp_path / "gtFine/train" / city / f"{stem}_gtFine_labelTrainIds.png")
        made = report(tmp_path)
        assert pixels(made, "train") == {"road": 8448, "sky": 3072, "ignored": 768}
        assert made.domains.keys() == {"id"}

    def test_m02_an_unlabelled_validation_split_and_a_split_without_files(self, tmp_path: Path) -> None:
        root = write_voids(tmp_path)
        for path in (root / "val" / "masks").iterdir():
            save(np.full((32, 32), VOID, np.uint8), path)
        for path in (root / "test" / "masks").iterdir():
            path.unlink()
        made = report(root)
        assert made.splits == {"train": 9}
        assert made.masks is not None
        assert [text.split(":")[0] for text in made.masks.warnings[:2]] == [
            "3 pictures of the split test left out",
            "3 pictures of the split val left out",
        ]


class TestBinary:
    """M03: 255 is not ignored in silence where it is the only value beside the background."""

    def test_m03_undeclared(self, tmp_path: Path) -> None:
        message = problem(write_pairs(tmp_path, values=(0, 255)))
        assert message == (
            "Masks must hold at least two classes, but their values are 0 and 255, and 255 is the ignored value (1,152 "
            "pixels), so that only the value 0 (7,040 pixels) would be left. Where 255 is a class, declare the values, "
            "such as data.labels: {background: 0, object: 255}, or another ignored value, such as data.ignore: [254] "
            "(in commands: --labels background=0,object=255, or --ignore 254)."
        )

    def test_m03_declared(self, tmp_path: Path) -> None:
        root = write_pairs(tmp_path, values=(0, 255))
        expected = {"background": 7040, "object": 1152, "ignored": 0}
        assert pixels(report(root, labels={"background": 0, "object": 255})) == expected
        assert pixels(report(root, ignore=[254])) == {"0": 7040, "255": 1152, "ignored": 0}
        assert pixels(report(root, ignore=[])) == {"0": 7040, "255": 1152, "ignored": 0}
        status, out, _ = command(root, "--labels", "background=0,object=255")
        assert status == OK
        assert "Pixels in all: background 7,040, object 1,152, ignored 0" in out

    @pytest.mark.parametrize("kind", ["three channels", "palette", "one and 255"])
    def test_m03_other_files_with_two_values(self, tmp_path: Path, kind: str) -> None:
        low = 1 if kind == "one and 255" else 0
        for path in (write_pairs(tmp_path, values=(low, 255)) / "masks").iterdir():
            mask = np.asarray(Image.open(path))
            if kind == "three channels":
                save(np.repeat(mask[..., None], 3, axis=2), path)
            elif kind == "palette":
                save(palette_image(mask), path)
        assert f"their values are {low} and 255, and 255 is the ignored value (1,152 pixels)" in problem(tmp_path)

    def test_m03_one_value_alone(self, tmp_path: Path) -> None:
        for path in (write_pairs(tmp_path) / "masks").iterdir():
            save(np.zeros((32, 32), np.uint8), path)
        assert "at least two classes, but there is only the value 0 (8,192 pixels)" in problem(tmp_path)


class TestLossy:
    """M04: a lossy file is recognised by its format."""

    def test_m04_two_values(self, tmp_path: Path) -> None:
        message = problem(write_pairs(tmp_path, values=(0, 255), ending="jpg", quality=75))
        assert "8 of 8 are JPEG ('masks/000.jpg'," in message
        assert "they hold 22 values; 832 of 8,192 pixels are neither 0 nor 255." in message
        assert "Save the masks as PNG" in message

    @pytest.mark.parametrize("labels", [None, {"a": 0, "b": 1, "c": 2, "d": 3}])
    def test_m04_indices(self, tmp_path: Path, labels: Any) -> None:
        message = problem(write_pairs(tmp_path, values=(0, 1, 2), ending="jpg", quality=75), labels)
        assert "8 of 8 are JPEG" in message
        assert "they hold 4 values" in message

    @pytest.mark.parametrize(
        ("name", "options"),
        [("webp", {"quality": 60}), ("tif", {"compression": "jpeg"}), ("png", {"format": "JPEG"})],
    )
    def test_m04_other_lossy_formats_and_wrong_endings(
        self, tmp_path: Path, name: str, options: dict[str, Any]
    ) -> None:
        assert "8 of 8 are " in problem(write_pairs(tmp_path, values=(0, 255), ending=name, **options))

    @pytest.mark.parametrize(
        ("name", "options"), [("webp", {"lossless": True}), ("tif", {"compression": "tiff_lzw"}), ("bmp", {})]
    )
    def test_m04_lossless_formats_are_read(self, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
        made = report(write_pairs(tmp_path, values=(0, 1, 2), ending=name, **options))
        assert pixels(made) == {"0": 7040, "1": 576, "2": 576, "ignored": 0}

    def test_m04_gif_renumbers_values(self, tmp_path: Path) -> None:
        """Pillow writes only the colours that occur: index 1 is value 1 in one file and value 2 in the next."""
        root = write_pairs(tmp_path, values=(0, 1, 2), ending="gif")
        assert "index 1 is 1,1,1 in one and 2,2,2 in another" in problem(root)
        made = report(root, labels={"no": "0,0,0", "one": "1,1,1", "two": "2,2,2"})
        assert pixels(made) == {"no": 7040, "one": 576, "two": 576, "ignored": 0}

    def test_m04_one_lossy_mask_among_others(self, tmp_path: Path) -> None:
        write_pairs(tmp_path)
        write_pairs(tmp_path, count=1, first=50, ending="jpg")
        assert "1 of 9 are JPEG ('masks/050.jpg')" in problem(tmp_path)

    def test_m04_a_lossy_mask_that_was_saved_again_as_png(self, tmp_path: Path) -> None:
        for path in (write_pairs(tmp_path, values=(0, 255), ending="jpg", quality=75) / "masks").iterdir():
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
        message = problem(tmp_path)
        assert "never fill 2 x 2 pixels, as interpolation and lossy formats leave them" in message

    def test_m04_a_smoothed_mask(self, tmp_path: Path) -> None:
        for path in (write_pairs(tmp_path, values=(0, 200)) / "masks").iterdir():
            image = Image.open(path)
            save(image.resize((17, 17), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC), path)
        assert "without scaling or smoothing" in problem(tmp_path)


class TestColours:
    """M05: a colour is a class only through a map, by exact equality."""

    def test_m05_a_label_file_beside_the_masks(self, tmp_path: Path) -> None:
        made = report(write_colours(tmp_path))
        assert made.classes == ["background", "cat", "dog"]
        assert made.images == 6
        assert made.splits == {}
        assert pixels(made) == {"background": 4896, "cat": 864, "dog": 384, "ignored": 0}
        assert "The values of the masks have the classes of labelmap.txt." in remarks(made)
        assert "default.txt names no split: splits are drawn." in remarks(made)

    def test_m05_the_order_of_the_lines_is_not_that_of_the_classes(self, tmp_path: Path) -> None:
        file = write_colours(tmp_path) / "labelmap.txt"
        file.write_text("\n".join(reversed(file.read_text().splitlines())))
        assert report(tmp_path).classes == ["background", "cat", "dog"]

    def test_m05_colours_alone(self, tmp_path: Path) -> None:
        message = problem(write_colours(tmp_path, label_file=False))
        assert "the masks hold 3 colours (red,green,blue: pixels): " in message
        assert "0,0,0: 4,896; 48,112,32: 864; 176,112,32: 384. " in message
        assert "labelmap.txt" in message

    def test_m05_stray_pixels(self, tmp_path: Path) -> None:
        message = problem(write_colours(tmp_path, stray=5))
        assert "labelmap.txt has none for 49,112,32 ('SegmentationClass/005.png': 5 pixels)." in message

    def test_m05_declared_colours_and_ignored_ones(self, tmp_path: Path) -> None:
        root = write_colours(tmp_path, label_file=False)
        made = report(root, labels={"no": "0,0,0", "cat": "#307020"}, ignore=["176,112,32"])
        assert pixels(made) == {"no": 4896, "cat": 864, "ignored": 384}
        message = problem(root, labels={"no": "0,0,0", "cat": "#307020"})
        assert "data.labels has none for 176,112,32 ('masks/000.png', 'masks/001.png'" in message

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("class_dict.csv", "name,r,g,b\ndog,176,112,32\nbackground,0,0,0\ncat,48,112,32\n"),
            ("label_colors.txt", "48 112 32\tcat\n0 0 0\tbackground\n176 112 32\tdog\n"),
            ("masks/labelmap.txt", "cat:48,112,32::\nbackground:0,0,0::\ndog:176,112,32::\n"),
        ],
    )
    def test_m05_other_label_files(self, tmp_path: Path, name: str, text: str) -> None:
        (write_colours(tmp_path, label_file=False) / name).write_text(text)
        made = report(tmp_path)
        assert pixels(made) == {"background": 4896, "cat": 864, "dog": 384, "ignored": 0}
        assert f"The values of the masks have the classes of {name}." in remarks(made)

    def test_m05_a_label_file_for_palettes_and_an_ignored_name(self, tmp_path: Path) -> None:
        file = write_colours(tmp_path) / "labelmap.txt"
        file.write_text(file.read_text().replace("dog", "ignored"))
        for path in (tmp_path / "SegmentationClass").iterdir():
            mask = boxes(32, 32, (4, 4, 16, 16, 7), (20, 20, 28, 28, 3))
            colours = [0] * 24
            colours[21:24] = 48, 112, 32
            colours[9:12] = 176, 112, 32
            save(palette_image(mask, colours), path)
        assert pixels(report(tmp_path)) == {"background": 4896, "cat": 864, "ignored": 384}

    def test_m05_label_files_that_differ(self, tmp_path: Path) -> None:
        root = write_colours(tmp_path)
        (root / "SegmentationClass" / "labelmap.txt").write_text("cat:1,2,3::\n")
        with pytest.raises(DataError, match=r"labelmap.txt and SegmentationClass/labelmap.txt differ"):
            report(root)


class TestSizes:
    """M06: a mask has the size of its picture as shown."""

    def test_m06_half(self, tmp_path: Path) -> None:
        message = problem(write_sizes(tmp_path, "half"))
        assert "6 of 6 masks ('masks/000.png'," in message
        assert "are 24 x 20 where the picture is 48 x 40" in message

    def test_m06_one_mask(self, tmp_path: Path) -> None:
        assert "1 of 6 masks ('masks/003.png') is 50 x 42 where the picture is 48 x 40" in problem(
            write_sizes(tmp_path, "two_more")
        )

    def test_m06_turned(self, tmp_path: Path) -> None:
        made = report(write_sizes(tmp_path, "turned"))
        assert pixels(made) == {"0": 10560, "1": 960, "ignored": 0}
        assert made.notes == {"rotated_by_exif": 2}
        assert "2 pictures turned upright by EXIF orientation; masks are read as they are stored." in remarks(made)

    def test_m06_as_stored(self, tmp_path: Path) -> None:
        message = problem(write_sizes(tmp_path, "as_stored"))
        assert "EXIF turns 2 of 6 pictures ('images/000.jpg', 'images/001.jpg') to 40 x 48" in message
        assert "their masks are 48 x 40" in message

    def test_m06_a_mask_with_an_orientation_of_its_own_is_left_out(self, tmp_path: Path) -> None:
        root = write_pairs(tmp_path, count=8)
        exif = Image.Exif()
        exif[0x0112] = 3
        Image.open(root / "masks" / "002.png").save(root / "masks" / "002.png", exif=exif)
        (entry,) = report(root).unreadable
        assert entry["name"] == "images/002.png"
        assert "an EXIF orientation of its own" in entry["reason"]


class TestNames:
    """M07: pairs are made by name, never by order."""

    def test_m07_suffix(self, tmp_path: Path) -> None:
        made = report(write_names(tmp_path, "suffix"))
        assert made.images == 12
        assert pixels(made) == {"0": 11664, "1": 624, "ignored": 0}
        assert "Pairs are made by name without '_mask' of masks." in remarks(made)

    def test_m07_gap(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            report(write_names(tmp_path, "gap"))
        assert "'img_1.jpg' has no mask, and 'img_99_mask.png' has no picture" in str(caught.value)
        assert "(1 picture and 1 mask without a partner, 11 pairs)" in str(caught.value)

    def test_m07_one_folder(self, tmp_path: Path) -> None:
        made = report(write_names(tmp_path, "one_folder"))
        assert made.images == 12
        assert pixels(made) == {"0": 11664, "1": 624, "ignored": 0}
        assert "Masks lie beside their pictures and are told by their names (*_L)." in remarks(made)

    @pytest.mark.parametrize(
        ("picture", "mask"),
        [
            ("images/{}.jpg", "masks/{}.png"),
            ("images/img_{}.jpg", "masks/mask_{}.png"),
            ("images/{}_sat.jpg", "masks/{}_mask.png"),
            ("train/{}.jpg", "train_labels/{}_L.png"),
            ("train/{}.jpg", "trainannot/{}.png"),
            ("images/training/{}.jpg", "annotations/training/{}.png"),
            ("images/{}.jpg", "annotations/trimaps/{}.png"),
            ("imgs/{}.jpg", "labels/{}.png"),
            ("data/{}.jpg", "data/{}.png"),
            ("data/{}.jpg", "data/{}-seg.png"),
            ("train/{}_sat.jpg", "train/{}_mask.png"),
            ("training/images/{}.jpg", "training/labels/{}.png"),
            ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
        ],
    )
    def test_m07_other_names(self, tmp_path: Path, picture: str, mask: str) -> None:
        for number in range(1, 13):
            labels = boxes(32, 32, (2, 4, 2 + 2 * number, 8, 1))
            save(photo(labels, number), tmp_path / picture.format(number))
            save(labels, tmp_path / mask.format(number))
        made = check(tmp_path, workers=1, task="segmentation")
        assert made.images == 12
        split = "train" if "train" in picture else "all"
        (domain,) = made.domains
        assert domain == ("data" if picture.startswith("data") else "id")
        assert pixels(made, split, domain) == {"0": 11664, "1": 624, "ignored": 0}

    def test_m07_two_pictures_of_one_name(self, tmp_path: Path) -> None:
        root = write_pairs(tmp_path)
        save(photo(boxes(32, 32), 99), root / "images" / "003.jpg")
        with pytest.raises(DataError, match="two pictures of one name"):
            check(root, workers=1)
        with pytest.raises(DataError, match=r"two pictures of one name: 'images/003.jpg' and 'images/003.png'"):
            check(root, workers=1, task="segmentation")

    def test_m07_no_name_in_common(self, tmp_path: Path) -> None:
        for number in range(4):
            save(photo(boxes(32, 32), number), tmp_path / "images" / f"a{number}.png")
            save(boxes(32, 32), tmp_path / "masks" / f"b{number}.png")
        with pytest.raises(DataError, match=r"\(4 pictures and 4 masks without a partner, 0 pairs\)"):
            check(tmp_path, workers=1, task="segmentation")

    def test_m07_pictures_alone(self, tmp_path: Path) -> None:
        for number in range(4):
            save(photo(boxes(32, 32), number), tmp_path / "images" / f"{number}.png")
        with pytest.raises(DataError, match="4 image files in images"):
            check(tmp_path, workers=1, task="segmentation")


class TestSplitsAndDomains:
    def test_m09_void_masks_and_absent_classes(self, tmp_path: Path) -> None:
        made = report(write_voids(tmp_path))
        assert made.splits == {"train": 9, "val": 3, "test": 3}
        assert pixels(made, "train") == {"0": 6528, "1": 1152, "2": 512, "ignored": 1024}
        assert pixels(made, "val") == {"0": 2640, "1": 432, "ignored": 0}
        assert pixels(made, "test") == {"0": 2448, "1": 432, "2": 192, "ignored": 0}
        assert "1 mask has no labelled pixel: 'train/masks/8.png'." in remarks(made)
        assert made.masks is not None
        assert made.masks.warnings == ["val lacks pixels of 2: its numbers are over the other classes."]

    def test_m10_domains_of_many_sizes(self, tmp_path: Path) -> None:
        made = report(write_domains(tmp_path))
        for domain in ("photo", "sketch"):
            assert pixels(made, domain=domain) == {"0": 15493, "1": 600, "ignored": 0}
        assert made.sizes is not None
        assert len(made.sizes.most_common) == 5
        assert made.masks is not None
        assert made.masks.store_bytes == 2 * 16093 * 4

    @pytest.mark.parametrize(
        ("folders", "ood"),
        [
            (("photo/{}", "ood/fog/{}"), ["fog"]),
            (("train/photo/{}", "val/photo/{}", "test/photo/{}", "ood/fog/{}"), ["fog"]),
            (("{}/train/photo", "{}/val/photo", "{}/ood/fog"), ["fog"]),
        ],
    )
    def test_splits_and_domains_above_and_below(self, tmp_path: Path, folders: Sequence[str], ood: list[str]) -> None:
        for shift, folder in enumerate(folders):
            for number in range(4):
                mask = boxes(32, 32, (4, 4, 16, 16, 1))
                save(photo(mask, 10 * shift + number), tmp_path / folder.format("images") / f"{number}.png")
                save(mask, tmp_path / folder.format("masks") / f"{number}.png")
        made = report(tmp_path)
        assert made.domains.keys() == {"photo", "fog"}
        assert made.ood_domains == ood
        has_splits = any("train" in folder for folder in folders)
        assert pixels(made, "train" if has_splits else "all", "photo") == {"0": 3520, "1": 576, "ignored": 0}
        assert pixels(made, "ood/fog" if has_splits else "all", "fog") == {"0": 3520, "1": 576, "ignored": 0}


class TestCommand:
    def test_text_and_json_say_the_same(self, tmp_path: Path) -> None:
        root = write_voc(tmp_path / "voc")
        status, out, _ = command(root)
        assert status == OK
        for line in (
            "9 readable pairs, 1 domain, 3 classes",
            "Pairs of a picture and its mask: the study file needs task: segmentation.",
            "Splits of the source: train 6, val 3",
            "Pixels in all: 0 14,364, 1 1,280, 15 1,024, ignored 612",
            "4 pictures in no list are not used.",
            "Size of a data store (whole pictures and masks): 69 kB",
            "A study can use this.",
        ):
            assert line in out
        status, out, _ = command(root, "--json")
        made = json.loads(out)
        assert status == OK
        assert (made["task"], made["classes"]) == ("segmentation", ["0", "1", "15"])
        assert made["masks"]["pixels"]["val"]["id"]["classes"] == {"0": 4788, "1": 512, "15": 256}
        assert made["masks"]["ignored"] == 612

    @pytest.mark.parametrize(
        ("write", "words"),
        [
            (lambda root: write_pairs(root, values=(0, 255)), "255 is the ignored value"),
            (lambda root: write_pairs(root, values=(0, 1, 2), ending="jpg"), "8 of 8 are JPEG"),
            (lambda root: write_colours(root, label_file=False), "48,112,32: 864"),
            (lambda root: write_sizes(root, "half"), "24 x 20"),
        ],
    )
    def test_problems_end_with_4(self, tmp_path: Path, write: Callable[[Path], Path], words: str) -> None:
        status, out, _ = command(write(tmp_path))
        assert status == PREFLIGHT
        assert words in out.replace("\n", " ")

    def test_pairs_without_partner_end_with_4(self, tmp_path: Path) -> None:
        status, _, error = command(write_names(tmp_path, "gap"))
        assert status == PREFLIGHT
        assert "'img_1.jpg' has no mask" in error

    def test_a_label_file_as_an_option(self, tmp_path: Path) -> None:
        root = write_colours(tmp_path / "data", label_file=False)
        file = tmp_path / "names.csv"
        file.write_text("name,r,g,b\nbackground,0,0,0\ncat,48,112,32\ndog,176,112,32\n")
        status, out, _ = command(root, "--labels", file)
        assert status == OK
        assert "Pixels in all: background 4,896, cat 864, dog 384, ignored 0" in out

    def test_another_task_and_a_task_that_is_none(self, tmp_path: Path) -> None:
        root = write_voc(tmp_path)
        status, _, error = command(root, "--task", "classification")
        assert status == PREFLIGHT
        assert "holds pictures with masks (JPEGImages/* with SegmentationClass/*). Set task: segmentation" in error
        assert command(root, "--task", "detection")[0] == USAGE
        status, _, error = command(root, "--mask", "trimap")
        assert status == PREFLIGHT
        assert "Only tables have a mask column to choose, but it is 'trimap'" in error
        status, _, error = command(root, "--labels", "a=0,b=x")
        assert status == PREFLIGHT
        assert "A value of masks is an integer from 0 to 65535 or a colour" in error


def test_equal_pictures_are_duplicates_and_equal_masks_are_not(tmp_path: Path) -> None:
    root = write_pairs(tmp_path, count=8)
    for copy, original in (("020", "001"), ("021", "002")):
        for folder in ("images", "masks"):
            (root / folder / f"{copy}.png").write_bytes((root / folder / f"{original}.png").read_bytes())
    save(boxes(32, 32, (0, 0, 8, 8, 1)), root / "masks" / "021.png")
    made = report(root)
    assert made.kept_together["groups"] == 2
    assert made.duplicates["repeats"] == 1
    assert [group["names"] for group in made.duplicates["contradictory"]] == [["images/002.png", "images/021.png"]]
    assert "The same image with different masks: 1 group" in text_of(made)


def test_values_above_255_need_a_map(tmp_path: Path) -> None:
    for path in (write_pairs(tmp_path) / "masks").iterdir():
        save(np.asarray(Image.open(path)).astype(np.uint16) * 26000, path)
    assert "2 values up to 26000, as instance numbers do" in problem(tmp_path)
    assert pixels(report(tmp_path, labels={"no": 0, "car": 26000})) == {"no": 7040, "car": 1152, "ignored": 0}


def test_a_transparent_mask_is_left_out_and_an_opaque_one_read(tmp_path: Path) -> None:
    root = write_pairs(tmp_path, count=8)
    mask = np.asarray(Image.open(root / "masks" / "000.png"))
    alpha = np.full((32, 32), 255, np.uint8)
    save(np.dstack([mask, mask, mask, alpha]), root / "masks" / "000.png")
    save(np.dstack([mask, mask, mask, mask * 255]), root / "masks" / "002.png")
    made = report(root)
    assert [entry["name"] for entry in made.unreadable] == ["images/002.png"]
    assert "transparent pixels" in made.unreadable[0]["reason"]
    assert pixels(made) == {"0": 7 * 880, "1": 7 * 144, "ignored": 0}


def test_masks_of_colours_and_of_indices_together(tmp_path: Path) -> None:
    write_pairs(tmp_path, count=4)
    mask = boxes(32, 32, (10, 10, 22, 22, 1))
    save(painted(mask, {1: (200, 0, 0)}), tmp_path / "masks" / "001.png")
    assert "200,0,0: 144" in problem(tmp_path)
