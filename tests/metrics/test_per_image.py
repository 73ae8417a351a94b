"""Metrics of every image."""

from dataclasses import replace

import numpy as np
import pytest
from textbook import SMALL

import harness
from harness.metrics import per_image

SETTINGS = [
    {},
    {"sigma": "learned", "seed": 3},
    {"latent": "deterministic", "kl_weight": 0.0},
    {"likelihood": "bernoulli"},
    {"likelihood": "bernoulli", "binarization": "threshold"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_means_over_images_are_the_logged_values(settings, tiny):
    config = SMALL.replace(epochs=1, **settings)
    logged = harness.train_and_evaluate(config, tiny, device="cpu")
    measured = tiny.drawn(config.binarization)
    for part in ("val", "test"):
        split, variance = getattr(measured, part), logged.metrics["val/mse"]
        found = per_image(logged.model, split, config.seed, part=part, variance=variance)
        names = {"error": "mse", "rate": "rate", "distortion": "distortion", "neg_elbo": "neg_elbo"}
        assert set(found) == {n for n, name in names.items() if f"{part}/{name}" in logged.metrics}
        for name, values in found.items():
            assert values.shape == (len(split),)
            assert values.dtype == np.float64
            expected = logged.metrics[f"{part}/{names[name]}"]
            np.testing.assert_allclose(values.mean(), expected, rtol=1e-9)


def test_the_variance_is_fitted_to_the_images_and_batch_statistics_are_held(tiny, registered):
    result = harness.train_and_evaluate(SMALL.replace(epochs=1), tiny, device="cpu")
    default = per_image(result.model, tiny.val, part="val")
    np.testing.assert_allclose(default["neg_elbo"].mean(), result.metrics["val/neg_elbo"])
    again = per_image(result.model.train(), replace(tiny.val), part="val")
    assert result.model.training
    assert all((again[name] == values).all() for name, values in default.items())
