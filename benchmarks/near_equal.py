"""Which versions of a picture are found to be nearly equal, and which different pictures are taken for one.

Recall and false pairs on windows of real photographs (scikit-learn's, matplotlib's and, where it is installed,
scikit-image's pictures; each window is a picture of its own, also neighbouring ones of one texture or sky), on
scikit-learn's handwritten digits, on digits printed in many fonts, and on drawn icons; each set once as it is and once
with a second version of every picture. Then the cost on many synthetic thumbnails: unlike ones, and digits with noise,
which all resemble each other.

    python -m benchmarks.near_equal [--images 100000]

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import sklearn.datasets
from PIL import Image, ImageDraw, ImageEnhance

from orchestrator.ingest import near_equal
from orchestrator.ingest.images import COLOUR_SIDE, THUMBNAIL_SIDE, thumbnail
from orchestrator.ingest.near_equal import Bytes, candidate_pairs, connected, near_equal_pairs, perceptual_hashes
from trainables.demo.digits import handwritten_digits, printed_digits

WINDOWS = (128, 224)
"""Sides of the windows of the photographs, in pixels."""
ICON_SIDE = 64
NO_PHOTOGRAPHS = ("chessboard", "color", "horse", "logo", "phantom", "binary", "multipage")
"""Beginnings of the names of scikit-image's drawings."""

Version = Callable[[Image.Image, np.random.Generator], Image.Image]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    size = [max(4, int(side * factor)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float, generator: np.random.Generator) -> Image.Image:
    """A random window without this share of each axis."""
    width, height = (round(side * (1 - share)) for side in image.size)
    left = int(generator.integers(0, image.width - width + 1))
    top = int(generator.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


VERSIONS: dict[str, Version] = {
    "JPEG quality 90": lambda image, _: jpeg(image, 90),
    "JPEG quality 50": lambda image, _: jpeg(image, 50),
    "JPEG quality 30": lambda image, _: jpeg(image, 30),
    "half the size": lambda image, _: resized(image, 0.5),
    "twice the size": lambda image, _: resized(image, 2.0),
    "a third of the size, JPEG quality 70": lambda image, _: jpeg(resized(image, 0.33), 70),
    "brightness 1.15": lambda image, _: ImageEnhance.Brightness(image).enhance(1.15),
    "brightness 0.8": lambda image, _: ImageEnhance.Brightness(image).enhance(0.8),
    "contrast 1.2": lambda image, _: ImageEnhance.Contrast(image).enhance(1.2),
    "cropped by 2 %": lambda image, generator: cropped(image, 0.02, generator),
    "cropped by 5 %": lambda image, generator: cropped(image, 0.05, generator),
    "cropped by 10 %": lambda image, generator: cropped(image, 0.10, generator),
}


def photographs() -> Iterator[Image.Image]:
    """All photographs at hand."""
    folder = Path(sklearn.datasets.__file__).parent / "images"
    files = sorted(folder.glob("*.jpg"))
    files.append(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    found = importlib.util.find_spec("skimage")
    if found is not None and found.origin is not None:
        pictures = sorted((Path(found.origin).parent / "data").glob("*.[pj][np]g"))
        # A stereo pair is one scene twice.
        files += [p for p in pictures if not p.name.startswith(NO_PHOTOGRAPHS) and p.name != "motorcycle_right.png"]
    for file in files:
        yield Image.open(file).convert("RGB")


def windows(side: int) -> list[Image.Image]:
    """Disjoint windows of the photographs."""
    return [
        photograph.crop((left, top, left + side, top + side))
        for photograph in photographs()
        for top in range(0, photograph.height - side + 1, side)
        for left in range(0, photograph.width - side + 1, side)
    ]


def icons(count: int) -> list[Image.Image]:
    """Discs, squares, triangles, rings and crosses in random colours, at random places and of random sizes."""
    generator = np.random.default_rng(0)
    result = []
    for number in range(count):
        image = Image.new("RGB", (ICON_SIDE, ICON_SIDE), "white")
        draw = ImageDraw.Draw(image)
        radius = int(generator.integers(12, 26))
        x, y = (int(value) for value in generator.integers(26, 38, 2))
        red, green, blue = (int(value) for value in generator.integers(0, 200, 3))
        colour = (red, green, blue)
        box = (x - radius, y - radius, x + radius, y + radius)
        kind = number % 5
        if kind == 0:
            draw.ellipse(box, fill=colour)
        elif kind == 1:
            draw.rectangle(box, fill=colour)
        elif kind == 2:
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
        elif kind == 3:
            draw.ellipse(box, outline=colour, width=5)
        else:
            draw.line((x - radius, y, x + radius, y), fill=colour, width=6)
            draw.line((x, y - radius, x, y + radius), fill=colour, width=6)
        result.append(image)
    return result


def thumbnails(images: Sequence[Image.Image]) -> Bytes:
    """(n, bytes)."""
    return np.stack([np.frombuffer(thumbnail(image), np.uint8) for image in images])


def measure(images: Sequence[Image.Image], versions: Sequence[str]) -> dict[str, Any]:
    """Groups among different pictures, and recall and false pairs with a second version of each."""
    originals = thumbnails(images)
    count = len(originals)
    generator = np.random.default_rng(1)
    order = generator.permutation(count)
    groups, crowded = connected(count, near_equal_pairs(originals[order]))
    result: dict[str, Any] = {
        "pictures": count,
        "with contrast": int((originals[:, : THUMBNAIL_SIDE**2].std(axis=1) >= near_equal.MIN_CONTRAST).sum()),
        "different pictures grouped": sum(map(len, groups)) + len(crowded),
        "largest group": max(map(len, groups), default=0),
        "versions": {},
    }
    for name in versions:
        both = np.concatenate([originals, thumbnails([VERSIONS[name](image, generator) for image in images])])
        order = generator.permutation(2 * count)
        pairs = [tuple(sorted((int(order[i]), int(order[j])))) for i, j in near_equal_pairs(both[order])]
        right = sum(j - i == count for i, j in pairs)
        result["versions"][name] = {"recall": round(right / count, 3), "false pairs": len(pairs) - right}
    return result


def unlike(count: int) -> Bytes:
    """Thumbnails with the spectrum of photographs (amplitude 1/f), grey."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(THUMBNAIL_SIDE), np.fft.rfftfreq(THUMBNAIL_SIDE), indexing="ij"))
    frequency[0, 0] = 1.0
    parts = []
    for start in range(0, count, 4096):
        size = min(4096, count - start)
        noise = np.fft.rfft2(generator.standard_normal((size, THUMBNAIL_SIDE, THUMBNAIL_SIDE)))
        values = np.fft.irfft2(noise / frequency, s=(THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        values *= 50 / values.std(axis=(1, 2), keepdims=True)
        parts.append((values + 128).clip(0, 255).astype(np.uint8).reshape(size, -1))
    return _grey(np.concatenate(parts))


def alike(count: int) -> Bytes:
    """Handwritten digits with noise of 12 levels: hundreds of each one."""
    digits = thumbnails([Image.fromarray(pixels) for pixels in handwritten_digits()[0]])[:, : THUMBNAIL_SIDE**2]
    generator = np.random.default_rng(0)
    rows = generator.integers(0, len(digits), count)
    noise = generator.normal(0, 12, (count, digits.shape[1])).astype(np.float32)
    return _grey((digits[rows] + noise).clip(0, 255).astype(np.uint8))


def _grey(luminance: Bytes) -> Bytes:
    return np.concatenate([luminance, np.full((len(luminance), 3 * COLOUR_SIDE**2), 128, np.uint8)], axis=1)


def cost(pictures: Bytes) -> dict[str, Any]:
    """CPU seconds and candidates of a search."""
    began = time.process_time()
    first, _ = candidate_pairs(*perceptual_hashes(pictures))
    searched = time.process_time()
    groups, crowded = connected(len(pictures), near_equal_pairs(pictures))
    return {
        "pictures": len(pictures),
        "candidates per picture": round(len(first) / len(pictures), 3),
        "CPU seconds of hashing and looking up": round(searched - began, 1),
        "CPU seconds in all": round(time.process_time() - searched, 1),
        "grouped": sum(map(len, groups)),
        "crowded": len(crowded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="thumbnails of each measurement of cost")
    args = parser.parse_args()
    drawn = ["JPEG quality 90", "JPEG quality 50", "twice the size", "half the size", "brightness 0.8"]
    result: dict[str, Any] = {f"windows of {side} px": measure(windows(side), list(VERSIONS)) for side in WINDOWS}
    digits = [Image.fromarray(pixels) for pixels in handwritten_digits()[0]]
    result["handwritten digits"] = measure(digits, drawn)
    printed = [Image.fromarray(pixels) for pixels in printed_digits(100, 0)[0]]
    result["printed digits"] = measure(printed, drawn)
    result["icons"] = measure(icons(1500), drawn)
    for name, make in (("unlike", unlike), ("alike", alike)):
        result[f"cost, {name}"] = cost(make(args.images))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
