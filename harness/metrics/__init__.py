"""Metrics of trained models, each a function of one run and a split."""

from harness.metrics.evaluate import per_image as per_image
