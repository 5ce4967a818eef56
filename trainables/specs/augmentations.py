"""Training augmentations by the names that a study file gives them."""

from __future__ import annotations

AUGMENTATIONS = {
    "flip": "mirror left-right with probability 1/2",
    "crop": "a random square of the network's side out of the stored image, padded by reflection where both are equal",
}
"""Values of `data.augment`, and what they do; each image has a draw of its own."""

MASK_AUGMENTATIONS = {
    "flip": "mirror left-right with probability 1/2",
    "crop": "a random square of the network's side out of the picture at its own size, padded where it is smaller",
    "scale": "scale the picture by a factor between 1/2 and 2",
    "jitter": "change brightness, contrast and saturation by up to a half, in random order",
}
"""The same for pictures with masks; each picture has a draw of its own, and its mask the same."""
