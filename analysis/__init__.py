"""From MLflow to tidy frames, figures and reports; imports no torch."""
