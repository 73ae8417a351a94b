"""Built-in loss terms: closed forms, the biases of docs/terms.md, and training with them."""

import math
import re
from pathlib import Path

import pytest
import torch
from textbook import flat
from torch import Tensor

import harness
from harness import RunConfig, UserError, objective, streams
from harness.linear.vae import linear_metrics
from harness.metrics.evaluate import evaluate
from harness.models.vae import build
from harness.objective import TERMS, Batch, Posterior
from harness.registry import BUILT_IN_TERMS

CORRELATED = torch.tensor([[1.0, 0.6, 0.3], [0.6, 1.0, 0.4], [0.3, 0.4, 1.0]])
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "terms.md").read_text()
CONFIG = RunConfig(hidden=(8,), latent_size=3, batch_size=16, epochs=2, learning_rate=0.01)
OPTIONS = {"mmd": {"bandwidth": 0.7}, "dip_i": {"ratio": 3.0}}


def of_latents(mean: Tensor, log_variance: Tensor, **given) -> Batch:
    """Return a batch whose z is drawn from the posterior; of the images nothing is given."""
    posterior = Posterior(mean, log_variance)
    drawn = {"z": posterior.sample(torch.randn_like(mean)), "prior": torch.randn_like(mean)}
    nothing = {"x": None, "output": None, "reconstruction": None, "training_size": 1000}
    return Batch(**nothing | drawn | {"posterior": posterior} | given)


def drawn(images: int, covariance: Tensor, sd: float, **given) -> Batch:
    """Return a batch of an aggregate posterior N(0, covariance) whose posteriors have this sd."""
    latents = len(covariance)
    factor = torch.linalg.cholesky(covariance - sd**2 * torch.eye(latents))
    mean = torch.randn(images, latents) @ factor.T
    return of_latents(mean, torch.full_like(mean, 2 * math.log(sd)), **given)


def test_built_in_terms_are_in_a_read_only_mapping():
    assert set(BUILT_IN_TERMS) <= set(TERMS)
    with pytest.raises(TypeError):
        TERMS["mine"] = len


@pytest.mark.parametrize("covariance", [torch.eye(3), CORRELATED], ids=["apart", "correlated"])
@pytest.mark.parametrize("count", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_total_correlation_of_gaussians(covariance, count):
    batches = (drawn(2000, covariance, 0.5, training_size=20_000) for _ in range(count))
    names = "total_correlation", "total_correlation_weighted"
    found = torch.tensor([[TERMS[name](batch) for name in names] for batch in batches]).mean(0)
    expected = -torch.logdet(covariance) / 2
    torch.testing.assert_close(found, expected.expand(2), rtol=0, atol=0.05)


def test_the_biases_of_the_page_are_those_of_small_batches():
    rows = re.findall(r"^\| (0\.\d) \| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    names = "total_correlation", "total_correlation_weighted"
    for sd, size, *biases in rows:
        given = {"training_size": int(size.replace(",", ""))}
        batches = [drawn(32, torch.eye(10), float(sd), **given) for _ in range(300)]
        for name, bias in zip(names, biases, strict=True):
            found = torch.stack([TERMS[name](batch) for batch in batches]).mean()
            assert found == pytest.approx(float(bias), abs=0.15), (name, sd, size)


def test_total_correlation_is_its_formula():
    batch = of_latents(torch.randn(5, 2), torch.randn(5, 2), training_size=7)
    q = torch.distributions.Normal(batch.posterior.mean, (batch.posterior.log_variance / 2).exp())
    density = q.log_prob(batch.z.unsqueeze(1)).exp()
    for name, own, other in (
        ("total_correlation", 1 / 7, 6 / (7 * 4)),
        ("total_correlation_weighted", 1 / 5, 1 / 5),
    ):
        weights = torch.full((5, 5), other).fill_diagonal_(own)
        joint = (weights * density.prod(-1)).sum(1).log()
        marginals = (weights.unsqueeze(-1) * density).sum(1).log().sum(-1)
        torch.testing.assert_close(TERMS[name](batch), (joint - marginals).mean())


def test_mmd_is_zero_where_z_is_the_prior_and_its_formula_elsewhere():
    batch = drawn(32, torch.eye(4), 0.5)
    assert TERMS["mmd"](batch._replace(z=batch.prior)) == 0
    pairs = [(batch.z, batch.z, 1), (batch.prior, batch.prior, 1), (batch.z, batch.prior, -2)]
    expected = sum(
        sign * (-torch.cdist(a, b).square() / (2 * 4 * 0.5**2)).exp().mean() for a, b, sign in pairs
    )
    torch.testing.assert_close(TERMS["mmd"](batch, bandwidth=0.5), expected)
    far = batch._replace(z=batch.z + 100)
    assert TERMS["mmd"](batch) < 0.1 < TERMS["mmd"](far) < 2


def test_dip_is_zero_where_the_covariance_is_the_identity_and_its_formula_elsewhere():
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    assert TERMS["dip_i"](of_latents(corners + 5, torch.randn(8, 3))) == 0
    half = of_latents(corners / 2, torch.full((8, 3), math.log(0.75)))
    assert TERMS["dip_ii"](half) == pytest.approx(0, abs=1e-12)
    batch = of_latents(torch.randn(6, 3), torch.randn(6, 3))
    mean, log_variance = batch.posterior
    plain = torch.cov(mean.T, correction=0)
    for name, c, ratio in (
        ("dip_i", plain, 10),
        ("dip_ii", plain + log_variance.exp().mean(0).diag(), 1),
    ):
        apart = sum(c[i, j] ** 2 for i in range(3) for j in range(3) if i != j)
        diagonal = sum((c[i, i] - 1) ** 2 for i in range(3))
        torch.testing.assert_close(TERMS[name](batch), apart + ratio * diagonal)
        torch.testing.assert_close(TERMS[name](batch, ratio=0.5), apart + diagonal / 2)


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.25, 0.5, 1.0, torch.tensor(0.25)])
def test_capacity_rises_linearly_over_its_share_and_stays(progress):
    batch = of_latents(torch.randn(6, 3), torch.randn(6, 3), progress=progress)
    mean, log_variance = batch.posterior
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    rate = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(-1)
    for share, risen in ((1.0, float(progress)), (0.5, min(1.0, 2 * float(progress)))):
        options = {"nats": 5.0, "share": share}
        found = TERMS["capacity"](batch, **options)
        torch.testing.assert_close(found, (rate.mean() - 5 * risen).abs())
        each = TERMS["capacity"](batch, **options, per_image=True)
        torch.testing.assert_close(each, (rate - 5 * risen).abs().mean())
    for nats in (0.0, 2.0, 1000.0):
        floor = TERMS["rate_floor"](batch, nats=nats)
        torch.testing.assert_close(floor, rate.clamp(min=nats).mean())
    with pytest.raises(
        UserError, match="share=0: capacity rises over a share of the training, > 0"
    ):
        TERMS["capacity"](batch, share=0)


@pytest.mark.parametrize("term", ["capacity", "rate_floor"])
def test_a_term_that_sets_the_rate_leaves_no_decoder_variance(tiny, term):
    config = CONFIG.replace(kl_weight=0.0, terms={term: 1.0})
    for variance in (objective.decoder_variance, objective.decoder_scale, objective.decoder_std):
        assert math.isnan(variance(config, 64))
    metrics = harness.train_and_evaluate(config, tiny, "cpu").metrics
    assert not {"calibration_ratio", "gap_to_linear"} & metrics.keys()
    assert linear_metrics(config, tiny).keys() == {"test/pca_floor"}
    assert "calibration_ratio" in evaluated(config.replace(sigma="optimal"), tiny)


def evaluated(config, data) -> dict[str, float]:
    return evaluate([(config, build(config, data.image_shape, 16))], data)[0]


def test_a_rate_floor_of_nothing_is_the_rate(tiny):
    floor = CONFIG.replace(kl_weight=0.0, terms={"rate_floor": 0.3})
    floor = floor.replace(term_options={"rate_floor": {"nats": 0.0}})
    both = [*harness.train([floor, CONFIG.replace(kl_weight=0.3)], tiny, "cpu", torch.float64)][-1]
    torch.testing.assert_close(flat(both.model(0)), flat(both.model(1)), rtol=1e-9, atol=1e-9)


def test_the_rate_follows_the_capacity(tiny):
    config = CONFIG.replace(kl_weight=0.0, terms={"capacity": 10.0}, epochs=60)
    config = config.replace(term_options={"capacity": {"nats": 4.0, "share": 0.5}})
    rates = [float(r.train["rate"][0]) for r in harness.train([config], tiny, "cpu")]
    assert rates[9] == pytest.approx(4 / 3, abs=0.5)  # a third of the way up
    assert rates[-1] == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize("name", BUILT_IN_TERMS)
def test_gradients_are_right(name):
    mean, log_variance, eps, prior = torch.randn(4, 5, 3, dtype=torch.float64)

    def of(mean: Tensor, log_variance: Tensor) -> Tensor:
        posterior = Posterior(mean, log_variance)
        batch = of_latents(mean, log_variance, z=posterior.sample(eps), prior=prior)
        return TERMS[name](batch)

    assert torch.autograd.gradcheck(of, (mean.requires_grad_(), log_variance.requires_grad_()))


@pytest.mark.parametrize("name", BUILT_IN_TERMS)
@pytest.mark.parametrize("log_variance", [-200.0, -20.0, 20.0])
@pytest.mark.parametrize("images", [1, 8])
def test_collapsed_and_wide_posteriors_have_finite_terms_and_gradients(name, log_variance, images):
    mean = (1000 * torch.randn(images, 3)).requires_grad_()
    spread = torch.full_like(mean, log_variance, requires_grad=True)
    value = TERMS[name](of_latents(mean, spread, training_size=images))
    value.backward()
    given = [value, *(part.grad for part in (mean, spread) if part.grad is not None)]
    assert all(part.isfinite().all() for part in given)


def test_what_a_batch_lacks_is_named():
    with pytest.raises(UserError, match="training_size=0: total_correlation needs"):
        TERMS["total_correlation"](drawn(4, torch.eye(2), 0.5, training_size=0))
    with pytest.raises(UserError, match="prior=None: mmd needs"):
        TERMS["mmd"](drawn(4, torch.eye(2), 0.5, prior=None))


def every_term(weight: float, **changes) -> RunConfig:
    weights = {name: weight * (1 + i) for i, name in enumerate(BUILT_IN_TERMS)}
    return CONFIG.replace(terms=weights, term_options=OPTIONS, **changes)


@pytest.mark.parametrize(
    ("dtype", "changes", "tolerance"),
    [(torch.float64, {}, 1e-9), (torch.float32, {"batch_size": 96, "epochs": 1}, 1e-5)],
    ids=["float64", "float32"],
)
def test_runs_of_a_stack_are_those_of_runs_alone(tiny, request, dtype, changes, tolerance):
    configs = [every_term(0.5 * seed, seed=seed, **changes) for seed in range(3)]
    alone = []
    for config in configs:
        *_, last = harness.train([config], tiny, "cpu", dtype)
        alone.append((flat(last.model(0)), {name: v[0] for name, v in last.val.items()}))
    request.getfixturevalue("together")
    *_, last = harness.train(configs, tiny, "cpu", dtype)
    for s, (weights, metrics) in enumerate(alone):
        torch.testing.assert_close(flat(last.model(s)), weights, rtol=0, atol=tolerance)
        for name in ("loss", *(f"term/{name}" for name in BUILT_IN_TERMS)):
            assert last.val[name][s] == pytest.approx(metrics[name], rel=1e-3, abs=1e-5)


def test_terms_are_measured_on_parts_of_nearly_equal_size_and_are_in_the_loss(tiny):
    config = every_term(0.5)
    (result,) = harness.train_and_evaluate([config], tiny, "cpu")
    images, parts = len(tiny.val), (14, 13, 13)  # 40 images in ceil(40 / 16) parts
    x = tiny.val.pixels(slice(None), torch.float32).view(images, *tiny.image_shape)
    noise, prior = (
        streams.noise(config.seed, f"evaluate/{purpose}", images, config.latent_size)
        for purpose in ("val", "prior/val")
    )
    each = zip(x.split(parts), noise.split(parts), prior.split(parts), strict=True)
    with torch.no_grad():
        batches = [result.model.batch(*part, len(tiny.train)) for part in each]
    metrics, total = result.metrics, 0.0
    for name, weight in config.terms.items():
        term = [TERMS[name](batch, **OPTIONS.get(name, {})) for batch in batches]
        mean = sum(float(v) * n for v, n in zip(term, parts, strict=True)) / images
        assert metrics[f"val/term/{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        total += weight * metrics[f"val/term/{name}"] / tiny.pixels
    plain = metrics["val/mse"] + config.kl_weight * metrics["val/rate"] / tiny.pixels
    assert metrics["val/loss"] == pytest.approx(plain + total, rel=1e-9)
    assert metrics["val/neg_elbo"] == metrics["val/distortion"] + metrics["val/rate"]


def test_the_training_loss_contains_the_terms(tiny):
    *_, last = harness.train([every_term(0.5)], tiny, "cpu")
    found = {name: values[0] for name, values in last.train.items()}
    terms = sum(w * found[f"term/{name}"] for name, w in last.configs[0].terms.items())
    plain = found["mse"] + found["rate"] / tiny.pixels
    assert found["loss"] == pytest.approx(plain + terms / tiny.pixels, rel=1e-9)


def test_an_unknown_option_of_a_term_that_was_registered_later_is_refused(registered, tiny):
    config = CONFIG.replace(terms={"later": 1.0}, term_options={"later": {"widht": 2.0}})
    harness.term("later")(lambda batch, *, width=1.0: width * batch.z.mean())
    with pytest.raises(UserError, match=r"'widht' is no option of term 'later' \(it has: width\)"):
        next(harness.train([config], tiny, "cpu"))
