"""The closed form of the linear VAE: against reference numbers, against matrices, against a run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import EIGENVALUES, gaussian
from exact import linear_vae
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA

from harness import RunConfig, UserError, load_dataset
from harness.data.dataset import Dataset, Split, with_official_training
from harness.linear.pca import PCA as Components
from harness.linear.pca import pca, pixels
from harness.linear.vae import LinearOptimum, linear_losses, linear_metrics
from harness.metrics.evaluate import active_units, coefficients, evaluate, measure
from harness.models.vae import VAE
from harness.objective import kl_per_latent, with_decoder_variance
from harness.training.engine import train

LINEAR = RunConfig(model="linear", latent_size=10)


# --- the PCA floor --------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_size", [1, 10, 63])
def test_the_floor_is_the_error_of_scikit_learns_projection(data, latent_size):
    known = PCA(latent_size, svd_solver="full").fit(pixels(data.train))
    for split in (data.train, data.test):
        x = pixels(split)
        again = known.inverse_transform(known.transform(x))
        floor = pca(data).floor(split, latent_size)
        assert floor == pytest.approx(np.square(x - again).mean(), rel=1e-9)


def test_the_floor_of_the_training_split_is_the_sum_of_the_discarded_eigenvalues(data):
    known = pca(data)
    expected = known.variances[10:].sum() / data.pixels
    assert known.floor(data.train, 10) == pytest.approx(expected, rel=1e-9)
    assert known.floor(data.train, data.pixels) == 0


def test_pixels_that_never_change_have_variance_exactly_zero(data):
    known = pca(data).variances
    constant = int((pixels(data.train).var(0) == 0).sum())
    assert constant > 0
    assert (known == 0).sum() >= constant
    assert LinearOptimum(pca(data), data.pixels, 0.0).active.sum() <= 64 - constant


def test_a_dataset_that_was_cut_has_its_own_components(data, tiny):
    # Its digest is that of its source.
    assert tiny.digest == data.digest
    whole, cut = pca(data), pca(tiny)
    assert cut.variances.sum() == pytest.approx(pixels(tiny.train).var(0).sum(), rel=1e-12)
    assert cut.variances[0] != whole.variances[0]


# --- fewer training images than pixels ------------------------------------------------------------


@pytest.fixture(scope="module")
def few() -> Dataset:
    """Return 24 training images of 48 pixels, correlated, and as many others."""
    images = torch.rand(72, 3, 4, 4).cumsum(-1).cumsum(-2) / 16
    rows = {"train": range(24), "val": range(24, 48), "test": range(48, 72)}
    return Dataset.from_tensors("few", images, rows=rows)


def covariances_pca(split: Split) -> Components:
    """Return all D components and eigenvalues of a covariance, none of them beyond the rank."""
    x = pixels(split)
    values, columns = np.linalg.eigh(np.cov(x.T, bias=True))
    values[: len(values) - len(x) + 1] = 0
    return Components(x.mean(0), columns[:, ::-1], values[::-1])


def test_of_few_images_the_components_are_those_of_the_covariance(few):
    known, full = pca(few), covariances_pca(few.train)
    assert known.components.shape == (48, 23)
    assert (known.variances[:23] > 0).all()
    assert (known.variances[23:] == 0).all()
    assert known.variances == pytest.approx(full.variances, rel=1e-9)
    assert known.components.T @ known.components == pytest.approx(np.eye(23), abs=1e-12)
    for split in (few.train, few.val, few.test):
        for size in (0, 1, 22, 23):
            expected = full.floor(split, size)
            assert known.floor(split, size) == pytest.approx(expected, rel=1e-9, abs=1e-15)
        floors = [known.floor(split, size) for size in range(49)]
        assert floors == sorted(floors, reverse=True)
        assert floors[-1] == 0
    for size in (1, 22, 40):
        expected = full.likeliest_variance(size)
        assert known.likeliest_variance(size) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("part", ["train", "val", "test", None])
@pytest.mark.parametrize("size", [1, 10, 23, 24, 48, 60])
def test_of_few_images_every_metric_is_that_of_the_whole_decomposition(few, size, part):
    split = part and getattr(few, part)
    names = ("active", "kl", "rate", "mse", "loss", "active_units")
    for variance in (1e-5, 0.003, 0.1, 10.0):
        best = LinearOptimum(pca(few), size, variance, split)
        full = LinearOptimum(covariances_pca(few.train), size, variance, split)
        for name in (*names, "log_likelihood"):
            assert getattr(best, name) == pytest.approx(getattr(full, name), rel=1e-9), name
        assert best.distortion(0.02) == pytest.approx(full.distortion(0.02), rel=1e-9)
        assert best.neg_elbo() == pytest.approx(full.neg_elbo(), rel=1e-9)
    plain = LinearOptimum(pca(few), size, 0.0, split)
    whole = LinearOptimum(covariances_pca(few.train), size, 0.0, split)
    assert plain.loss == plain.mse == pytest.approx(whole.mse, rel=1e-9, abs=1e-15)
    assert plain.rate == math.inf


def test_a_model_of_few_images_is_at_its_optimum_with_more_latents_than_components(few):
    config = with_decoder_variance(LINEAR.replace(latent_size=40), 0.003, few.pixels)
    x = few.test.pixels(slice(None), torch.float64)
    loss = expected_loss(linear_vae(config, few), x, 0.003).item()
    assert loss == pytest.approx(LinearOptimum(pca(few), 40, 0.003, few.test).loss, rel=1e-10)


# --- reference numbers of SCIENCE.md, section 3 ---------------------------------------------------


@pytest.fixture(scope="module")
def mnist(mnist_folder) -> Dataset:
    """Return MNIST with all 60,000 training images as training split, as in the reference."""
    return with_official_training(load_dataset("mnist", mnist_folder))


def test_the_spectrum_of_mnist(mnist):
    known = pca(mnist).variances
    first = [5.1168, 3.7413, 3.2527, 2.8416, 2.5671, 2.2736, 1.7251, 1.5205, 1.4563, 1.2427]
    assert known[:10] == pytest.approx(first, abs=5e-5)
    assert known.sum() == pytest.approx(52.7250, abs=5e-5)
    assert known.sum() / 784 == pytest.approx(0.067251, abs=5e-7)


def test_the_losses_of_mnist_are_those_of_the_reference(mnist):
    # (latents, weight): active latents and loss in the seed's units, mse + weight * rate / 784.
    reference = {
        (2, 1): (2, 0.059995),
        (5, 1): (5, 0.054206),
        (10, 1): (10, 0.050640),
        (16, 1): (16, 0.049687),
        (20, 1): (20, 0.049586),
        (23, 1): (23, 0.049580),
        (50, 1): (23, 0.049580),
        (20, 2): (12, 0.058006),
        (20, 0.1): (20, 0.029468),
        (20, 10.4): (0, 0.067251),
    }
    for (size, weight), (active, loss) in reference.items():
        best = LinearOptimum(pca(mnist), size, weight / 2)
        assert best.loss == pytest.approx(loss, abs=5e-7)
        assert best.active.sum() == active
    best = LinearOptimum(pca(mnist), 20, 0.5)
    assert best.rate == pytest.approx(10.083, abs=5e-4)
    assert best.mse == pytest.approx(0.036725, abs=5e-7)


def test_the_floors_and_likelihoods_of_mnist_are_those_of_the_reference(mnist):
    known = pca(mnist)
    floors = {2: (0.05595, 0.05567), 10: (0.03442, 0.03407), 20: (0.02397, 0.02354)}
    for size, (on_train, on_test) in (floors | {50: (0.01179, 0.01149)}).items():
        assert LinearOptimum(known, size, 0.0).mse == pytest.approx(on_train, abs=5e-6)
        assert known.floor(mnist.test, size) == pytest.approx(on_test, abs=5e-6)
    for size, variance, on_train, on_test in (
        (10, 0.03487, 182.15, 186.02),
        (20, 0.02460, 299.76, 306.55),
    ):
        likeliest = known.likeliest_variance(size)
        assert likeliest == pytest.approx(variance, abs=5e-6)
        trained = LinearOptimum(known, size, likeliest)
        assert trained.log_likelihood == pytest.approx(on_train, abs=5e-3)
        held_out = LinearOptimum(known, size, likeliest, mnist.test)
        assert held_out.log_likelihood == pytest.approx(on_test, abs=5e-3)


# --- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.002, 0.05, 0.3, 2.0])
def test_on_training_data_the_metrics_are_the_formulas_of_the_eigenvalues(data, variance):
    values = pca(data).variances
    best = LinearOptimum(pca(data), 10, variance)
    used = values[:10][values[:10] > variance]
    assert best.active.sum() == len(used)
    rate = sum(math.log(value / variance) / 2 for value in used)
    error = len(used) * variance + values[len(used) :].sum()
    assert best.kl == pytest.approx([max(0, math.log(v / variance) / 2) for v in values[:10]])
    assert best.rate == pytest.approx(rate)
    assert best.mse == pytest.approx(error / 64)
    assert best.loss == pytest.approx((error + 2 * variance * rate) / 64)
    assert best.active_units == sum(1 - variance / value > 0.01 for value in values[:10])
    assert best.neg_elbo() == pytest.approx(32 * (math.log(2 * math.pi * best.mse) + 1) + rate)
    read = LinearOptimum(pca(data), 10, variance, data.train)
    assert (read.loss, read.rate) == pytest.approx((best.loss, best.rate), rel=1e-9)


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("variance", [0.002, 0.05, 0.3])
def test_the_elbo_is_the_log_likelihood_on_every_split(data, part, variance):
    # The encoder is the exact posterior on any image, so the bound is tight on held-out data too.
    best = LinearOptimum(pca(data), 10, variance, getattr(data, part))
    elbo = -64 / 2 * (math.log(2 * math.pi * variance) + best.loss / variance)
    assert best.log_likelihood == pytest.approx(elbo, rel=1e-10)
    x, known = pixels(getattr(data, part)), pca(data)
    spread = np.where(best.active, known.variances, variance)
    model = multivariate_normal(known.mean, (known.components * spread) @ known.components.T)
    assert best.log_likelihood == pytest.approx(model.logpdf(x).mean(), rel=1e-9)


def test_the_likeliest_variance_is_scikit_learns_and_has_the_highest_likelihood(data):
    known = pca(data)
    best = known.likeliest_variance(10)
    peer = PCA(10, svd_solver="full").fit(pixels(data.train))
    images = len(data.train)  # scikit-learn divides by N - 1
    assert best == pytest.approx(peer.noise_variance_ * (images - 1) / images, rel=1e-9)
    at = [LinearOptimum(known, 10, factor * best).log_likelihood for factor in (0.99, 1, 1.01)]
    assert at[1] == max(at)


def test_without_kl_the_linear_model_is_the_pca_floor(data):
    best = LinearOptimum(pca(data), 10, 0.0, data.test)
    assert best.loss == best.mse == pytest.approx(pca(data).floor(data.test, 10), rel=1e-12)
    assert best.rate == math.inf
    (metrics, with_kl) = (linear_metrics(LINEAR.replace(kl_weight=w), data) for w in (0.0, 0.1))
    names = {"loss", "mse", "rate", "neg_elbo", "active_units", "collapse_variance"}
    names.add("latents_above_variance")
    assert with_kl.keys() == {f"linear/{name}" for name in names} | {"test/pca_floor"}
    assert with_kl["test/pca_floor"] == metrics["test/pca_floor"] == metrics["linear/mse"]
    assert with_kl.keys() - metrics.keys() == {"linear/rate", "linear/neg_elbo"}


# --- a model at the optimum -----------------------------------------------------------------------


def at_variance(variance: float, **changes) -> RunConfig:
    return with_decoder_variance(LINEAR.replace(**changes), variance, 64)


def quadrature(split: Split, latent_size: int) -> tuple[Split, torch.Tensor]:
    """Return every image twice, with noise 1 and -1: the exact mean of a quadratic function.

    The squared error of a linear decoder is a quadratic function of the noise; over the pair odd
    terms cancel, and eps_i^2 is 1 as in the mean. The terms eps_i eps_j are left, which have weight
    0 where decoder columns are orthogonal, as they are at the optimum.
    """
    twice = replace(split, images=split.images.repeat(2, 1), labels=split.labels.repeat(2))
    sign = torch.ones(len(split), latent_size, dtype=torch.float64)
    return twice, torch.cat([sign, -sign])


EVERYTHING = pytest.mark.parametrize(
    "config",
    [
        at_variance(0.01),
        at_variance(0.05, kl_normalization="batch"),
        at_variance(0.15, latent_size=16, kl_normalization="latent"),
        at_variance(0.3, kl_normalization="sum"),
        at_variance(2.0),
    ],
    ids=["0.01", "0.05", "0.15", "0.3", "collapsed"],
)


@EVERYTHING
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_at_the_optimum_every_metric_is_its_closed_form(data, config, part):
    model, split = linear_vae(config, data), getattr(data, part)
    twice, noise = quadrature(split, config.latent_size)
    known = coefficients(config, data.pixels, model.device)
    linear = torch.from_numpy(linear_losses([config], data, split))[0]
    metrics = measure(config, model, twice, 10, noise, known, linear_loss=linear)
    variance = config.kl_weight * {  # beta / 2, from the table of SCIENCE.md
        "pixels": 1, "batch": 64, "latent": 64 / config.latent_size, "sum": 64 * config.batch_size
    }[config.kl_normalization] / 2  # fmt: skip
    best = LinearOptimum(pca(data), config.latent_size, variance, split)
    expected = {
        "mse": best.mse,
        "rate": best.rate,
        "loss": best.loss,
        "distortion": best.distortion(),
        "neg_elbo": best.neg_elbo(),
        "calibration_ratio": variance / best.mse,
        "active_units": best.active_units,
        "gap_to_linear": 0.0,
    } | {f"kl/{i}": value for i, value in enumerate(best.kl)}
    found = {name: metrics[name].item() for name in expected}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    fitted = torch.tensor(0.03, dtype=torch.float64)
    other = measure(config, model, twice, 10, noise, known, variance=fitted)
    assert other["distortion"].item() == pytest.approx(best.distortion(0.03), rel=1e-9)


def test_the_cases_have_all_kinds_of_latents(data):
    # Else the test above would be empty: all active, some, none, and the threshold of 0.01.
    counts = [LinearOptimum(pca(data), 10, v).active_units for v in (0.01, 0.3, 2.0)]
    assert counts[0] == 10
    assert 0 < counts[1] < 10
    assert counts[2] == 0
    value = pca(data).variances[4]
    near = LinearOptimum(pca(data), 10, 0.995 * value)
    assert (near.active.sum(), near.active_units) == (5, 4)


@pytest.mark.parametrize("variance", [0.01, 0.3])
def test_the_sampled_mse_is_the_closed_form_of_its_noise_and_right_in_the_mean(data, variance):
    config = at_variance(variance)
    model, known = linear_vae(config, data), pca(data)
    weights = coefficients(config, data.pixels, model.device)
    best = LinearOptimum(known, 10, variance)
    used, values = int(best.active.sum()), known.variances
    c = (pixels(data.train) - known.mean) @ known.components
    draws = []
    for _ in range(40):
        noise = torch.randn(len(data.train), 10, dtype=torch.float64)
        draws.append(measure(config, model, data.train, 10, noise, weights)["mse"].item())
        left = c.copy()  # what is left of each coordinate, by the formulas of the optimum
        deviation = np.sqrt((values - variance)[:used] * variance / values[:used])
        left[:, :used] *= variance / values[:used]
        left[:, :used] -= deviation * noise[:, :used].numpy()
        assert draws[-1] == pytest.approx(np.square(left).sum(1).mean() / 64, rel=1e-10)
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - best.mse) < 5 * error
    assert 5 * error < 5e-3 * best.mse


def test_the_gap_of_evaluate_is_zero_at_the_optimum_and_on_both_splits(data):
    config = at_variance(0.05)
    (metrics,) = evaluate([(config, linear_vae(config, data))], data)
    for name in ("val/gap_to_linear", "test/gap_to_linear", "gap_to_linear"):
        assert abs(metrics[name]) < 1.0  # %; 256 images with sampled noise, measured 0.1 and 0.2


@EVERYTHING
def test_the_aggregate_posterior_has_covariance_one_and_its_information_is_the_rate(data, config):
    posterior = linear_vae(config, data).encode(data.train.pixels(slice(None), torch.float64))
    variances = posterior.log_variance.exp()
    covariance = posterior.mean.T.cov(correction=0) + torch.diag(variances.mean(0))
    torch.testing.assert_close(covariance, torch.eye(config.latent_size).double())
    # Mutual information of x and z, were both Gaussian: what z varies by, less what is noise.
    information = (covariance.logdet() - posterior.log_variance.sum(-1).mean()) / 2
    rate = kl_per_latent(posterior.mean, posterior.log_variance).sum(-1).mean()
    assert information.item() == pytest.approx(rate.item(), abs=1e-9)


@pytest.mark.parametrize("variance", [0.01, 0.3])
def test_no_step_away_from_the_optimum_lowers_the_loss(data, variance):
    config = at_variance(variance)
    run = linear_vae(config, data)
    x = data.train.pixels(slice(None), torch.float64)
    least = expected_loss(run, x, variance)
    assert least.item() == pytest.approx(LinearOptimum(pca(data), 10, variance).loss, rel=1e-10)
    slopes = torch.autograd.grad(least, list(run.parameters()))
    assert max(slope.abs().max().item() for slope in slopes) < 1e-12
    with torch.no_grad():
        for _ in range(20):
            for parameter in run.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)
            assert expected_loss(run, x, variance) > least


@pytest.mark.parametrize(
    "change",
    [
        *({"model": "mlp"}, {"head": "relu"}, {"kl_weight": 0.0}, {"latent_size": 65}),
        *({"sigma": "optimal"}, {"likelihood": "bernoulli"}, {"free_bits": 0.1}),
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_run_without_a_linear_optimum_is_refused(data, change):
    with pytest.raises(UserError, match="the exact optimum needs"):
        linear_vae(LINEAR.replace(**change), data)


# --- a trained model ------------------------------------------------------------------------------


def expected_loss(run: VAE, x: torch.Tensor, variance: float) -> torch.Tensor:
    """Return the loss of a linear run with its mean over the noise: |w_i|^2 s_i^2 adds to SSE."""
    posterior = run.posterior(x.unflatten(1, run.data_shape))  # some pixels are above 1
    error = (x - run.decode(posterior.mean).flatten(1)).square().sum(-1)
    decoder, _ = run.decoder
    error = error + (posterior.log_variance.exp() * decoder.weight.square().sum(0)).sum(-1)
    kl = kl_per_latent(posterior.mean, posterior.log_variance).sum(-1)
    return (error + 2 * variance * kl).mean() / x.shape[-1]


def test_the_eigenvalues_of_a_known_gaussian_are_found():
    # The standard error of an eigenvalue is sqrt(2 / N) of it.
    found = pca(gaussian()).variances
    assert found == pytest.approx(EIGENVALUES, rel=5 * math.sqrt(2 / 2560))


TRAINED = {
    "digits": (load_dataset, (0.1, 0.3), 5, 0.04, 0.003),
    "gaussian": (gaussian, (0.1, 0.5), 3, 0.1, 0.007),
}
"""Data, decoder variances, latents, learning rate, and how far above the optimum the loss may be.

Measured: 0.0017 and 0.0006 on digits, 0.0016 and 0.005 on the Gaussian.
"""


@pytest.mark.parametrize("name", TRAINED)
def test_training_reaches_the_closed_form(name):
    # Adam's steps are large, so that 240 epochs suffice, and the weights go around the optimum;
    # their mean over the second half is compared.
    make, variances, size, rate, tolerance = TRAINED[name]
    known = make()
    base = LINEAR.replace(latent_size=size, learning_rate=rate, batch_size=256, epochs=240)
    configs = [with_decoder_variance(base, variance, known.pixels) for variance in variances]
    means = [
        {
            name: torch.zeros_like(weights)
            for name, weights in linear_vae(c, known).named_parameters()
        }
        for c in configs
    ]
    measured = replace(known, val=known.val.head(20))  # in every epoch, and not read
    for record in train(configs, measured, device="cpu", dtype=torch.float64):
        if record.epoch > 120:
            for s, mean in enumerate(means):
                for key, weights in record.model(s).named_parameters():
                    mean[key] += weights.detach() / 120
    x = known.train.pixels(slice(None), torch.float64)
    for s, variance in enumerate(variances):
        run, best = record.model(s), LinearOptimum(pca(known), size, variance)
        run.load_state_dict(means[s])
        assert 1 <= expected_loss(run, x, variance).item() / best.loss < 1 + tolerance
        posterior = run.posterior(x.unflatten(1, run.data_shape))
        kl = kl_per_latent(posterior.mean, posterior.log_variance).mean(0)
        assert kl.sum().item() == pytest.approx(best.rate, rel=0.02)
        assert active_units(posterior.mean).item() == best.active_units
