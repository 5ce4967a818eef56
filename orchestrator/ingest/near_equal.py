"""Groups of images that are equal or nearly equal: what has to lie on one side of a split.

Equal images have the same upright RGB pixels. Nearly equal ones show the same picture, saved again as JPEG, resized,
brightened or slightly cropped. They are found in three steps:

1. Candidates: a perceptual hash of 64 bits (pHash: Zauner, 2010, "Implementation and Benchmarking of Perceptual Image
   Hash Functions") within `HAMMING` bits. Pairs are looked up among the neighbours in sorted orders of permuted bits
   (Charikar, 2002, "Similarity Estimation Techniques from Rounding Algorithms"; Manku, Jain and Das Sarma, 2007,
   "Detecting Near-Duplicates for Web Crawling"), so that their number is linear in that of the images.
2. Verification: the correlation of the luminance of thumbnails, at once or, for photographs, after a small crop has
   been undone. The residual 1 - r must be a fraction of the residual to ordinary other images (the ratio test of Lowe,
   2004, "Distinctive Image Features from Scale-Invariant Keypoints"). Handwritten digits, icons or slides resemble each
   other anyway, and are therefore held to a stricter limit than photographs.
3. Groups: connected pairs. A group of more than `MAX_GROUP` different pictures is no set of copies but a cloud, such as
   the frames of a fixed camera; it is taken apart.

The outcome depends on the pixels alone, not on names or order. Figures: `benchmarks/near_equal.py`, docs/data.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.ingest.images import COLOUR_SIDE, THUMBNAIL_SIDE
from orchestrator.ingest.source import Outcome

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

HAMMING = 12
"""Bits of 64 in which the hashes of candidates may differ."""
ORDERS = 32
"""Sorted orders in which candidates are looked up."""
WINDOW = 32
"""Neighbours on each side that an image is compared with in an order."""
NEIGHBOURS = 24
"""Candidates per image that are verified, the nearest by hash."""
MIN_CONTRAST = 4.0
"""Standard deviation of a thumbnail's luminance, in levels of 255, below which only equal pixels count."""
MAX_RESIDUAL = 0.05
"""Limit of 1 - r, for r the correlation of two thumbnails."""
RATIO = 8.0
"""How many times nearer than an ordinary image a copy must be."""
REFERENCES = 1024
"""Images that ordinary similarity is measured against."""
RANK = 10
"""Which of the most similar references counts as ordinary: nearer ones may be copies."""
NOISE = 4.0
"""Difference that saving again may make, root mean square, in levels of 255: a limit of 1 - r for strong contrasts."""
ALIGNED_BELOW = 0.7
"""Ordinary similarity up to which a crop is undone. Where images resemble each other anyway, a shift makes different
ones agree: two icons of one shape at different places."""
FLAT_SHARE = 0.5
"""Share of a thumbnail at one level (within `FLAT_LEVELS`), above which no crop is undone: a drawing on a background
fits every other one of its shape and size."""
FLAT_LEVELS = 4
FLAT_CONTRAST = 25.0
"""Standard deviation of luminance from which that counts: of a picture with little contrast most is at one level."""
MAX_ALIGNED = 4
"""Candidates per image that are aligned, the most similar ones."""
MAX_SCALE = 0.08
"""Largest change of scale that alignment undoes, as a share of the side."""
MAX_SHIFT = 2.0
"""Largest shift that alignment undoes, in pixels of the thumbnail."""
MAX_GROUP = 32
"""Different pictures of one group of near-equal images."""

DAMPING = 1e-3
"""Of the Gauss-Newton steps of alignment, as a share of the normal matrix's diagonal."""

_LUMINANCE = THUMBNAIL_SIDE**2
_HASH_SIDE = 8
_BLOCK = 2048
_ALIGN_STEPS = 5


@dataclass(frozen=True)
class ImageGroups:
    """Images that belong together, as positions. Groups and their members are in ascending order."""

    equal: tuple[tuple[int, ...], ...] = ()
    """Groups of at least two images with equal pixels."""
    near: tuple[tuple[int, ...], ...] = ()
    """Groups of nearly equal images of at least two different pictures, with the equal copies of each."""
    crowded: int = 0
    """Images in clouds that were taken apart, see `MAX_GROUP`."""

    def together(self, near: bool = True) -> list[tuple[int, ...]]:
        """The groups that a split must not divide: each image is in one at most.

        Args:
            near: whether nearly equal images belong together, too.
        """
        if not near:
            return list(self.equal)
        covered = {position for group in self.near for position in group}
        return sorted([*self.near, *(group for group in self.equal if group[0] not in covered)])


def group_images(outcomes: Mapping[int, Outcome], near: bool = True) -> ImageGroups:
    """Group the readable images of a source.

    Args:
        outcomes: by position.
        near: whether nearly equal images are looked for.
    """
    positions: dict[bytes, list[int]] = {}
    thumbnails: dict[bytes, bytes] = {}
    for position, outcome in outcomes.items():
        if outcome.reason is None:
            positions.setdefault(outcome.pixels, []).append(position)
            thumbnails[outcome.pixels] = outcome.thumbnail
    equal = sorted(tuple(sorted(group)) for group in positions.values() if len(group) > 1)
    if not near or len(positions) < 2:
        return ImageGroups(tuple(equal))
    # By digest: the order of files changes nothing, and any prefix is a random sample.
    digests = sorted(positions)
    pictures = np.frombuffer(b"".join(thumbnails[digest] for digest in digests), np.uint8).reshape(len(digests), -1)
    groups, crowded = connected(len(digests), near_equal_pairs(pictures))
    return ImageGroups(
        tuple(equal),
        tuple(sorted(tuple(sorted(p for i in group for p in positions[digests[i]])) for group in groups)),
        sum(len(positions[digests[i]]) for i in crowded),
    )


def near_equal_pairs(thumbnails: Bytes) -> list[tuple[int, int]]:
    """Pairs of nearly equal pictures, each as (smaller, larger) row.

    Args:
        thumbnails: (n, bytes), see `orchestrator.ingest.images.thumbnail`; in random order.
    """
    hashes, coefficients = perceptual_hashes(thumbnails)
    first, second = candidate_pairs(hashes, coefficients)
    contrast = np.concatenate([_luminance(thumbnails[rows]).std(axis=1) for rows in _blocks(len(thumbnails))])
    flat = np.concatenate([_flat_share(thumbnails[rows]) for rows in _blocks(len(thumbnails))]) > FLAT_SHARE
    flat &= contrast > FLAT_CONTRAST
    usable = (contrast[first] >= MIN_CONTRAST) & (contrast[second] >= MIN_CONTRAST)
    first = first[usable]
    second = second[usable]
    same_colours = _colours_agree(thumbnails, first, second, contrast)
    first = first[same_colours]
    second = second[same_colours]
    ordinary = _ordinary_similarity(thumbnails, np.unique(np.concatenate([first, second])))
    alike = np.maximum(ordinary[first], ordinary[second])
    limit = np.minimum(MAX_RESIDUAL, (1 - alike) / RATIO)
    similarity = _similarity(thumbnails, first, second)
    noise = np.square(NOISE / np.maximum(contrast[first], contrast[second]))
    accepted = 1 - similarity <= np.minimum(limit, noise)

    unclear = np.flatnonzero(~accepted & (alike <= ALIGNED_BELOW) & ~flat[first] & ~flat[second])
    unclear = unclear[_nearest(first[unclear], second[unclear], 1 - similarity[unclear], MAX_ALIGNED)]
    for block in _blocks(len(unclear)):
        rows = unclear[block]
        accepted[rows] = 1 - _aligned_similarity(thumbnails[first[rows]], thumbnails[second[rows]]) <= limit[rows]
    return sorted(zip(first[accepted].tolist(), second[accepted].tolist(), strict=True))


def perceptual_hashes(thumbnails: Bytes) -> tuple[NDArray[np.uint64], Floats]:
    """pHash of each thumbnail, and the coefficients that its bits are signs of.

    A bit is set where one of the 8 x 8 lowest coefficients of the luminance's discrete cosine transform exceeds their
    median.

    Returns:
        (n,) uint64 and (n, 64) float32.
    """
    steps = np.arange(_HASH_SIDE)[:, None] * (2 * np.arange(THUMBNAIL_SIDE) + 1)
    transform = np.cos(np.pi / (2 * THUMBNAIL_SIDE) * steps).astype(np.float32)
    coefficients = np.empty((len(thumbnails), _HASH_SIDE**2), np.float32)
    for rows in _blocks(len(thumbnails)):
        squares = _luminance(thumbnails[rows]).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)
        coefficients[rows] = (transform @ squares @ transform.T).reshape(-1, _HASH_SIDE**2)
    bits = coefficients > np.median(coefficients, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64), coefficients


def candidate_pairs(hashes: NDArray[np.uint64], coefficients: Floats) -> tuple[Integers, Integers]:
    """Pairs of rows whose hashes differ in at most `HAMMING` bits, of each row the nearest `NEIGHBOURS`.

    Compares `ORDERS` · `WINDOW` pairs per row at most. In a set of that many rows or fewer no pair is missed.

    Args:
        hashes: (n,) uint64.
        coefficients: (n, 64); each order breaks ties between equal hashes by another one.
    """
    count = len(hashes)
    bits = np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(count, -1), axis=1)
    # A constant: equal data give equal groups everywhere.
    generator = np.random.default_rng(0)
    pairs = np.empty(0, np.int64)
    for order in range(ORDERS):
        permuted = np.ascontiguousarray(bits[:, generator.permutation(bits.shape[1])])
        key = np.packbits(permuted, axis=1).view(">u8")[:, 0]
        sequence = np.lexsort((coefficients[:, 1 + order], key))
        in_order = hashes[sequence]
        collected = [pairs]
        for shift in range(1, min(WINDOW, count - 1) + 1):
            close = np.flatnonzero(np.bitwise_count(in_order[shift:] ^ in_order[:-shift]) <= HAMMING)
            ends = np.stack([sequence[close], sequence[close + shift]])
            collected.append(ends.min(axis=0) * count + ends.max(axis=0))
        pairs = np.unique(np.concatenate(collected))
        # Not after every order: sorting is most of the work where images resemble each other.
        if len(pairs) > 2 * NEIGHBOURS * count or order == ORDERS - 1:
            first = pairs // count
            second = pairs % count
            distance = np.bitwise_count(hashes[first] ^ hashes[second]).astype(np.float32)
            pairs = pairs[_nearest(first, second, distance, NEIGHBOURS)]
    return pairs // count, pairs % count


def connected(count: int, pairs: Sequence[tuple[int, int]]) -> tuple[list[list[int]], list[int]]:
    """Connected groups of up to `MAX_GROUP` rows, and the rows of larger ones.

    Args:
        count: number of rows.
        pairs: rows that belong together.

    Example:
        >>> connected(5, [(0, 3), (3, 4)])
        ([[0, 3, 4]], [])
    """
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for one, other in pairs:
        parent[root(one)] = root(other)
    members: dict[int, list[int]] = {}
    for row in sorted({row for pair in pairs for row in pair}):
        members.setdefault(root(row), []).append(row)
    groups = [group for group in members.values() if len(group) <= MAX_GROUP]
    crowded = [row for group in members.values() if len(group) > MAX_GROUP for row in group]
    return groups, crowded


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


def _luminance(thumbnails: Bytes) -> Floats:
    """(n, 1024), levels."""
    return thumbnails[:, :_LUMINANCE].astype(np.float32)


def _flat_share(thumbnails: Bytes) -> Floats:
    """Largest share (n,) of each luminance that lies within `FLAT_LEVELS` of one level."""
    histograms = np.stack([np.bincount(values, minlength=256) for values in thumbnails[:, :_LUMINANCE]])
    totals = np.pad(np.cumsum(histograms, axis=1), ((0, 0), (1, 0)))
    width = 2 * FLAT_LEVELS + 1
    return np.asarray((totals[:, width:] - totals[:, :-width]).max(axis=1) / _LUMINANCE, np.float32)


def _unit_vectors(thumbnails: Bytes) -> Floats:
    """Luminance (n, 1024) with mean 0 and norm 1, so that a scalar product is a correlation; constant ones are 0."""
    values = _luminance(thumbnails)
    values -= values.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.maximum(norms, 1e-6), np.float32)


def _similarity(thumbnails: Bytes, first: Integers, second: Integers) -> Floats:
    """Correlation of each pair's luminance."""
    result = np.empty(len(first), np.float32)
    for block in _blocks(len(first)):
        one = _unit_vectors(thumbnails[first[block]])
        other = _unit_vectors(thumbnails[second[block]])
        result[block] = np.einsum("ij,ij->i", one, other)
    return result


def _ordinary_similarity(thumbnails: Bytes, rows: Integers) -> Floats:
    """Correlation (n,) of each of `rows` with its `RANK`-th most similar reference; 0 for other rows."""
    references = _unit_vectors(thumbnails[:REFERENCES])
    result = np.zeros(len(thumbnails), np.float32)
    # The image itself is among the most similar where it is a reference.
    rank = min(RANK, len(references) - 2)
    for block in _blocks(len(rows)):
        these = rows[block]
        similarity = _unit_vectors(thumbnails[these]) @ references.T
        inside = np.flatnonzero(these < len(references))
        similarity[inside, these[inside]] = -1.0
        result[these] = -np.partition(-similarity, max(rank - 1, 0), axis=1)[:, max(rank - 1, 0)]
    return result


def _colours_agree(thumbnails: Bytes, first: Integers, second: Integers, contrast: Floats) -> NDArray[np.bool_]:
    """Whether two images have the same colours apart from brightness and contrast.

    Icons of one shape may differ in colour alone.
    """
    result = np.empty(len(first), np.bool_)
    for block in _blocks(len(first)):
        one, other = (_chroma(thumbnails[rows[block]]) for rows in (first, second))
        gain = contrast[first[block]] / contrast[second[block]]
        difference = _rms(one - other * gain[:, None])
        strength = np.maximum(_rms(one), _rms(other) * gain)
        result[block] = (difference <= 6 + 0.3 * strength) & (gain < 1.7) & (gain > 1 / 1.7)
    return result


def _chroma(thumbnails: Bytes) -> Floats:
    """Colours (n, 192) less the grey of their place, in levels."""
    colours = thumbnails[:, _LUMINANCE:].astype(np.float32).reshape(len(thumbnails), COLOUR_SIDE**2, 3)
    chroma = colours - colours.mean(axis=2, keepdims=True)
    return np.asarray(chroma.reshape(len(thumbnails), -1), np.float32)


def _rms(values: Floats) -> Floats:
    return np.asarray(np.sqrt(np.square(values).mean(axis=1)), np.float32)


def _nearest(first: Integers, second: Integers, distance: Floats, most: int) -> Integers:
    """Indices of the pairs that are among the `most` nearest of one of their rows, ascending."""
    index = np.tile(np.arange(len(first)), 2)
    ends = np.concatenate([first, second])
    # Stable, so that equal distances stay in the order of the pairs.
    order = np.lexsort((np.tile(distance, 2), ends))
    sorted_ends = ends[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_ends, sorted_ends)
    return np.unique(index[order[rank < most]])


def _aligned_similarity(one: Bytes, other: Bytes) -> Floats:
    """Correlation of luminance within what two images share, after scale and shift of each axis have been undone.

    By Gauss-Newton steps on scale, shift, gain and offset (Lucas and Kanade, 1981, "An Iterative Image Registration
    Technique with an Application to Stereo Vision"), within `MAX_SCALE` and `MAX_SHIFT`.
    """
    side = THUMBNAIL_SIDE
    source, target = (_luminance(values).reshape(-1, side, side) for values in (one, other))
    centre = (side - 1) / 2
    steps = np.arange(side, dtype=np.float32) - centre
    # Scale less 1 and shift of the rows, then of the columns.
    warp = np.zeros((len(source), 4), np.float32)
    bound = np.array([MAX_SCALE, MAX_SHIFT, MAX_SCALE, MAX_SHIFT], np.float32)

    def axes() -> tuple[Floats, Floats]:
        rows, columns = (steps * (1 + warp[:, [k]]) + warp[:, [k + 1]] + centre for k in (0, 2))
        return rows, columns

    for _ in range(_ALIGN_STEPS):
        warped = _resampled(source, *axes())
        down, right = np.gradient(warped, axis=(1, 2))
        slopes = [down * steps[:, None], down, right * steps, right, -target, -np.ones_like(target)]
        jacobian = np.stack(slopes, axis=-1).reshape(len(source), side**2, 6)
        transposed = jacobian.transpose(0, 2, 1)
        normal = transposed @ jacobian
        # Damped (Marquardt, 1963): a picture of stripes says nothing about a shift along them.
        diagonal = np.arange(normal.shape[1])
        normal[:, diagonal, diagonal] = normal[:, diagonal, diagonal] * (1 + DAMPING) + DAMPING
        step = np.linalg.solve(normal, transposed @ warped.reshape(len(source), -1, 1))[:, :4, 0]
        warp = np.clip(warp - step, -bound, bound).astype(np.float32)
    rows, columns = axes()
    shared = _inside(rows)[:, :, None] * _inside(columns)[:, None, :]
    return _masked_correlation(_resampled(source, rows, columns), target, shared)


def _inside(coordinates: Floats) -> Floats:
    """1 where a coordinate lies in the thumbnail, else 0."""
    return ((coordinates >= -0.5) & (coordinates <= THUMBNAIL_SIDE - 0.5)).astype(np.float32)


def _resampled(images: Floats, rows: Floats, columns: Floats) -> Floats:
    """Images (n, S, S) at fractional rows (n, S) and columns (n, S), bilinear, repeated beyond the edges."""
    along_rows = _interpolated(images, rows)
    return _interpolated(along_rows.transpose(0, 2, 1), columns).transpose(0, 2, 1)


def _interpolated(images: Floats, coordinates: Floats) -> Floats:
    """Rows of each image (n, S, S) at fractional coordinates (n, S)."""
    clipped = np.clip(coordinates, 0, THUMBNAIL_SIDE - 1)
    lower = np.minimum(clipped.astype(np.int64), THUMBNAIL_SIDE - 2)
    weight = (clipped - lower)[:, :, None]
    image = np.arange(len(images))[:, None]
    mixed = images[image, lower] * (1 - weight) + images[image, lower + 1] * weight
    return np.asarray(mixed, np.float32)


def _masked_correlation(one: Floats, other: Floats, mask: Floats) -> Floats:
    """Correlation of each pair of images (n, S, S) where the mask is 1."""
    count = mask.sum(axis=(1, 2), keepdims=True)
    one, other = (((v - (v * mask).sum(axis=(1, 2), keepdims=True) / count) * mask) for v in (one, other))
    norms = np.sqrt(np.square(one).sum(axis=(1, 2)) * np.square(other).sum(axis=(1, 2)))
    return np.asarray((one * other).sum(axis=(1, 2)) / np.maximum(norms, 1e-6), np.float32)
