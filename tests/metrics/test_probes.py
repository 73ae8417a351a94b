"""Probes find what was put into the latents, and nothing else."""

import numpy as np
import pytest
import torch

from harness.config import RunConfig
from harness.metrics import probes
from harness.metrics.evaluate import posteriors
from harness.models.vae import build


def encoder_of(data, columns):
    """Return a linear model whose posterior means are the given columns of the pixels."""
    config = RunConfig(model="linear", latent_size=len(columns))
    run = build(config, data.image_shape, data.train.largest)
    with torch.no_grad():
        run.encoder[1].weight.zero_()
        run.encoder[1].bias.zero_()
        for latent, column in enumerate(columns):
            run.encoder[1].weight[latent, column] = 1.0
    return run


def test_all_pixels_tell_the_digit_and_a_constant_does_not(data):
    assert probes.probe_metrics(encoder_of(data, range(64)), data)["probe_accuracy"] > 0.9
    corner = probes.probe_metrics(encoder_of(data, [0]), data)[
        "probe_accuracy"
    ]  # an always empty pixel
    assert corner == pytest.approx(0.1, abs=0.05)


def test_means_are_those_of_the_encoder(data):
    means = posteriors(encoder_of(data, [20, 30]), data.test).mean.numpy()
    pixels = data.test.pixels(slice(None), torch.float32).numpy()
    assert np.allclose(means, pixels[:, [20, 30]])


def test_two_latents_are_shown_directly_and_one_on_a_line(data):
    means = posteriors(encoder_of(data, [20, 30]), data.test).mean.numpy()
    assert np.allclose(probes.latent_plane(encoder_of(data, [20, 30]), data.test), means)
    line = probes.latent_plane(encoder_of(data, [20]), data.test)
    assert np.allclose(line, np.column_stack([means[:, 0], np.zeros(len(means))]))


def test_more_latents_are_shown_by_their_principal_components(data):
    from sklearn.decomposition import PCA

    run = encoder_of(data, [10, 20, 30, 40])
    places = probes.latent_plane(run, data.test)
    expected = PCA(2).fit_transform(posteriors(run, data.test).mean.numpy())
    assert np.allclose(np.abs(places), np.abs(expected), atol=1e-5)


def test_one_class_among_the_images_it_is_fitted_on_is_no_number(data, monkeypatch):
    monkeypatch.setattr(probes, "PROBE_IMAGES", 1)
    assert np.isnan(probes.probe_metrics(encoder_of(data, range(64)), data)["probe_accuracy"])


def test_neighbours_tell_the_digit_from_all_pixels_and_not_from_a_constant(data):
    assert probes.probe_metrics(encoder_of(data, range(64)), data)["knn_accuracy"] > 0.95
    assert probes.probe_metrics(encoder_of(data, [0]), data)["knn_accuracy"] < 0.2


def test_neighbours_are_those_of_scikit_learn_on_the_means_as_they_are(data):
    from sklearn.neighbors import KNeighborsClassifier

    run = encoder_of(data, [20, 30, 40])
    with torch.no_grad():
        run.encoder[1].weight[0] *= 10  # a wide latent counts more; standardised it would not
    known = KNeighborsClassifier(5).fit(
        posteriors(run, data.train).mean.numpy(), data.train.labels.numpy()
    )
    expected = known.score(posteriors(run, data.test).mean.numpy(), data.test.labels.numpy())
    assert probes.probe_metrics(run, data)["knn_accuracy"] == expected
