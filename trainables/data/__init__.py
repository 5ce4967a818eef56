"""Data of a trial: pixel store, splits, transforms, feature cache."""
