"""From records to conclusions: selection, leaderboard, FSR, sentences. Pure functions."""
