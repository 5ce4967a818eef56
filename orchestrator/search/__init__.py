"""What to try next: Optuna behind a Tune searcher, rebuilt from the journal whenever the two disagree."""
