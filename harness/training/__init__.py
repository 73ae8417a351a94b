"""Training: the step, the epochs, and checkpoints of unfinished runs."""
