"""What a user adds to a network or to the loss takes effect: alone, on many cores, in a stack."""

import types
from collections.abc import Callable

import pytest
import torch
from textbook import flat
from torch import Tensor, nn
from torch.nn import functional

import harness
from harness import RunConfig, registry, streams
from harness.data.dataset import Dataset
from harness.models.vae import VAE, build
from harness.training.engine import train
from harness.training.mlp_gradient import covers

CONFIGS = [
    RunConfig(latent_size=3, kl_weight=w, batch_size=8, epochs=1, seed=s, learning_rate=0.01)
    for s, w in enumerate((0.02, 0.5))
]
Layers = tuple[nn.Sequential, nn.Sequential]


def network(data_shape: tuple[int, ...], latent_size: int) -> Layers:
    """Return what the written gradient covers: two hidden layers of the same width."""
    pixels = torch.Size(data_shape).numel()
    encoder = nn.Sequential(
        *(nn.Flatten(), nn.Linear(pixels, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU()),
        nn.Linear(9, 2 * latent_size),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent_size, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU()),
        *(nn.Linear(9, pixels), nn.Unflatten(1, data_shape)),
    )
    return encoder, decoder


class Doubled(nn.Linear):
    """A linear layer whose output is doubled."""

    def forward(self, x: Tensor) -> Tensor:
        """Return twice the layer's output."""
        return 2 * super().forward(x)


def doubled(layer: nn.Linear, x: Tensor) -> Tensor:
    return 2 * functional.linear(x, layer.weight, layer.bias)


def masked(gradient: Tensor) -> Tensor:
    return gradient * (torch.arange(gradient.shape[-1]) % 2)


def tanh(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    encoder[2] = nn.Tanh()


def layer_norm(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    decoder.insert(1, nn.LayerNorm(9))


def forward_hook(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    encoder[1].register_forward_hook(lambda layer, given, output: output.tanh())


def parameter_hook(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    encoder[3].weight.register_hook(masked)


def accumulation_hook(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    def clear(parameter: nn.Parameter) -> None:
        parameter.grad.zero_()

    encoder[3].weight.register_post_accumulate_grad_hook(clear)


def backward_hook(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    decoder[2].register_full_backward_hook(lambda layer, by_input, _: (masked(by_input[0]),))


def frozen(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    encoder[1].weight.requires_grad = False


def shared(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    decoder[2].weight = encoder[3].weight


def shared_layer(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    decoder[2] = encoder[3]


def subclass(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    encoder[3] = Doubled(9, 9)


def no_bias(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    decoder[2] = nn.Linear(9, 9, bias=False)


def replaced_forward(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    decoder[2].forward = types.MethodType(doubled, decoder[2])


def weight_norm(encoder: nn.Sequential, decoder: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(encoder[3])


IN_STACKS = [tanh, layer_norm, frozen, shared, subclass, no_bias]
ONE_BY_ONE = [forward_hook, parameter_hook, accumulation_hook, backward_hook, replaced_forward]
ONE_BY_ONE += [weight_norm, shared_layer]
every_change = pytest.mark.parametrize(
    "change", [*IN_STACKS, *ONE_BY_ONE], ids=lambda c: c.__name__
)
Change = Callable[[nn.Sequential, nn.Sequential], None]


def register(change: Change | None = None) -> list[RunConfig]:
    @harness.network("mine")
    def mine(data_shape, latent_size):
        layers = network(data_shape, latent_size)
        if change is not None:
            change(*layers)
        return layers

    return [config.replace(model="mine") for config in CONFIGS]


def plainly_trained(config: RunConfig, data: Dataset) -> VAE:
    """Train a run as anyone would, with its batches and noise."""
    model = build(config, data.image_shape, data.train.largest).double()
    pixels = data.train.pixels(slice(None), torch.float64).unflatten(1, data.image_shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate, foreach=False)
    images, steps = len(pixels), len(pixels) // config.batch_size
    for epoch in range(1, config.epochs + 1):
        rows = streams.batches(config, images, epoch).split(config.batch_size)
        eps, prior = (
            streams.noise(config.seed, name, images, config.latent_size, epoch).double()
            for name in ("noise", "prior")
        )
        for step, own in enumerate(rows):
            drawn = slice(step * config.batch_size, (step + 1) * config.batch_size)
            progress = ((epoch - 1) * steps + step) / (config.epochs * steps)
            optimizer.zero_grad()
            loss = plain_loss(config, model, pixels[own], eps[drawn])
            for name, weight in config.terms.items():
                batch = model.batch(pixels[own], eps[drawn], prior[drawn], images, progress)
                loss = loss + weight * registry.TERMS[name](batch) / data.pixels
            loss.backward()
            optimizer.step()
    return model


def plain_loss(config: RunConfig, model: VAE, x: Tensor, eps: Tensor) -> Tensor:
    mean, log_variance = model.encoder(x).chunk(2, dim=1)
    x_hat = torch.sigmoid(model.decoder(mean + torch.exp(log_variance / 2) * eps))
    kl = 0.5 * torch.sum(mean**2 + log_variance.exp() - log_variance - 1)
    return functional.mse_loss(x_hat, x) + config.kl_weight * kl / x.numel()


def check(configs: list[RunConfig], data: Dataset, expected: list[VAE]) -> None:
    *_, last = train(configs, data, "cpu", torch.float64)
    for s, model in enumerate(expected):
        torch.testing.assert_close(flat(last.model(s)), flat(model), rtol=1e-9, atol=1e-9)


def test_the_network_that_is_changed_here_is_covered(registered, tiny):
    (config, *_) = register()
    assert covers(config, build(config, tiny.image_shape), {})


@every_change
def test_no_change_to_a_layer_is_covered(registered, tiny, change):
    (config, *_) = register(change)
    assert not covers(config, build(config, tiny.image_shape), {})


@every_change
def test_a_changed_layer_takes_effect(registered, tiny, change):
    expected = [plainly_trained(config, tiny) for config in register(change)]
    without = [plainly_trained(config, tiny) for config in register()]
    assert flat(expected[0]).shape != flat(without[0]).shape or not torch.allclose(
        flat(expected[0]), flat(without[0]), rtol=0, atol=1e-3
    )
    check(register(change), tiny, expected)


@every_change
def test_a_changed_layer_takes_effect_in_workers(registered, tiny, change):
    configs = register(change)
    expected = [plainly_trained(config, tiny) for config in configs]
    torch.set_num_threads(2)
    check(configs, tiny, expected)


@pytest.mark.parametrize("change", IN_STACKS, ids=lambda c: c.__name__)
def test_a_changed_layer_takes_effect_in_a_stack(registered, together, tiny, change):
    configs = register(change)
    check(configs, tiny, [plainly_trained(config, tiny) for config in configs])


@pytest.mark.parametrize("change", ONE_BY_ONE, ids=lambda c: c.__name__)
def test_what_no_stack_can_do_takes_effect_since_its_runs_are_trained_one_by_one(
    registered, stacks, tiny, change, caplog
):
    configs = register(change)
    check(configs, tiny, [plainly_trained(config, tiny) for config in configs])
    (message,) = caplog.messages
    why = "a module is used twice" if change is shared_layer else "a module or a parameter has a"
    assert message.startswith(f"Runs are trained one by one: {why}")


@pytest.mark.parametrize("change", [forward_hook, weight_norm], ids=lambda c: c.__name__)
def test_hooks_take_effect_in_final_metrics_on_many_cores(registered, tiny, change):
    configs = register(change)
    alone = [harness.train_and_evaluate([config], tiny, "cpu")[0].metrics for config in configs]
    torch.set_num_threads(2)
    together = harness.train_and_evaluate(configs, tiny, "cpu")
    assert [result.metrics for result in together] == alone


# --- terms ----------------------------------------------------------------------------------------


def sparsity(batch: harness.objective.Batch) -> Tensor:
    return batch.z.abs().sum(1).mean()


def everything(batch: harness.objective.Batch) -> Tensor:
    to_prior = (batch.z.sort(0).values - batch.prior.sort(0).values).square().mean()
    colour = (batch.x.mean() - batch.reconstruction.mean()).square() + batch.output.square().mean()
    spread = batch.posterior.log_variance.mean() + batch.posterior.mean.square().mean()
    return batch.progress * to_prior + colour + spread * batch.training_size / 96


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_no_term_is_covered_whatever_its_weight(registered, tiny, weight):
    (config, *_) = register()
    harness.term("sparsity")(sparsity)
    config = config.replace(terms={"sparsity": weight})
    assert not covers(config, build(config, tiny.image_shape), {"sparsity": sparsity})


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("term", [sparsity, everything])
def test_a_term_takes_effect(registered, tiny, term, cores):
    check_term(term, tiny, cores)


@pytest.mark.parametrize("term", [sparsity, everything])
def test_a_term_takes_effect_in_a_stack(registered, together, tiny, term):
    check_term(term, tiny)


def check_term(term: Callable, tiny: Dataset, cores: int = 1) -> None:
    harness.term("mine")(term)
    configs = [
        config.replace(terms={"mine": weight})
        for config, weight in zip(register(), (0.0, 5.0), strict=True)
    ]
    expected = [plainly_trained(config, tiny) for config in configs]
    without = [plainly_trained(config.replace(terms={}), tiny) for config in configs]
    torch.testing.assert_close(flat(expected[0]), flat(without[0]), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(flat(expected[1]), flat(without[1]), rtol=0, atol=1e-3)
    torch.set_num_threads(cores)
    check(configs, tiny, expected)


def test_several_terms_add_up_and_each_is_measured(registered, parts, tiny):
    harness.term("sparsity")(sparsity)
    harness.term("everything")(everything)
    terms = {"everything": 0.5, "sparsity": 2.0}
    configs = [config.replace(terms=terms) for config in register()]
    expected = [plainly_trained(config, tiny) for config in configs]
    *_, last = train(configs, tiny, "cpu", torch.float64)
    for s, model in enumerate(expected):
        torch.testing.assert_close(flat(last.model(s)), flat(model), rtol=1e-9, atol=1e-9)
        part = sum(weight * last.val[f"term/{name}"][s] for name, weight in terms.items())
        base = last.val["mse"][s] + configs[s].kl_weight * last.val["rate"][s] / tiny.pixels
        assert last.val["loss"][s] == pytest.approx(base + part / tiny.pixels, rel=1e-12)
