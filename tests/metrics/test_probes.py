"""Probes find what was put into the latents, and nothing else."""

import numpy as np
import pytest
import torch

from harness import RunConfig, probe
from harness.vae import initial


def encoder_of(data, columns):
    """Return a linear model whose posterior means are the given columns of the pixels."""
    config = RunConfig(model="linear", latent_size=len(columns))
    run = initial(config, data.image_shape)
    with torch.no_grad():
        run.encoder[0].weight.zero_()
        run.encoder[0].bias.zero_()
        for latent, column in enumerate(columns):
            run.encoder[0].weight[latent, column] = 1.0
    return run


def test_all_pixels_tell_the_digit_and_a_constant_does_not(data):
    assert probe.linear_probe_accuracy(encoder_of(data, range(64)), data) > 0.9
    corner = probe.linear_probe_accuracy(encoder_of(data, [0]), data)  # an always empty pixel
    assert corner == pytest.approx(0.1, abs=0.05)


def test_means_are_those_of_the_encoder(data):
    means = probe.posterior_means(encoder_of(data, [20, 30]), data.test)
    pixels = data.test.pixels(slice(None), torch.float32).numpy()
    assert np.allclose(means, pixels[:, [20, 30]])


def test_two_latents_are_shown_directly_and_one_on_a_line(data):
    means = probe.posterior_means(encoder_of(data, [20, 30]), data.test)
    assert np.allclose(probe.latent_plane(encoder_of(data, [20, 30]), data.test), means)
    line = probe.latent_plane(encoder_of(data, [20]), data.test)
    assert np.allclose(line, np.column_stack([means[:, 0], np.zeros(len(means))]))


def test_more_latents_are_shown_by_their_principal_components(data):
    from sklearn.decomposition import PCA

    run = encoder_of(data, [10, 20, 30, 40])
    places = probe.latent_plane(run, data.test)
    expected = PCA(2).fit_transform(probe.posterior_means(run, data.test))
    assert np.allclose(np.abs(places), np.abs(expected), atol=1e-5)


def test_one_class_among_the_images_it_is_fitted_on_is_no_number(data, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_IMAGES", 1)
    assert np.isnan(probe.linear_probe_accuracy(encoder_of(data, range(64)), data))


def test_neighbours_tell_the_digit_from_all_pixels_and_not_from_a_constant(data):
    assert probe.knn_accuracy(encoder_of(data, range(64)), data) > 0.95
    assert probe.knn_accuracy(encoder_of(data, [0]), data) < 0.2


def test_neighbours_are_those_of_scikit_learn_on_the_means_as_they_are(data):
    from sklearn.neighbors import KNeighborsClassifier

    run = encoder_of(data, [20, 30, 40])
    with torch.no_grad():
        run.encoder[0].weight[0] *= 10  # a wide latent counts more; standardised it would not
    known = KNeighborsClassifier(5).fit(
        probe.posterior_means(run, data.train), data.train.labels.numpy()
    )
    expected = known.score(probe.posterior_means(run, data.test), data.test.labels.numpy())
    assert probe.knn_accuracy(run, data) == expected
