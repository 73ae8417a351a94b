"""Likelihoods: densities against torch.distributions and quadrature, then trained and measured."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from textbook import SMALL, flat
from torch import Tensor
from torch.distributions import Bernoulli, ContinuousBernoulli, Laplace, Normal, kl_divergence
from torch.nn import functional

import harness
from analysis import frames
from harness import RunConfig, UserError, objective, registry
from harness.metrics import per_image
from harness.metrics.evaluate import evaluate
from harness.metrics.likelihood import importance_bounds
from harness.models.files import load_model, save_model
from harness.models.vae import build
from harness.parts import likelihoods
from harness.streams import noise
from harness.tracking import record
from harness.training.engine import train
from studies.runner.study import KNOWN, calibrated

EXACT = {"rtol": 1e-12, "atol": 1e-12}
BASE = SMALL.replace(epochs=1, learning_rate=0.01)
KINDS = {
    name: registry.LIKELIHOODS[name].load()
    for name in ("gaussian", "laplace", "bernoulli", "continuous_bernoulli")
}
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "own-parts.md").read_text()
(EXAMPLE,) = re.findall(r"^```python\n([^`]*?@harness\.likelihood.*?)^```", PAGE, re.M | re.S)
SOURCE = (
    EXAMPLE
    + """

@harness.likelihood("unfitted")
class Unfitted(Power):
    fit = None


@harness.likelihood("odds")
class Odds(harness.parts.likelihoods.ContinuousBernoulli):
    pass
"""
)
USERS = [
    BASE.replace(kl_weight=0.02),
    BASE.replace(sigma="optimal", seed=1),
    BASE.replace(sigma="learned", seed=2),
]


@pytest.fixture
def file(tmp_path, registered):
    """Return a file with likelihoods of a user, which are registered."""
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    registry.load(f"{path}:power", "likelihood")
    return path


def all_of(*more: str) -> list[RunConfig]:
    """Return a run of every likelihood and sigma."""
    names = ["laplace", "continuous_bernoulli", *more]
    return [
        BASE.replace(likelihood=name, sigma=sigma, kl_weight=0.05 if sigma == "fixed" else 1.0)
        for name in names
        for sigma in ("fixed", "optimal", "learned")
        if sigma == "fixed" or registry.LIKELIHOODS[name].has_scale
    ]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def distribution(name: str, y: Tensor, scale: float):
    """Return the distribution of pixels, independently of the harness; y are outputs or logits."""
    return {
        "gaussian": lambda: Normal(y, math.sqrt(scale)),
        "laplace": lambda: Laplace(y, scale),
        "bernoulli": lambda: Bernoulli(logits=y),
        "continuous_bernoulli": lambda: ContinuousBernoulli(logits=y),
    }[name]()


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_densities_and_means_are_those_of_torch_distributions(name):
    kind, y = KINDS[name], 6 * torch.randn(40, 3, 5, dtype=torch.float64)
    x = torch.rand_like(y)
    x = x.round() if name == "bernoulli" else x
    p = distribution(name, y, 0.3)
    found = kind.neg_log_density(kind.error(x, y), number(0.3), 15)
    torch.testing.assert_close(found, -p.log_prob(x).sum((1, 2)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kind.mean(y), p.mean, rtol=1e-9, atol=1e-9)


def test_the_registry_has_the_scales_of_the_classes():
    for name, kind in KINDS.items():
        assert registry.LIKELIHOODS[name].has_scale == kind.has_scale
    assert tuple(KINDS) == registry.BUILT_IN_LIKELIHOODS


@pytest.mark.parametrize("name", [*KINDS, "power"])
def test_densities_integrate_to_one_and_have_their_mean(name, file):
    kind = registry.LIKELIHOODS[name].load()
    for y, scale in ((0.3, 0.02), (-2.0, 0.5), (0.0, 1.0), (9.0, 0.1)):
        bound = 0 if kind.logits else 30 * math.sqrt(scale)
        x = torch.linspace(-bound, 1 + bound, 200_001, dtype=torch.float64) + y * bool(bound)
        x = torch.tensor([0.0, 1.0]).double() if name == "bernoulli" else x
        output = torch.full_like(x, y)
        error = kind.error(x.unsqueeze(1), output.unsqueeze(1))
        p = (-kind.neg_log_density(error, number(scale), 1)).exp()
        masses = [p, p * x]
        whole, mean = (
            float(f.sum() if name == "bernoulli" else torch.trapezoid(f, x)) for f in masses
        )
        assert whole == pytest.approx(1, abs=1e-5)
        assert mean == pytest.approx(float(kind.mean(output)[0]), abs=1e-5)


def test_a_continuous_bernoulli_is_stable_at_all_logits_in_float32():
    ends = [0.0, 1e-30, 1e-4, 0.1, 0.4999, 0.5001, 2.0, 30.0, 90.0, 1e4]
    a32 = torch.tensor([sign * end for end in ends for sign in (1, -1)], requires_grad=True)
    a64 = a32.detach().double().requires_grad_()
    kind = likelihoods.ContinuousBernoulli
    for x in (0.0, 0.3, 1.0):
        gradients = []
        for a in (a32, a64):
            values = kind.error(torch.full_like(a, x).unsqueeze(1), a.unsqueeze(1))
            gradients += torch.autograd.grad(values.sum(), a)
            gradients += [values, *torch.autograd.grad(kind.mean(a).sum(), a)]
        for one, other in zip(gradients[:3], gradients[3:], strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)
        far = a64.abs() >= 2
        exact = functional.softplus(a64) - x * a64 - (a64 / (a64 / 2).tanh()).log()
        torch.testing.assert_close(values[far], exact[far], rtol=1e-12, atol=1e-12)
    mean = kind.mean(a64).detach()
    assert mean[0] == 0.5
    assert ((mean > 0) & (mean < 1)).all()
    assert (mean[a64.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("name", ["laplace", "continuous_bernoulli"])
def test_gradients_of_errors_and_means_are_right(name):
    x = torch.rand(6, 4, dtype=torch.float64)
    y = (torch.randn(6, 4, dtype=torch.float64) / 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: KINDS[name].error(x, y), y)
    assert torch.autograd.gradcheck(KINDS[name].mean, y)


def test_the_scale_of_a_laplace_decoder_is_its_mean_absolute_error():
    error = number(3.0)
    scale = likelihoods.fitted(likelihoods.Laplace, error, 12).requires_grad_()
    assert scale == 3 / 12
    density = likelihoods.Laplace.neg_log_density(error, scale, 12)
    assert torch.autograd.grad(density, scale)[0] == 0


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_a_scale_without_fit_is_found_by_bisection(dtype, limit, file):
    errors = torch.tensor([1e-6, 0.3, 50.0], dtype=dtype)
    kinds = (registry.LIKELIHOODS[name].load() for name in ("power", "unfitted"))
    closed, found = (
        torch.vmap(lambda error, kind=kind: likelihoods.fitted(kind, error, 12))(errors)
        for kind in kinds
    )
    torch.testing.assert_close(found, closed, rtol=limit, atol=0)


def test_the_loss_is_the_elbo_of_the_scale_that_the_weight_sets(file):
    for name, expected in (("gaussian", 0.5), ("laplace", 1.0), ("power", 1.0)):
        config = RunConfig(likelihood=name, kl_weight=0.7, kl_normalization="batch", latent_size=3)
        scale = objective.decoder_scale(config, 12)
        assert scale == pytest.approx(0.7 * 12 * expected, rel=1e-14)
        mean, log_variance = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
        x, y = torch.rand(2, 5, 12, dtype=torch.float64, requires_grad=True)
        batch = objective.Batch(x, objective.Posterior(mean, log_variance), mean, y, y)
        beta = number(objective.beta(config, 12))
        loss = objective.objective(config, batch, objective.Coefficients(beta))
        kind = objective.likelihood_of(config)
        density = kind.neg_log_density(kind.error(x, y), number(scale), 12).mean()
        q = Normal(mean, (log_variance / 2).exp())
        elbo = density + kl_divergence(q, Normal(torch.zeros_like(mean), 1.0)).sum() / 5
        inputs = y, mean, log_variance
        ours, theirs = torch.autograd.grad(loss, inputs), torch.autograd.grad(elbo, inputs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b * beta / 12, **EXACT)


def test_a_weight_is_told_as_a_decoder_standard_deviation():
    def told(**settings):
        return objective.acts_as(RunConfig(**settings), 784)

    std = "acts as a decoder standard deviation of"
    assert told(kl_weight=0.08) == f"kl_weight 0.08 {std} 0.2 (51 grey levels of 255)"
    assert told(kl_weight=0.1, likelihood="laplace").endswith(
        f"{std} 0.141 (36.1 grey levels of 255)"
    )
    for settings in (
        {"kl_weight": 0.0},
        {"sigma": "optimal"},
        {"likelihood": "continuous_bernoulli"},
        {"terms": {"capacity": 1.0}},
    ):
        assert told(**settings) == ""


# --- training and metrics -------------------------------------------------------------------------


def test_runs_of_a_stack_are_those_of_runs_alone(tiny, file, request):
    configs = all_of("unfitted")
    configs += [c.replace(seed=1, learning_rate=0.003) for c in configs]
    data = replace(tiny, train=tiny.train.head(16))  # 2 steps
    (alone,) = train(configs, data, "cpu", torch.float64)
    request.getfixturevalue("together")
    (stacked,) = train(configs, data, "cpu", torch.float64)
    for row in range(len(configs)):
        torch.testing.assert_close(flat(stacked.model(row)), flat(alone.model(row)), **EXACT)
    for name, values in alone.val.items():
        np.testing.assert_allclose(stacked.val[name], values, rtol=1e-9, atol=1e-9, err_msg=name)


def test_metrics_are_those_of_the_distributions(tiny, file):
    for config in all_of("power", "unfitted"):
        model = build(config, tiny.image_shape, 16).double()
        (found,) = evaluate([(config, model)], tiny)
        kind, given, errors = model.kind, {}, {}
        for part in ("val", "test"):
            split = getattr(tiny, part)
            x = split.pixels(slice(None), torch.float64).view(-1, 1, 8, 8)
            eps = noise(config.seed, f"evaluate/{part}", len(x), config.latent_size).double()
            with torch.no_grad():
                batch = model.batch(x, eps)
            y = batch.output if kind.logits else batch.output.sigmoid()
            given[part], errors[part] = (x, y), kind.error(x, y).mean()
            mae = (x - kind.mean(y)).abs().mean()
            assert found[f"{part}/mae"] == pytest.approx(mae.item(), rel=1e-12)
        scale = likelihoods.fitted(kind, errors["val"], 64)
        x, y = given["test"]
        if config.likelihood in ("power", "unfitted"):
            distortion = kind.neg_log_density(errors["test"], scale, 64)
        else:
            p = distribution(config.likelihood, y, scale.item())
            distortion = -p.log_prob(x).sum((1, 2, 3)).mean()
        assert found["distortion"] == pytest.approx(distortion.item(), rel=1e-9)
        assert found["neg_elbo"] == found["distortion"] + found["rate"]
        if kind.has_scale:
            assert found["val/fitted_scale"] == pytest.approx(scale.item(), rel=1e-12)
            beta = {"fixed": 0.05, "optimal": scale.item(), "learned": 1.0}[config.sigma]
            ratio = beta / likelihoods.fitted(kind, errors["test"], 64).item()
            assert found["calibration_ratio"] == pytest.approx(ratio, rel=1e-9)
            assert found.get("learned_scale") == (1.0 if config.sigma == "learned" else None)
        else:
            assert not {"calibration_ratio", "fitted_scale"} & found.keys()
        assert not {"learned_variance", "gap_to_linear"} & found.keys()


@pytest.mark.parametrize("name", ["laplace", "continuous_bernoulli", "power"])
def test_importance_samples_are_weighed_by_the_density(tiny, file, name):
    config, split = BASE.replace(likelihood=name, latent_size=2), tiny.test.head(4)
    model = build(config, tiny.image_shape, 16).double()
    scale = number(0.1)
    found = importance_bounds(config, model, split, scale, samples=(1, 3)).bounds[3]
    x = split.pixels(slice(None), torch.float64).view(-1, 1, 8, 8)
    weights = []
    with torch.no_grad():
        mean, log_variance = model.posterior(x)
        for j in (1, 2, 3):
            eps = noise(config.seed, "likelihood", 4, 2, j).double()
            z = mean + (log_variance / 2).exp() * eps
            y = model.decoder(z) if model.kind.logits else model.decoder(z).sigmoid()
            if name == "power":
                log_p = -model.kind.neg_log_density(model.kind.error(x, y), scale, 64)
            else:
                log_p = distribution(name, y, 0.1).log_prob(x).sum((1, 2, 3))
            q = Normal(mean, (log_variance / 2).exp())
            weights.append(log_p + Normal(0, 1).log_prob(z).sum(-1) - q.log_prob(z).sum(-1))
    expected = torch.stack(weights).logsumexp(0) - math.log(3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_means_over_images_are_the_logged_values(tiny, file):
    for config in all_of("power"):
        logged = harness.train_and_evaluate(config, tiny, device="cpu")
        for part in ("val", "test"):
            given = {"part": part, "variance": logged.metrics.get("val/fitted_scale")}
            found = per_image(logged.model, getattr(tiny, part), config.seed, **given)
            assert set(found) == {"error", "rate", "distortion", "neg_elbo"}
            for name, values in found.items():
                of = logged.metrics[f"{part}/{'mse' if name == 'error' else name}"]
                np.testing.assert_allclose(values.mean(), of, rtol=1e-9)


def test_a_scale_that_the_weight_sets_is_a_metric_and_no_variance(tiny):
    config = BASE.replace(likelihood="laplace", kl_weight=0.1, latent="stochastic")
    assert "decoder_variance" not in record.parameters(config, tiny)
    free = harness.train_and_evaluate(config.replace(sigma="optimal"), tiny, "cpu").metrics
    assert free["laplace_scale"] == pytest.approx(0.1 * free["val/fitted_scale"], rel=1e-12)
    learned = harness.train_and_evaluate(config.replace(sigma="learned"), tiny, "cpu").metrics
    assert learned["laplace_scale"] == pytest.approx(0.1 * learned["learned_scale"], rel=1e-12)
    fixed = harness.train_and_evaluate(config, tiny, "cpu").metrics
    assert fixed["laplace_scale"] == fixed["val/laplace_scale"] == pytest.approx(0.1, rel=1e-12)
    result = harness.train_and_evaluate(config, tiny, "cpu")
    assert frames.to_frame([result])["decoder_variance"].isna().all()
    assert calibrated(config, KNOWN["digits"]).kl_weight == pytest.approx(math.sqrt(0.01 / 2))


def test_a_learned_scale_begins_at_that_of_the_mean_image(tiny):
    config = BASE.replace(likelihood="laplace", sigma="learned", learning_rate=1e-12)
    (last,) = train([config], tiny, "cpu", torch.float64)
    x = tiny.train.pixels(slice(None), torch.float64)
    assert last.val["learned_scale"][0] == pytest.approx((x - x.mean(0)).abs().mean().item())


# --- likelihoods of users -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_users_likelihood_has_the_same_bits_in_workers(tiny, file):
    farthest = harness.metric("farthest", every_epoch=True)
    farthest(lambda model, split: per_image(model, split)["neg_elbo"].max())
    configs = [c.replace(likelihood="unfitted") for c in USERS]
    (alone,) = train(configs, tiny, "cpu")
    torch.set_num_threads(2)
    (beside,) = train(configs, tiny, "cpu")
    for row in range(len(configs)):
        assert torch.equal(flat(alone.model(row)), flat(beside.model(row)))
    for name, values in alone.val.items():
        np.testing.assert_array_equal(beside.val[name], values)
    assert (beside.val["farthest"] > beside.val["neg_elbo"]).all()


def test_a_users_likelihood_is_saved_and_loaded_with_trust(file, tmp_path):
    # tests/models/test_users_networks.py records and replays one.
    config = BASE.replace(likelihood="odds")
    model = build(config, (1, 8, 8), 16)
    save_model(config, model, tmp_path)
    assert (tmp_path / "likelihood.py").read_text() == SOURCE
    del registry.LIKELIHOODS["odds"]
    without = "^likelihood 'odds' of the stored run is code that was stored with it.*allow it"
    with pytest.raises(UserError, match=without):
        load_model(tmp_path)
    known, loaded = load_model(tmp_path, lambda code: "class Odds" in code)
    assert (known, loaded.kind.logits) == (config, True)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))


class Right:
    """A likelihood that can be used."""

    error = staticmethod(likelihoods.Laplace.error)
    mean = staticmethod(likelihoods.Laplace.mean)
    neg_log_density = staticmethod(likelihoods.Laplace.neg_log_density)


def broken(name: str, function) -> type:
    return type("Broken", (Right,), {name: staticmethod(function)})


REFUSED = {
    "likelihood 'mine' has no error: give it that function": type("Empty", (), {}),
    "likelihood 'mine' has no mean: give": type("NoMean", (Right,), {"mean": None}),
    "likelihood 'mine' is <built-in function len>: decorate a class": len,
    "its error returns (3, 1, 8, 8); expected (3,)": broken("error", lambda x, y: (x - y).abs()),
    "its error returns float; expected (3,)": broken("error", lambda x, y: 1.0),
    "its error fails: ZeroDivisionError: division by zero (test_likelihoods.py, line": broken(
        "error", lambda x, y: 1 / 0
    ),
    "its mean returns (3, 64); expected (3, 1, 8, 8)": broken("mean", lambda y: y.flatten(1)),
    "its neg_log_density returns (1,); expected ()": broken(
        "neg_log_density", lambda e, s, D: e.view(1)
    ),
    "its fit returns (1,); expected ()": broken("fit", lambda e, D: e.view(1)),
    "its fit returns 0.03125, which is not the best scale": broken("fit", lambda e, D: 2 * e / D),
    "is not linear in the error: 1, 4 and 9 at errors 1, 2, 3": broken(
        "neg_log_density", lambda e, s, D: e.square()
    ),
    "weighs the error by 0.5 at scale 1 and 0.125 at scale 2; it must be proportional": (
        broken("neg_log_density", lambda e, s, D: D * s.log() + e / (2 * s * s))
    ),
    "weighs the error by 1 at scale 1 and 1 at scale 2": broken(
        "neg_log_density", lambda e, s, D: e
    ),
    "has a scale; leave has_scale = False out": type("Wrong", (Right,), {"has_scale": False}),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(tiny, text, registered):
    def use():
        harness.likelihood("mine")(REFUSED[text])
        next(train([BASE.replace(likelihood="mine")], tiny, "cpu"))

    with pytest.raises(UserError) as refused:
        use()
    message = str(refused.value)
    assert message.startswith("likelihood 'mine'")
    assert text in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"likelihood": "poisson"}, "likelihood='poisson': choose one of gaussian, laplace"),
        ({"likelihood": "odds", "sigma": "learned"}, "which has no variance or scale; set"),
        ({"likelihood": "continuous_bernoulli", "sigma": "optimal"}, "has no variance or scale"),
        ({"likelihood": "laplace", "binarization": "threshold"}, "need likelihood='bernoulli'"),
        ({"likelihood": "continuous_bernoulli", "binarization": "stochastic"}, "binary pixels"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_a_likelihood_are_refused(settings, why, file):
    with pytest.raises(UserError, match=why):
        RunConfig(**settings)


def test_names_of_built_in_likelihoods_are_taken():
    with pytest.raises(UserError, match="likelihood 'laplace': choose a name that is none of"):
        harness.likelihood("laplace")
