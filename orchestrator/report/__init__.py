"""A study as one HTML page that opens anywhere. Pure functions on its journal."""
