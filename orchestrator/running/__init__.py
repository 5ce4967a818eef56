"""One run of a study: Tune runs the trials, and whatever happens to them is noticed, told and recorded."""
