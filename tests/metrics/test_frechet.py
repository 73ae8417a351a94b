"""Fréchet distances: closed forms, invariants, and real images against worse ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import ortho_group

from harness import streams
from harness.config import RunConfig
from harness.metrics.frechet import Gaussian, distance, measure_images, moments, reference
from harness.models.vae import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def known(data, folder):
    return reference(data, folder)


def gaussian(size=6, rank=6, seed=0):
    draw = np.random.default_rng(seed)
    factor = draw.normal(size=(size, rank))
    return Gaussian(draw.normal(size=size), factor @ factor.T)


# --- the formula ----------------------------------------------------------------------------------


def test_equal_sets_have_distance_zero_also_where_features_are_constant():
    for rank in (6, 2):
        one = gaussian(rank=rank)
        assert distance(one, one) == pytest.approx(0, abs=1e-10)


def test_a_translation_costs_its_squared_length():
    one = gaussian()
    shift = np.arange(6.0)
    moved = Gaussian(one.mean + shift, one.covariance)
    assert distance(one, moved) == pytest.approx(np.square(shift).sum())


def test_a_scaling_costs_the_squared_difference_of_the_deviations():
    one = gaussian()
    wider = Gaussian(one.mean, 9 * one.covariance)
    assert distance(one, wider) == pytest.approx(4 * np.trace(one.covariance))


def test_commuting_covariances_differ_by_their_deviations():
    basis = ortho_group.rvs(4, random_state=0)
    first, second = np.array([4.0, 1.0, 0.25, 0.0]), np.array([1.0, 1.0, 9.0, 0.04])
    one, other = (Gaussian(np.zeros(4), basis * v @ basis.T) for v in (first, second))
    expected = np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert distance(one, other) == pytest.approx(expected)


def test_it_is_the_published_formula_symmetric_and_blind_to_rotations():
    one, other = gaussian(seed=1), gaussian(seed=2)
    root = sqrtm(one.covariance @ other.covariance)
    expected = np.square(one.mean - other.mean).sum()
    expected += np.trace(one.covariance + other.covariance - 2 * root.real)
    assert distance(one, other) == pytest.approx(expected)
    assert distance(other, one) == pytest.approx(expected)
    turn = ortho_group.rvs(6, random_state=0)
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T) for g in (one, other)]
    assert distance(*turned) == pytest.approx(expected)


def test_moments_are_mean_and_covariance():
    values = np.random.default_rng(0).normal(size=(50, 3))
    found = moments(torch.from_numpy(values))
    assert np.allclose(found.mean, values.mean(0))
    assert np.allclose(found.covariance, np.cov(values.T, bias=True))


def test_what_is_not_finite_has_no_distance():
    values = torch.full((5, 6), torch.nan)
    assert np.isnan(distance(moments(values), gaussian()))


# --- images ---------------------------------------------------------------------------------------


def to_test_images(known, pixels):
    with torch.no_grad():
        return distance(moments(known.net.embed(pixels.view(-1, 1, 8, 8))), known.test)


def test_the_distance_grows_with_noise_and_is_zero_without(data, known):
    pixels = data.test.pixels(slice(None), torch.float32)
    noise = torch.randn_like(pixels)
    found = [to_test_images(known, pixels + s * noise) for s in (0, 0.05, 0.1, 0.2, 0.4, 0.8)]
    assert found[0] == pytest.approx(0, abs=1e-4)
    assert found == sorted(found)


def test_other_real_images_are_near_and_noise_is_far(data, known):
    assert known.images == len(data.test)
    noise = torch.rand(known.images, 64)
    assert 0 < known.floor < 0.05 * to_test_images(known, noise)
    assert known.accuracy > 0.95


def test_a_perfect_decoder_has_distance_zero_and_a_collapsed_one_is_far(data, known):
    whole = RunConfig(model="linear", latent_size=64)
    run = build(whole, data.image_shape)
    with torch.no_grad():
        for part, columns in ((run.encoder[1], 128), (run.decoder[0], 64)):
            part.weight.copy_(torch.eye(64).repeat(columns // 64, 1))
            part.bias.zero_()
    found = measure_images(whole, run, data, known)
    assert found["frechet_reconstructions"] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        run.decoder[0].weight.zero_()
    collapsed = measure_images(whole, run, data, known)
    assert collapsed["frechet"] == pytest.approx(collapsed["frechet_reconstructions"])
    assert collapsed["frechet"] > 10 * known.floor
    assert collapsed["frechet_floor"] == found["frechet_floor"] == known.floor


def test_prior_samples_are_decoder_means_of_standard_normal_latents(data, known):
    # A decoder that shows its one latent as the brightness of every image.
    config = RunConfig(model="linear", latent_size=1, seed=3)
    run = build(config, data.image_shape)
    with torch.no_grad():
        run.decoder[0].weight.fill_(0.1)
        run.decoder[0].bias.fill_(0.5)
    found = measure_images(config, run, data, known)
    z = streams.generator(3, "frechet", latent_size=1)
    drawn = torch.from_numpy(z.standard_normal((261, 1), dtype=np.float32))
    images = (drawn * 0.1 + 0.5).expand(-1, 64)
    assert found["frechet"] == pytest.approx(to_test_images(known, images), rel=1e-4)


def test_features_are_computed_to_the_same_bits_at_every_call(tiny, folder):
    # A CPU heeds no such setting, so it is only seen to be made.
    known, seen = reference(tiny, folder), []
    known.net.features.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cudnn.deterministic)
    )
    measure_images(RunConfig(), build(RunConfig(), tiny.image_shape), tiny, known)
    assert set(seen) == {True}
    assert not torch.backends.cudnn.deterministic


def test_sets_have_equal_size_if_there_are_fewer_training_images(data, folder):
    few = replace(data, train=data.train.head(64))
    assert reference(few, folder).images == 64
