"""The pixel store as a trial reads it: splits, transforms, batches, cached features."""
