"""Training and evaluation of one trial, and its Tune trainable."""
