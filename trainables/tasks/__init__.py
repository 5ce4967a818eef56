"""What is learned: heads, losses, metrics, closed-form probes."""
