"""Properties of the configuration and of the KL algebra, on drawn examples (hypothesis)."""

import json

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from harness import UserError, objective, registry
from harness.config import Binarization, Head, KLNormalization, RunConfig, Sigma

settings.register_profile("tests", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("tests")

MODES = KLNormalization.__args__
PIXELS = st.integers(1, 5000)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    # Training flushes subnormal numbers to zero, and so may this process.
    return st.floats(low, high, allow_subnormal=False)


def any_of(literal: object) -> st.SearchStrategy[str]:
    return st.sampled_from(literal.__args__)


@st.composite
def configs(draw: st.DrawFn, **fixed: object) -> RunConfig:
    """Draw a configuration from all that is allowed; those that contradict themselves are not."""
    drawn = {
        "model": draw(st.sampled_from(registry.BUILT_IN)),
        "hidden": tuple(draw(st.lists(st.integers(1, 2000), max_size=3))),
        "latent_size": draw(st.integers(1, 200)),
        "head": draw(any_of(Head)),
        "kl_weight": draw(numbers(0, 1e6)),
        "kl_normalization": draw(st.sampled_from(MODES)),
        "kl_warmup_epochs": draw(st.integers(0, 30)),
        "kl_cycles": draw(st.integers(1, 5)),
        "free_bits": draw(numbers(0, 100)),
        "sigma": draw(any_of(Sigma)),
        "likelihood": draw(st.sampled_from(registry.BUILT_IN_LIKELIHOODS)),
        "binarization": draw(any_of(Binarization)),
        "learning_rate": draw(numbers(1e-12, 10)),
        "batch_size": draw(st.integers(1, 10_000)),
        "epochs": draw(st.integers(1, 1000)),
        "seed": draw(st.integers(0, 2**63)),
        "terms": draw(st.dictionaries(st.text(max_size=5), numbers(-1e6, 1e6), max_size=2)),
    } | fixed
    try:
        return RunConfig(**drawn)
    except UserError:
        assume(False)  # noqa: FBT003 - hypothesis's own
        raise


def gaussian() -> st.SearchStrategy[RunConfig]:
    return configs(sigma="fixed", likelihood="gaussian", binarization="none", kl_cycles=1)


def posteriors() -> st.SearchStrategy[torch.Tensor]:
    """Draw means and log-variances: shape (2, B, L), float64."""
    pair = st.tuples(numbers(-30, 30), numbers(-30, 30))
    cells = st.lists(st.lists(pair, min_size=3, max_size=3), min_size=1, max_size=4)
    return cells.map(lambda c: torch.tensor(c, dtype=torch.float64).movedim(-1, 0))


# --- the configuration --------------------------------------------------------------------------


@given(configs())
def test_json_gives_any_configuration_back(config):
    assert RunConfig.from_json(config.to_json()) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(JSON.filter(lambda value: value != {}))  # {} is the configuration of all defaults
def test_json_that_is_no_configuration_is_refused(value):
    with pytest.raises(UserError, match="^configuration "):
        RunConfig.from_json(json.dumps(value))


@given(st.text(max_size=30))
@example("[" * 100_000)
@example(f'{{"seed": {"9" * 5000}}}')
def test_text_that_is_no_json_is_refused(text):
    with pytest.raises(UserError, match="^configuration "):
        RunConfig.from_json(text)


@given(st.sampled_from(sorted(RunConfig.__dataclass_fields__)), JSON)
@example("kl_weight", 10**400)
@example("hidden", [[1]])
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(name, value):
    text = json.dumps(json.loads(RunConfig().to_json()) | {name: value})
    try:
        config = RunConfig.from_json(text)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - either is right
    else:
        assert RunConfig.from_json(config.to_json()) == config


@given(st.sampled_from(sorted(RunConfig.__dataclass_fields__)))
def test_no_field_may_be_misspelt(name):
    values = json.loads(RunConfig().to_json())
    values[f"{name}_"] = values.pop(name)
    with pytest.raises(UserError, match=rf"unknown fields \['{name}_'\]"):
        RunConfig.from_json(json.dumps(values))


# --- the KL algebra -----------------------------------------------------------------------------


@given(posteriors())
def test_kl_is_never_negative(posterior):
    mean, log_variance = posterior
    kl = objective.kl_per_latent(mean, log_variance)
    assert (kl >= -1e-12).all()


@given(st.integers(1, 5), st.integers(1, 5))
def test_kl_is_zero_at_the_prior_and_nowhere_near_it(images, latents):
    prior = torch.zeros(images, latents, dtype=torch.float64)
    assert torch.equal(objective.kl_per_latent(prior, prior), prior)
    assert (objective.kl_per_latent(prior + 0.1, prior) > 0).all()
    assert (objective.kl_per_latent(prior, prior - 0.1) > 0).all()


@given(posteriors(), st.integers(0, 3))
def test_kl_of_independent_latents_adds_up(posterior, cut):
    # KL of a joint Gaussian by torch's own formula is the sum of the parts.
    mean, log_variance = posterior
    one = torch.distributions.Normal(mean, (log_variance / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    joint = torch.distributions.kl_divergence(
        torch.distributions.Independent(one, 1), torch.distributions.Independent(prior, 1)
    )
    halves = [
        objective.kl_per_latent(mean[..., part], log_variance[..., part]).sum(-1)
        for part in (slice(cut), slice(cut, None))
    ]
    torch.testing.assert_close(halves[0] + halves[1], joint, rtol=1e-9, atol=1e-9)


@given(gaussian(), PIXELS, numbers(1e-9, 1e6))
def test_with_decoder_variance_is_the_inverse_of_decoder_variance(config, pixels, variance):
    there = objective.with_decoder_variance(config, variance, pixels)
    assert objective.decoder_variance(there, pixels) == pytest.approx(variance, rel=1e-12)
    assert objective.beta(there, pixels) == pytest.approx(2 * variance, rel=1e-12)
    own = objective.decoder_variance(config, pixels)
    back = objective.with_decoder_variance(there, own, pixels)
    assert back.kl_weight == pytest.approx(config.kl_weight, rel=1e-12)


@given(gaussian(), PIXELS, numbers(1e-6, 1e3))
def test_every_normalisation_reaches_every_beta(config, pixels, variance):
    betas = [
        objective.beta(
            objective.with_decoder_variance(
                config.replace(kl_normalization=mode), variance, pixels
            ),
            pixels,
        )
        for mode in MODES
    ]
    assert betas == pytest.approx([2 * variance] * len(MODES), rel=1e-12)


@given(posteriors(), numbers(0, 50))
def test_free_bits_only_raise_the_rate_and_none_leave_it(posterior, free_bits):
    kl = objective.kl_per_latent(*posterior).clamp(min=0).mean(0)
    rate = kl.sum(-1)
    free = objective.free_rate(kl, torch.tensor(free_bits, dtype=kl.dtype))
    assert (free >= rate).all()
    assert (free >= free_bits * kl.shape[-1] * (1 - 1e-12)).all()
    nothing = torch.zeros((), dtype=kl.dtype)
    assert torch.equal(objective.free_rate(kl, nothing), rate)


@given(configs(), st.integers(1, 20), st.data())
def test_warm_up_stays_between_nothing_and_the_whole_weight(config, steps, data):
    epoch = data.draw(st.integers(1, config.epochs))
    factor = objective.kl_warmup(config, epoch, steps)
    assert factor.shape == (steps,)
    assert ((factor >= 0) & (factor <= 1)).all()
    if config.kl_warmup_epochs == 0:
        assert (factor == 1).all()
    elif epoch == 1:
        assert factor[0] == 0
    if config.kl_cycles == 1:
        assert (factor.diff(dim=0) >= 0).all()
        assert epoch <= config.kl_warmup_epochs or (factor == 1).all()
