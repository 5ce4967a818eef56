"""Pictures per second of each corruption beside the reference package, at 224 px on one thread, by CPU time.

    pip install --target REFERENCE imagecorruptions-imaug scikit-image opencv-python-headless numba
    PYTHONPATH=.:REFERENCE python -m benchmarks.corruptions

Both corrupt the same pictures at all five severities, one after the other in one process, five times; of each the best
time counts. The reference corrupts picture by picture, as it is made to. At the end stand the mean of the ratios and
the smallest one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import cv2
import imagecorruptions as package
import numpy as np
import torch

from benchmarks.support.corruption_pictures import LARGE, pictures
from trainables.data.corruptions import COMMON, SEVERITIES, corrupt

ROUNDS = 5


def measure(rounds: int) -> list[dict[str, Any]]:
    """CPU milliseconds per picture of both, and their ratio, by corruption."""
    originals = pictures(LARGE)
    images = torch.from_numpy(originals.copy())
    names = [str(number) for number in range(len(images))]
    rows = []
    for name in COMMON:

        def ours(name: str = name) -> None:
            for severity in SEVERITIES:
                corrupt(images, name, severity, 0, names)

        def reference(name: str = name) -> None:
            for severity in SEVERITIES:
                for picture in originals:
                    package.corrupt(picture, severity, name)

        best = {"ours": float("inf"), "reference": float("inf")}
        for function in (ours, reference):  # tables and compiled code
            function()
        for _ in range(rounds):
            for key, function in (("ours", ours), ("reference", reference)):
                best[key] = min(best[key], cpu_seconds(function))
        count = len(images) * len(SEVERITIES)
        row = {key: 1000 * seconds / count for key, seconds in best.items()}
        rows.append({"corruption": name, **row, "ratio": row["reference"] / row["ours"]})
        print(
            f"{name:<18} {row['ours']:7.2f} ms {1000 / row['ours']:7.0f}/s   reference {row['reference']:7.2f} ms "
            f"{1000 / row['reference']:7.0f}/s   {row['reference'] / row['ours']:5.1f} x",
            flush=True,
        )
    return rows


def cpu_seconds(function: Callable[[], None]) -> float:
    """CPU time of one call, over all threads of the process."""
    began = time.process_time()
    function()
    return time.process_time() - began


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = measure(args.rounds)
    ratios = [row["ratio"] for row in rows]
    print(f"mean of the ratios {np.mean(ratios):.2f}, smallest {min(ratios):.2f}")
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
