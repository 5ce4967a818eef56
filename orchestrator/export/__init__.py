"""Models that leave a study: exported folders, and predictions of such a folder for new pictures."""
