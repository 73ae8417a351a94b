"""The gradient written out is autograd's, and autograd's of a stack is each run's textbook one.

A step of convolutions has its gradient from autograd, in the same buffers.
"""

from dataclasses import replace

import pytest
import torch
from textbook import BERNOULLI, MIXED, REMEDIES, Textbook, flat, plain

from harness.autograd import Autograd
from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.elbo import losses
from harness.gradient import Gradient
from harness.objective import betas
from harness.step import Step
from harness.vae import VAE, initial

KINDS = [
    {"model": "mlp", "head": "gaussian"},
    {"model": "mlp", "head": "relu"},
    {"model": "linear", "head": "gaussian"},
    {"model": "conv", "head": "gaussian"},
]
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k.values()))


def of_kind(configs: list[RunConfig], kind: dict[str, str]) -> list[RunConfig]:
    return [c.replace(**kind) for c in configs]


def check_gradients(configs: list[RunConfig], data: Dataset) -> None:
    """Compare loss and gradient of each run of a stack with autograd of the textbook's formula."""
    model = VAE([initial(c, data.image_shape).double() for c in configs])
    x = torch.rand(len(configs), 8, data.pixels, dtype=torch.float64)
    eps = torch.randn(len(configs), 8, model.latent_size, dtype=torch.float64)
    values = losses(model, x, eps, betas(configs, data.pixels))
    values.sum().backward()
    with torch.no_grad():  # gradients in the weights' place can be taken out run by run
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    for s, config in enumerate(configs):
        textbook = Textbook(config, data.image_shape)
        loss = textbook.loss(x[s], eps[s, :, : config.latent_size])
        expected = torch.cat([g.flatten() for g in gradients(loss, textbook)])
        torch.testing.assert_close(values[s], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(flat(model.run(s)), expected, rtol=1e-10, atol=1e-14)


def gradients(loss: torch.Tensor, model: Textbook) -> list[torch.Tensor]:
    # The plain autoencoder's head has outputs that nothing depends on, hence materialize.
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


@all_kinds
def test_the_stacked_gradient_is_each_runs_textbook_gradient(tiny, kind):
    check_gradients(of_kind(MIXED, kind), tiny)


@all_kinds
def test_a_deterministic_latent_has_a_plain_autoencoders_gradient(tiny, kind):
    check_gradients(of_kind(plain(MIXED), kind), tiny)


@all_kinds
def test_kl_weight_zero_has_the_errors_gradient(tiny, kind):
    check_gradients(of_kind([c.replace(kl_weight=0.0) for c in MIXED], kind), tiny)


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("configs", [REMEDIES, BERNOULLI], ids=["remedies", "bernoulli"])
def test_every_remedy_has_its_definitions_gradient(tiny, configs, model):
    check_gradients(of_kind(configs, {"model": model}), tiny)


def test_colour_and_odd_sides_have_the_textbooks_gradient(tiny):
    images = replace(tiny, image_shape=(3, 5, 7))
    check_gradients(of_kind(MIXED, {"model": "conv"}), images)


# --- in a step ----------------------------------------------------------------------------------

CASES = {
    **{"-".join(kind.values()): of_kind(MIXED, kind) for kind in KINDS},
    **{"plain " + "-".join(kind.values()): of_kind(plain(MIXED), kind) for kind in KINDS},
    "remedies": REMEDIES,
    "remedies, relu": [c.replace(head="relu") for c in REMEDIES],
    "bernoulli": BERNOULLI,
    "bernoulli, linear": [c.replace(model="linear") for c in BERNOULLI],
    "remedies, conv": [c.replace(model="conv") for c in REMEDIES],
    "bernoulli, conv": [c.replace(model="conv") for c in BERNOULLI],
}


def stack_of(configs: list[RunConfig], data: Dataset) -> VAE:
    model = VAE([initial(c, data.image_shape).double() for c in configs])
    if model.log_decoder_variance is not None:
        torch.nn.init.constant_(model.log_decoder_variance, -2.5)
    return model


def slopes(model: VAE) -> Gradient | Autograd:
    """Return what a step has of a model."""
    return Step(model, 1).gradient


def check_written(configs: list[RunConfig], data: Dataset) -> None:
    """Compare both gradients, and that writing one changes no weight."""
    theirs, ours = stack_of(configs, data), stack_of(configs, data)
    x = torch.rand(len(configs), 8, data.pixels, dtype=torch.float64)
    eps = torch.randn(len(configs), 8, ours.latent_size, dtype=torch.float64) * ours.used_latents
    beta = betas(configs, data.pixels)
    losses(theirs, x, eps, beta).sum().backward()
    gradient = slopes(ours)
    one = len(configs) == 1
    for _ in range(2):  # the second call overwrites what the first one wrote
        gradient(x[0] if one else x, eps[0] if one else eps, beta.view(*gradient.lead, 1, 1))
    for name, parameter in theirs.named_parameters():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        written = ours.get_parameter(name)
        torch.testing.assert_close(written.grad, slope, rtol=1e-12, atol=1e-15, msg=name)
        assert torch.equal(written, parameter), name


@pytest.mark.parametrize("configs", CASES.values(), ids=CASES.keys())
def test_the_gradient_of_a_step_is_autograds(tiny, configs):
    check_written(configs, tiny)
    for config in configs:
        check_written([config], tiny)


@pytest.mark.parametrize(("kind", "way"), [("mlp", Gradient), ("conv", Autograd)])
def test_weights_and_gradients_lie_in_one_buffer_each_run_its_row(tiny, kind, way):
    model = stack_of(of_kind(MIXED, {"model": kind}), tiny)
    gradient = slopes(model)
    assert type(gradient) is way
    gradient.weights[1] = 7.0
    gradient.gradients[2] = 5.0
    for parameter in model.parameters():
        assert (parameter[1] == 7).all()
        assert not (parameter[0] == 7).any()
        assert (parameter.grad[2] == 5).all()
        assert parameter.data_ptr() % 64 == gradient.weights.data_ptr() % 64
