"""From the study file to the parts that run it, and all that can be known of a study before anything is spent."""
