"""What a trial is asked to do and what it measures; errors, seeds, injected faults."""
