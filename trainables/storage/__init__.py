"""Files that outlive a process: atomic writes, checkpoints, results computed once."""
