"""Linear probing: nothing for a search to choose, because one trial computes the whole regularisation path."""

from __future__ import annotations

from search_spaces._law import Law, Preset

# C is chosen inside the trial, on ID validation, from 100 values spaced evenly in the logarithm between 1e-7 and 1e2
# (Kumar et al., ICLR 2022; papers/002, "Implementation Details"). A search over C would only repeat that slowly.
SPACE: dict[str, Law] = {}

PRESETS: dict[str, Preset] = {
    "paper": Preset(source="papers/002: C on ID validation, 100 values from 1e-7 to 1e2, within one trial"),
    # One trial per decade of the same interval: shows how accuracy, also out of distribution, depends on C.
    "grid": Preset(
        steps=({"C": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)},),
        source="the decades of the interval of papers/002",
    ),
}
