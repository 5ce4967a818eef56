"""Trial records of finished entries, made without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.record.records import TrialRecord

Values = float | Sequence[float]
"""One number for all seeds, or one per seed."""


def entry(
    number: int,
    label: str,
    test: Values,
    ood: Values = 0.5,
    strategy: str | None = None,
    hparams: Mapping[str, Any] | None = None,
    curves: Sequence[Mapping[str, Any]] = (),
    **metrics: Values,
) -> list[TrialRecord]:
    """One search trial and its confirmations, one per value of `test`; metrics are named with `__` for `/`.

    The search trial's test and OOD accuracy is 0.99: a table or sentence that shows 99 % read the wrong trial.
    """
    tests = [test] if isinstance(test, float) else list(test)
    shared: dict[str, Any] = {"strategy": strategy or label, "label": label, "config_hash": f"h{label}"}
    shared |= {"state": "complete", "hparams": hparams or {}}
    search = {"best/val/acc": 0.9 - number / 100, "test/acc": 0.99, "ood/mean/acc": 0.99}
    search |= {k.replace("__", "/"): v if isinstance(v, float) else v[0] for k, v in metrics.items()}
    records = [TrialRecord(trial_id=f"{label}-s", number=100 * number, metrics=search, **shared)]
    for seed, accuracy in enumerate(tests):
        values = {"test/acc": accuracy, "ood/mean/acc": ood if isinstance(ood, float) else ood[seed]}
        values |= {k.replace("__", "/"): v if isinstance(v, float) else v[seed] for k, v in metrics.items()}
        confirmation: dict[str, Any] = {
            "trial_id": f"{label}-{seed}",
            "number": 100 * number + seed + 1,
            "seed": seed,
            "role": "confirm",
        }
        curve = curves[seed] if curves else {}
        records.append(TrialRecord(metrics=values, curves=curve, **shared, **confirmation))
    return records


def reference(sample: str, seed: int, shift: float) -> TrialRecord:
    """A LayerNorm reference trial of the shift ratio (FSR) on one sample of the data."""
    metrics = {"ln_shift/last/total": shift, "cost/training_images": 100.0}
    shared: dict[str, Any] = {"strategy": "layernorm", "label": "layernorm", "config_hash": "hr", "state": "complete"}
    number = 9000 + 10 * seed + len(sample)
    return TrialRecord(
        trial_id=f"r{sample}{seed}",
        number=number,
        role="reference",
        sample=sample,
        seed=seed,
        metrics=metrics,
        **shared,
    )


def shift_ratio(low: float, middle: float, high: float, sample: str = "full") -> list[TrialRecord]:
    """Reference trials whose FSR of three seeds are the three numbers."""
    target = [reference("1", seed, value) for seed, value in enumerate((low, middle, high))]
    return target + [reference(sample, seed, 1.0) for seed in range(3)]


# t(2) = 4.3027: three values m − d, m, m + d have the interval ± 2.4842 d.
FULL = entry(0, "full", (0.96, 0.97, 0.98), (0.40, 0.41, 0.42))
PROBE = entry(1, "linear_probe", (0.90, 0.90, 0.90), (0.50, 0.50, 0.50))
