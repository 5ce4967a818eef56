"""Specification of a trial: its settings, metric table, seeds, errors, redaction, injected faults."""
