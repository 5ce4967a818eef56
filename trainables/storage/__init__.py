"""Persistent files: atomic writes, checkpoints, results computed once per machine."""
