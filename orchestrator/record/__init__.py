"""A study's record: the append-only journal, and what can be known from it alone. Nothing here runs anything."""
