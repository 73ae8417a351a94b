"""A stack of runs gives each run what it computes as a plain module alone."""

import copy
from itertools import pairwise

import pytest
import torch
from textbook import Textbook, flat
from torch import nn

from harness import engine, networks
from harness.config import RunConfig, UserError
from harness.engine import train
from harness.objective import kl_per_latent
from harness.vae import VAE, Posterior, SingleVAE, initial

SHAPE = (1, 8, 8)
SIZES = (5, 2, 9)
KINDS = [
    {"model": "mlp", "head": "gaussian"},
    {"model": "mlp", "head": "relu"},
    {"model": "linear", "head": "gaussian"},
    {"model": "linear", "head": "relu"},
    {"model": "conv", "head": "gaussian"},
    {"model": "conv", "head": "relu"},
]
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))


def mixed_runs(**settings) -> list[SingleVAE]:
    base = RunConfig(hidden=(16, 12), channels=(4, 6), **settings)
    return [
        initial(base.replace(latent_size=size, seed=seed), SHAPE).double()
        for seed, size in enumerate(SIZES)
    ]


@all_kinds
def test_a_stack_of_mixed_latent_sizes_encodes_and_decodes_as_each_run_does(kind):
    runs = mixed_runs(**kind)
    stack = VAE(runs)
    x = torch.rand(3, 7, 64, dtype=torch.float64)
    z = torch.randn(3, 7, 9, dtype=torch.float64)
    stacked, decoded = stack.encode(x), stack.decode(z)
    for s, run in enumerate(runs):
        size, alone = SIZES[s], run.encode(x[s])
        torch.testing.assert_close(stacked.mean[s, :, :size], alone.mean)
        torch.testing.assert_close(stacked.log_variance[s, :, :size], alone.log_variance)
        # Padded latents of z hold numbers here: the decoder must not see them.
        torch.testing.assert_close(decoded[s], run.decode(z[s, :, :size]))


@all_kinds
def test_a_single_run_is_the_textbook_network(kind):
    config = RunConfig(hidden=(16, 12), channels=(4, 6), latent_size=5, **kind)
    run, textbook = initial(config, SHAPE).double(), Textbook(config, SHAPE)
    x, z = torch.rand(7, 64).double(), torch.randn(7, 5).double()
    posterior, q = run.encode(x), textbook.posterior(x)
    torch.testing.assert_close(posterior.mean, q.mean)
    torch.testing.assert_close(posterior.log_variance, q.variance.log())
    torch.testing.assert_close(run.decode(z), textbook.decode(z))


@all_kinds
def test_padded_latents_are_standard_normal_and_free(kind):
    stack = VAE(mixed_runs(**kind))
    posterior = stack.encode(torch.rand(3, 7, 64, dtype=torch.float64))
    kl = kl_per_latent(posterior.mean, posterior.log_variance)
    for s, size in enumerate(SIZES):
        assert not posterior.mean[s, :, size:].any()
        assert (posterior.log_variance.exp()[s, :, size:] == 1).all()
        assert not kl[s, :, size:].any()
        assert kl[s, :, :size].all()


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("head", ["gaussian", "relu"])
def test_padded_weights_stay_zero_in_training(tiny, monkeypatch, model, head):
    monkeypatch.setattr(engine, "groups", lambda runs, device: [list(range(runs))])
    base = RunConfig(
        model=model, head=head, hidden=(16,), channels=(4,), epochs=3, kl_normalization="latent"
    )
    rates = (1e-3, 1e-1, 1e-3)
    configs = [
        base.replace(latent_size=n, learning_rate=rate)
        for n, rate in zip(SIZES, rates, strict=True)
    ]
    *_, last = train(configs, tiny, device="cpu")
    for s, size in enumerate(SIZES):
        head_layer, first = last.model.encoder.layers[-1], last.model.decoder.layers[0]
        for half in (*head_layer.weight[s].chunk(2, -1), *head_layer.bias[s].chunk(2, -1)):
            assert not half[..., size:].any()
        assert not first.weight[s, size:].any()
        assert first.weight[s, :size].any()


@all_kinds
def test_run_gives_back_the_weights_bitwise(kind):
    runs = mixed_runs(**kind)
    stack = VAE(runs)
    for s, run in enumerate(runs):
        back = stack.run(s)
        assert back.config == run.config
        assert list(back.state_dict()) == list(run.state_dict())
        for name, weights in run.state_dict().items():
            assert torch.equal(back.state_dict()[name], weights)


def test_run_and_stack_are_copies():
    runs = mixed_runs()
    stack, before = VAE(runs), copy.deepcopy(runs)
    first = stack.run(0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
    assert flat(first).abs().min() > 0
    for run, old in zip(runs, before, strict=True):
        assert torch.equal(flat(run), flat(old))


def test_a_run_is_a_plain_module_of_torch_layers():
    run = VAE(mixed_runs()).run(1)
    kinds = {type(m) for m in run.modules() if not list(m.children())}
    assert kinds == {nn.Linear, nn.ReLU, nn.Sigmoid}
    conv = VAE(mixed_runs(model="conv")).run(1)
    kinds = {type(m) for m in conv.modules() if not list(m.children())}
    assert kinds - {nn.Flatten, nn.Unflatten} == {
        *(nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.ReLU, nn.Sigmoid),
    }
    linear = VAE(mixed_runs(model="linear")).run(1)
    assert [type(m) for m in (*linear.encoder, *linear.decoder)] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 64)])
def test_a_reconstruction_has_the_shape_of_the_images(shape, model):
    run = initial(RunConfig(model=model), SHAPE)
    x = torch.rand(shape)
    y = run(x)
    assert y.shape == shape
    assert torch.equal(y.flatten(1), run.decode(run.encode(x).mean))


def test_the_relu_head_is_the_blogs():
    h_ = torch.randn(50, 20, dtype=torch.float64)
    eps = torch.randn(50, 10, dtype=torch.float64)
    mu, sigma = h_.relu().chunk(2, dim=1)
    h = mu + sigma * eps
    kld = 0.5 * torch.sum(mu**2 + sigma**2 - torch.log(1e-8 + sigma**2) - 1)
    posterior = Posterior.from_head(h_, "relu")
    # The blog's 1e-8 is part of our variance, so its sigma = 0 is our 1e-4.
    torch.testing.assert_close(posterior.sample(eps), h, rtol=0, atol=1.01e-4 * eps.abs().max())
    kl = kl_per_latent(posterior.mean, posterior.log_variance)
    torch.testing.assert_close(kl.sum(), kld, rtol=1e-8, atol=0)
    assert (sigma == 0).any()


def test_a_gaussian_sample_is_mean_plus_deviation_times_noise():
    mean, log_variance, eps = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    z = Posterior(mean, log_variance).sample(eps)
    torch.testing.assert_close(z, mean + torch.exp(log_variance) ** 0.5 * eps)


def test_a_deterministic_latent_is_the_mean():
    stack = VAE(mixed_runs(latent="deterministic", kl_weight=0))
    posterior = stack.encode(torch.rand(3, 7, 64, dtype=torch.float64))
    z = stack.reparameterize(posterior, torch.randn(3, 7, 9, dtype=torch.float64))
    assert torch.equal(z, posterior.mean)


def weighted(run: SingleVAE) -> list[nn.Module]:
    return [m for m in run.modules() if getattr(m, "weight", None) is not None]


def test_initial_weights_are_pytorchs_distribution():
    run = initial(RunConfig(), (1, 28, 28))
    for layer in weighted(run):
        scaled = layer.weight.detach() * layer.in_features**0.5
        assert -1 <= scaled.min() < -0.99
        assert 0.99 < scaled.max() <= 1
        five_sigma = 5 / scaled.numel() ** 0.5
        assert abs(scaled.mean()) < five_sigma * (1 / 3) ** 0.5
        assert abs(scaled.square().mean() - 1 / 3) < five_sigma * (4 / 45) ** 0.5
        assert layer.bias.abs().max() * layer.in_features**0.5 <= 1


def test_convolutions_begin_with_pytorchs_bounds():
    run = initial(RunConfig(model="conv", channels=(64, 64, 64)), (3, 16, 16))
    for layer in weighted(run):
        theirs = copy.deepcopy(layer)
        theirs.reset_parameters()
        bound = theirs.weight.detach().abs().max()
        assert float(layer.weight.detach().abs().max() / bound) == pytest.approx(1, rel=0.03)
        assert layer.bias.abs().max() < 1.03 * bound


def test_initial_weights_depend_on_seed_and_latent_size_alone():
    first = initial(RunConfig(), SHAPE)
    same = RunConfig(kl_weight=3.0, learning_rate=1.0, kl_normalization="sum", epochs=1)
    assert torch.equal(flat(first), flat(initial(same, SHAPE)))
    other = initial(RunConfig(seed=1), SHAPE)
    assert not torch.any(flat(first) == flat(other))


def test_initial_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    run = initial(RunConfig(), SHAPE)
    VAE([run]).run(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_hidden_layers_mirror_in_the_decoder():
    run = initial(RunConfig(hidden=(30, 20, 10), latent_size=4), SHAPE)

    def sizes(part: nn.Sequential) -> list[int]:
        layers = [m for m in part if isinstance(m, nn.Linear)]
        assert all(a.out_features == b.in_features for a, b in pairwise(layers))
        return [layers[0].in_features, *(m.out_features for m in layers)]

    assert sizes(run.encoder) == [64, 30, 20, 10, 8]
    assert sizes(run.decoder) == [4, 10, 20, 30, 64]


@pytest.mark.parametrize(
    "other",
    [
        initial(RunConfig(hidden=(8,)), SHAPE),
        initial(RunConfig(head="relu"), SHAPE),
        initial(RunConfig(), (1, 4, 16)),
        initial(RunConfig(model="conv"), SHAPE),
    ],
    ids=["hidden", "head", "images", "model"],
)
def test_runs_of_different_shapes_share_no_stack(other):
    with pytest.raises(UserError, match="one stack"):
        VAE([initial(RunConfig(), SHAPE), other])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 1), (3, 5, 8), (1, 7, 12), (3, 9, 6)])
@pytest.mark.parametrize("channels", [(3,), (4, 5, 6, 7)])
def test_convolutions_take_images_of_any_size(shape, channels):
    runs = [
        initial(RunConfig(model="conv", channels=channels, latent_size=size), shape).double()
        for size in SIZES
    ]
    x = torch.rand(3, 7, *shape, dtype=torch.float64)
    stack = VAE(runs)
    decoded = stack.decode(stack.encode(x.flatten(2)).mean)
    for s, run in enumerate(runs):
        assert run(x[s]).shape == x[s].shape
        torch.testing.assert_close(decoded[s], run(x[s]).flatten(1))


def test_channels_mirror_in_the_decoder():
    run = initial(RunConfig(model="conv", channels=(5, 6, 7)), (3, 9, 14))
    there = [(m.in_channels, m.out_channels) for m in run.encoder if isinstance(m, nn.Conv2d)]
    back = [
        (m.in_channels, m.out_channels) for m in run.decoder if isinstance(m, nn.ConvTranspose2d)
    ]
    assert there == [(3, 5), (5, 6), (6, 7)]
    assert back == [(7, 6), (6, 5), (5, 3)]
    assert run.encoder[-1].in_features == run.decoder[0].out_features == 7 * 2 * 2


@pytest.mark.parametrize("model", ["mlp", "linear", "conv"])
def test_the_number_of_weights_is_known_beforehand(model):
    config = RunConfig(model=model, hidden=(30, 20), channels=(5, 6, 7), latent_size=4)
    run = initial(config, (3, 9, 14))
    assert networks.numbers(config, (3, 9, 14)) == sum(p.numel() for p in run.parameters())
