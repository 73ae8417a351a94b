"""The gradient that is written out is autograd's, and autograd's is the textbook's."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from textbook import BERNOULLI, KINDS, MIXED, REMEDIES, SMALL, Textbook, flat, plain
from torch import Tensor, nn

from harness import objective
from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.metrics.evaluate import coefficients
from harness.models.vae import VAE, build
from harness.training.mlp_gradient import MLPGradient, covers
from harness.training.step import State

SHAPE = (1, 4, 5)


def drawn(config: RunConfig, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x = torch.rand(config.batch_size, *shape, dtype=torch.float64)
    return x, torch.randn(config.batch_size, config.latent_size, dtype=torch.float64)


def loss_of(config: RunConfig, model: VAE, x: Tensor, eps: Tensor, beta: Tensor) -> Tensor:
    known = coefficients(config, model.pixels, model.device)._replace(beta=beta)
    return objective.objective(config, model.batch(x, eps), known)


# --- autograd of the objective --------------------------------------------------------------------

all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))


def of_kind(configs: list[RunConfig], kind: dict[str, str]) -> list[RunConfig]:
    return [c.replace(**kind) for c in configs]


def check_objective(configs: list[RunConfig], data: Dataset) -> None:
    """Compare loss and gradient of each run with autograd of the textbook's formula."""
    for config in configs:
        model = build(config, data.image_shape).double()
        textbook = Textbook(config, data.image_shape)
        x, eps = drawn(config, data.image_shape)
        beta = torch.tensor(objective.beta(config, data.pixels), dtype=torch.float64)
        loss, expected = loss_of(config, model, x, eps, beta), textbook.loss(x.flatten(1), eps)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            gradient(loss, model), gradient(expected, textbook), rtol=1e-10, atol=1e-14
        )


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    # The plain autoencoder's head has outputs that nothing depends on, hence materialize.
    slopes = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([slope.flatten() for slope in slopes])


@all_kinds
def test_the_objective_has_the_textbooks_gradient(tiny, kind):
    check_objective(of_kind(MIXED, kind), tiny)


@all_kinds
def test_a_deterministic_latent_has_a_plain_autoencoders_gradient(tiny, kind):
    check_objective(of_kind(plain(MIXED[:2]), kind), tiny)


@all_kinds
def test_kl_weight_zero_has_the_errors_gradient(tiny, kind):
    check_objective(of_kind([c.replace(kl_weight=0.0) for c in MIXED[:2]], kind), tiny)


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("configs", [REMEDIES, BERNOULLI], ids=["remedies", "bernoulli"])
def test_every_remedy_has_its_definitions_gradient(tiny, configs, model):
    check_objective(of_kind(configs, {"model": model}), tiny)


def test_colour_and_odd_sides_have_the_textbooks_gradient(tiny):
    check_objective(of_kind(MIXED, {"model": "conv"}), replace(tiny, image_shape=(3, 5, 7)))


# --- the written gradient -------------------------------------------------------------------------

LOSSES = [
    {"latent": "deterministic", "kl_weight": 0.0, "likelihood": "gaussian"},
    {"latent": "deterministic", "kl_weight": 0.0, "likelihood": "bernoulli"},
    *({"sigma": s, "free_bits": f} for s in ("fixed", "optimal", "learned") for f in (0.0, 0.5)),
    *({"likelihood": "bernoulli", "free_bits": f} for f in (0.0, 0.5)),
]
NETWORKS = [
    *({"model": "mlp", "hidden": hidden} for hidden in ((), (7,), (7, 5), (8, 7, 6))),
    {"model": "linear"},
]
LISTED = [
    SMALL.replace(latent_size=4, head=head, **network, **loss)
    for network, head, loss in product(NETWORKS, ("gaussian", "relu"), LOSSES)
]
"""Every combination of settings whose gradient is written out."""


def name_of(config: RunConfig) -> str:
    parts = (config.model, *config.hidden, config.head, config.latent[:5], config.likelihood)
    return "-".join(map(str, (*parts, config.sigma, config.free_bits)))


def prepared(config: RunConfig) -> State:
    model = build(config, SHAPE).double()
    if config.sigma == "learned":
        nn.init.constant_(model.log_decoder_variance, -2.5)
    if config.free_bits:
        nn.init.constant_(model.encoder[-1].bias[:2], 2.0)
    state = State([0], [config], [model], {}, stacked=False)
    state.attach()
    return state


@pytest.mark.parametrize("config", LISTED, ids=name_of)
def test_the_written_gradient_is_autograds(config):
    state = prepared(config)
    theirs, before = state.model_of(0), state.weights.clone()
    slopes = state.views(torch.full_like(state.weights, torch.nan))
    for name, parameter in state.model.named_parameters():
        parameter.grad = slopes[name][0]
    assert covers(config, state.model, {})
    written = MLPGradient(config, state.model)
    for factor in (0.0, 0.7):  # the second call overwrites what the first one wrote
        x, eps = drawn(config, SHAPE)
        beta = factor * torch.tensor(objective.beta(config, theirs.pixels)).double()
        written(x.flatten(1), eps, beta)
        theirs.zero_grad()
        loss_of(config, theirs, x, eps, beta).backward()
        for name, parameter in theirs.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(slopes[name][0], expected, rtol=1e-12, atol=1e-15, msg=name)
        assert torch.equal(state.weights, before)


def test_free_bits_charge_some_latents_and_spare_others_in_this_comparison():
    config = SMALL.replace(latent_size=4, free_bits=0.5)
    batch = prepared(config).model.batch(*drawn(config, SHAPE))
    kl = objective.per_image(config, batch).mean().kl
    assert {bool(charged) for charged in kl > 0.5} == {True, False}


def test_convolutions_are_left_to_autograd():
    config = SMALL.replace(model="conv")
    assert not covers(config, build(config, SHAPE), {})


# --- buffers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True], ids=["one run", "a stack"])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_weights_lie_in_one_buffer_and_those_of_linear_layers_as_in_by_out(model, stacked):
    config = SMALL.replace(model=model)
    rows = [0, 1] if stacked else [0]
    models = [build(config, SHAPE) for _ in rows]
    state = State(rows, [config for _ in rows], models, {}, stacked=stacked)
    state.weights.fill_(7.0)
    state.weights[1:] = 5.0
    for row in rows:
        assert (flat(state.model_of(row)) == (5.0 if row else 7.0)).all()
    for name, view in state.views(state.weights).items():
        assert view.data_ptr() % 64 == state.weights.data_ptr() % 64
        if view.dim() == 3:
            assert all(row.t().is_contiguous() for row in view), name
    if not stacked:
        state.attach()
        assert (flat(state.model) == 7.0).all()
        for name, parameter in state.model.named_parameters():
            assert parameter.data_ptr() == state.views(state.weights)[name].data_ptr()
            assert parameter.dim() != 2 or parameter.t().is_contiguous(), name


@pytest.mark.parametrize("stacked", [False, True], ids=["one run", "a stack"])
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_runs_come_back_as_copies_with_their_buffers_and_frozen_parameters(model, stacked):
    config = SMALL.replace(model=model, sigma="learned")
    models = [build(config.replace(seed=seed), SHAPE) for seed in range(3 if stacked else 1)]
    for seed, run in enumerate(models):
        run.encoder.append(nn.BatchNorm1d(2 * config.latent_size))
        nn.init.constant_(run.encoder[-1].running_mean, seed)
        run.decoder[0].weight.requires_grad = False
    before = [copy.deepcopy(run) for run in models]
    state = State(range(len(models)), [config] * len(models), models, {}, stacked=stacked)
    last = len(models[0].encoder) - 1
    assert {"decoder.0.weight", f"encoder.{last}.running_mean"} <= state.constants.keys()
    back = [state.model_of(row) for row in range(len(models))]
    state.weights.zero_()
    for numbers in state.constants.values():
        numbers.zero_()
    for old, run in zip(before, back, strict=True):
        assert list(run.state_dict()) == list(old.state_dict())
        for name, value in old.state_dict().items():
            assert torch.equal(run.state_dict()[name], value), name
    assert not flat(state.model_of(0)).any()
