"""From the study file to the parts that run it, without spending compute."""
