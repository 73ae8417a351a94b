"""Training: the step, the epochs, checkpoints of unfinished runs, and the provenance of runs."""
