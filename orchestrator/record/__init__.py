"""A study's record: the append-only journal, and what follows from it alone.

Nothing here runs anything.
"""
