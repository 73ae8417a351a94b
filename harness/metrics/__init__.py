"""Metrics of trained models, each a function of one run and a split."""
