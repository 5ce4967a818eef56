"""One run of a study under Tune.

Trials, failure handling, the journal's callback and progress displays.
"""
