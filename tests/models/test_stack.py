"""A stack maps functions of one run over several, and couples none of them."""

import pytest
import torch
from textbook import SMALL
from torch import nn

from harness import RunConfig, registry
from harness.models.stack import MAPPED, has_hooks, kernels, lift, stack_key
from harness.models.vae import VAE, build

SHAPE = (1, 8, 8)
MODELS = ["mlp", "linear", "conv"]
every_model = pytest.mark.parametrize("model", MODELS)


def runs_of(model: str, **settings) -> list[VAE]:
    config = SMALL.replace(model=model, latent_size=3, **settings)
    return [build(config.replace(seed=seed), SHAPE).double() for seed in range(3)]


def numbers_of(runs: list[VAE]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of runs and their constants by name, with a leading axis S."""
    both = torch.func.stack_module_state(runs)
    given = {name: value.detach() for numbers in both for name, value in numbers.items()}
    trained = {name for name, p in runs[0].named_parameters() if p.requires_grad}
    weights = {name: value for name, value in given.items() if name in trained}
    return weights, {name: value for name, value in given.items() if name not in trained}


def reconstruction(model: VAE, x: torch.Tensor) -> torch.Tensor:
    return model(x)


@every_model
def test_a_lifted_function_is_the_function_of_each_run(model):
    runs, x = runs_of(model), torch.rand(3, 7, *SHAPE).double()
    found = lift(runs[0], reconstruction)(*numbers_of(runs), x)
    for s, run in enumerate(runs):
        torch.testing.assert_close(found[s], run(x[s]))


def squares(model: VAE, x: torch.Tensor, weights: dict, nothing: None) -> torch.Tensor:
    assert nothing is None
    return weights["error"] * (model(x) - x).square().sum()


@every_model
def test_a_gradient_is_that_of_each_run(model):
    runs, x = runs_of(model), torch.rand(3, 7, *SHAPE).double()
    weights = {"error": torch.tensor([1.0, 2.0, 3.0]).double()}
    slopes = lift(runs[0], squares, gradient=True)(*numbers_of(runs), x, weights, None)
    for s, run in enumerate(runs):
        squares(run, x[s], {"error": weights["error"][s]}, None).backward()
        for name, parameter in run.named_parameters():
            torch.testing.assert_close(slopes[name][s], parameter.grad)


@every_model
def test_no_run_depends_on_the_weights_of_another(model):
    runs, x = runs_of(model), torch.rand(3, 7, *SHAPE).double()
    (weights, constants), reconstructed = numbers_of(runs), lift(runs[0], reconstruction)
    before = reconstructed(weights, constants, x)
    for weight in weights.values():
        weight[1] = torch.nan
    after = reconstructed(weights, constants, x)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert after[1].isnan().all()


def test_frozen_parameters_and_buffers_are_constants():
    runs = runs_of("mlp")
    for seed, run in enumerate(runs):
        run.encoder.insert(1, nn.BatchNorm1d(64).double())
        nn.init.constant_(run.encoder[1].running_mean, seed)
        run.decoder[0].weight.requires_grad = False
    (weights, constants), x = numbers_of(runs), torch.rand(3, 7, *SHAPE).double()
    assert {"decoder.0.weight", "encoder.1.running_mean"} <= constants.keys()
    slopes = lift(runs[0], lambda m, x: m.eval()(x).sum(), gradient=True)(weights, constants, x)
    assert slopes.keys() == weights.keys()
    found = lift(runs[0], reconstruction)(weights, constants, x)
    for s, run in enumerate(runs):
        torch.testing.assert_close(found[s], run.eval()(x[s]))


# --- which runs share a stack ---------------------------------------------------------------------

OTHER = {
    "model": "linear",
    "hidden": (8,),
    "channels": (8,),
    "activation": "elu",
    "latent_size": 11,
    "head": "relu",
    "latent": "deterministic",
    "likelihood": "bernoulli",
    "sigma": "learned",
    "batch_size": 16,
    "epochs": 3,
    "precision": "tf32",
    "keep": "best",
    "free_bits": 0.1,
    "clip_norm": 0.1,
    "terms": {"mine": 0.0},
}
"""A value of each setting that runs of a stack share."""


def test_every_setting_that_changes_a_shape_or_a_branch_is_shared():
    base = SMALL.replace(kl_weight=0)
    options = {"model_options", "term_options"}
    assert {*OTHER, *MAPPED, "binarization", *options} == set(SMALL.__dataclass_fields__)
    for name, value in OTHER.items():
        assert stack_key(base.replace(**{name: value})) != stack_key(base), name
    grey = base.replace(likelihood="bernoulli")
    assert stack_key(grey.replace(binarization="threshold")) != stack_key(grey)


def test_options_of_networks_and_terms_are_shared(registered):
    registry.network("wide")(lambda shape, size, *, width=1: None)
    given = {"model": "wide", "model_options": {"width": 2}}
    given |= {"terms": {"mine": 1.0}, "term_options": {"mine": {"power": 2}}}
    one = RunConfig(**given)
    assert stack_key(one) == stack_key(RunConfig(**given, seed=1))
    for other in ({"model_options": {"width": 3}}, {"term_options": {}}):
        assert stack_key(one) != stack_key(one.replace(**other))


CHANGES = {
    "kl_normalization": {"kl_normalization": "sum"},
    "optimizer": {"optimizer": "adamw"},
    "adam_betas": {"adam_betas": (0.5, 0.9)},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "lr_schedule": {"lr_schedule": "cosine"},
    "lr_milestones": {"lr_schedule": "steps", "lr_milestones": (1,), "lr_factor": 0.5},
    "lr_factor": {"lr_schedule": "exponential", "lr_factor": 0.5},
}


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_settings_that_are_numbers_of_the_loss_or_the_update_differ_in_a_stack(name):
    changes = CHANGES.get(name) or {name: getattr(SMALL, name) + 1}
    changed = SMALL.replace(**changes, epochs=9)
    assert stack_key(changed) == stack_key(SMALL.replace(epochs=9))


def test_values_of_free_bits_clip_norm_and_weights_of_terms_differ_in_a_stack():
    one = SMALL.replace(free_bits=0.1, clip_norm=0.1, terms={"mine": 1.0, "other": 0.0})
    other = one.replace(clip_norm=3)
    assert stack_key(one) == stack_key(other.replace(free_bits=2.0, terms={"other": 3, "mine": 0}))
    assert stack_key(one) != stack_key(one.replace(terms={"mine": 1.0}))


# --- hooks ----------------------------------------------------------------------------------------


def hooked(how: str) -> VAE:
    model = build(SMALL, SHAPE)
    layer = model.decoder[2]
    register = {
        "forward": lambda: layer.register_forward_hook(lambda *_: None),
        "before forward": lambda: layer.register_forward_pre_hook(lambda *_: None),
        "backward": lambda: layer.register_full_backward_hook(lambda *_: None),
        "before backward": lambda: layer.register_full_backward_pre_hook(lambda *_: None),
        "of the whole": lambda: model.register_forward_hook(lambda *_: None),
        "parameter": lambda: layer.weight.register_hook(lambda grad: grad),
        "accumulated": lambda: layer.weight.register_post_accumulate_grad_hook(lambda p: None),
        "parametrization": lambda: nn.utils.parametrizations.weight_norm(layer),
    }
    register[how]()
    return model


HOOKS = ["forward", "before forward", "backward", "before backward", "of the whole", "parameter"]


@pytest.mark.parametrize("how", [*HOOKS, "accumulated", "parametrization"])
def test_every_hook_is_found(how):
    assert has_hooks(hooked(how))


@every_model
def test_the_built_in_networks_have_no_hooks(model):
    assert not has_hooks(build(SMALL.replace(model=model), SHAPE))


# --- kernels of a GPU -----------------------------------------------------------------------------


def test_products_and_convolutions_are_exact_unless_tf32_is_chosen():
    def found():
        cudnn = torch.backends.cudnn
        matmul = torch.backends.cuda.matmul.fp32_precision
        return matmul, cudnn.conv.fp32_precision, cudnn.deterministic

    before = found()
    with kernels("tf32"):
        assert found() == ("tf32", "tf32", True)
        with kernels():
            assert found() == ("ieee", "ieee", True)
        assert found() == ("tf32", "tf32", True)
    assert found() == before
