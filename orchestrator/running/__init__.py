"""One run of a study: trials under Tune, failure handling, the journal's callback and progress displays."""
