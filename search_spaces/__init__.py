"""What Optuna may choose. One public file per strategy, the same stem as in `trainables`; imports optuna only."""

from __future__ import annotations
