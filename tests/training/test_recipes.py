"""Training recipes are those of `torch.optim`: updates, rates, clipping, early stops, best weights.

Updates are compared with those of plain PyTorch in float64 over 108 steps.
"""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from textbook import ACTIVATIONS, Textbook, flat
from torch import nn
from torch.optim import lr_scheduler

import harness
from harness import Checkpoints, RunConfig, UserError, registry
from harness.config import UPDATE
from harness.data.dataset import Dataset
from harness.models.vae import build
from harness.objective import terms_of
from harness.training.engine import RunResult, train, train_and_evaluate
from harness.training.mlp_gradient import covers
from harness.training.optimizer import Optimizer, learning_rate

BASE = RunConfig(hidden=(16, 12), latent_size=4, batch_size=8, epochs=9)
"""Of 108 steps on `tiny`."""

OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "adam", "weight_decay": 0.01, "adam_betas": (0.8, 0.99), "adam_eps": 1e-3},
    {"optimizer": "adamw", "weight_decay": 0.5, "clip_norm": 0.02},
    {"optimizer": "sgd", "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 1e-3},
]
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"lr_schedule": "cosine", "lr_warmup_epochs": 2},
    {"lr_schedule": "exponential", "lr_factor": 0.7},
    {"lr_schedule": "steps", "lr_factor": 0.3, "lr_milestones": (2, 5), "lr_warmup_epochs": 1},
]
RECIPES = [
    BASE.replace(**optimizer, **schedule, seed=seed)
    for seed, (optimizer, schedule) in enumerate(product(OPTIMIZERS, SCHEDULES))
]
RECIPES.append(BASE.replace(optimizer="sgd", learning_rate=2.0, clip_norm=0.03))
TRAINED = [RECIPES[row].replace(epochs=4) for row in (1, 6, 11)]
"""One of each optimiser, with other schedules."""


def optimizer_of(config: RunConfig, parameters: Any, **changes: Any) -> torch.optim.Optimizer:
    given = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "foreach": False}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, **{**given, "momentum": config.momentum} | changes)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    given |= {"betas": config.adam_betas, "eps": config.adam_eps}
    return kind(parameters, **given | changes)


def schedule_of(config: RunConfig, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    warmup, milestones = config.lr_warmup_epochs, list(config.lr_milestones)
    then = {
        "constant": partial(lr_scheduler.ConstantLR, factor=1.0),
        "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=config.epochs - warmup),
        "exponential": partial(lr_scheduler.ExponentialLR, gamma=config.lr_factor),
        "steps": partial(lr_scheduler.MultiStepLR, milestones=milestones, gamma=config.lr_factor),
    }[config.lr_schedule](optimizer)
    if not warmup:
        return then
    first = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [first, then], [warmup])


def trained(configs: list[RunConfig], data: Dataset, **settings: Any) -> list[RunResult]:
    return train_and_evaluate(configs, data, **{"device": "cpu", "dtype": torch.float64} | settings)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
def test_every_optimiser_with_every_schedule_is_that_of_torch(captured, clipped):
    # Of the loss (scales * weights^2).sum() / 2.
    configs = [config for config in RECIPES if (config.clip_norm > 0) == clipped]
    start, scales = torch.randn(30).double(), torch.rand(30).double()
    weights, buffers = start.repeat(len(configs), 1), torch.zeros(3, len(configs), 30).double()
    counts, gradient = torch.zeros(len(configs)), buffers[0]
    ours = Optimizer(configs, weights, *buffers, counts, captured=captured)
    for step in range(108):
        if step % 12 == 0:
            ours.begin(1 + step // 12)
        gradient.copy_(scales * weights)
        ours.step()
    for row, config in enumerate(configs):
        parts = [nn.Parameter(part.clone()) for part in start.split(10)]
        optimizer = optimizer_of(config, parts)
        schedule = schedule_of(config, optimizer)
        for step in range(1, 109):
            for part, scale in zip(parts, scales.split(10), strict=True):
                part.grad = scale * part.detach()
            if clipped:
                nn.utils.clip_grad_norm_(parts, config.clip_norm)
            optimizer.step()
            if step % 12 == 0:
                schedule.step()
        torch.testing.assert_close(weights[row], torch.cat(parts), rtol=1e-10, atol=1e-10)
    assert len(weights[:, 0].unique()) == len(configs)


def test_runs_train_as_the_textbook_does_with_their_recipes(tiny, parts):
    *_, last = train(TRAINED, tiny, "cpu", torch.float64)
    for row, config in enumerate(TRAINED):
        loop = Textbook(config, tiny.image_shape)
        optimizer = optimizer_of(config, loop.parameters())
        pixels = tiny.train.pixels(slice(None), torch.float64)
        schedule = schedule_of(config, optimizer)
        loop.train_epochs(pixels, optimizer, schedule, clip=config.clip_norm)
        torch.testing.assert_close(flat(last.model(row)), flat(loop), rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_recipes_on_a_gpu_are_those_on_a_cpu(tiny, caplog):
    for configs in (TRAINED, [WILD.replace(seed=s, patience=2, keep="best") for s in range(2)]):
        on_gpu, on_cpu = (trained(configs, tiny, device=device) for device in ("cuda", "cpu"))
        assert not caplog.records  # which say that runs are trained one by one
        for ours, its in zip(on_gpu, on_cpu, strict=True):
            assert len(ours.history) == len(its.history)
            # Rates that change are float32 in a GPU's memory.
            torch.testing.assert_close(flat(ours.model), flat(its.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", RECIPES[:4])
def test_rates_are_those_of_torchs_schedulers(config):
    optimizer = optimizer_of(config, [nn.Parameter(torch.zeros(()))])
    schedule = schedule_of(config, optimizer)
    for epoch in range(1, config.epochs + 1):
        assert learning_rate(config, epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_the_recipe_of_burda_is_steps():
    # 0.001 * 10^(-i/7) for 3^i epochs, i = 0 to 7, and epsilon 1e-4 beside a loss in nats / image.
    config = RunConfig(
        epochs=3280,
        adam_eps=1e-4 / 784,
        lr_schedule="steps",
        lr_milestones=(1, 4, 13, 40, 121, 364, 1093),
        lr_factor=10 ** (-1 / 7),
    )
    expected = [0.001 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    found = [learning_rate(config, epoch) for epoch in range(1, 3281)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert config.adam_eps == pytest.approx(1.28e-7, rel=0.005)


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_activations_are_those_of_torch(tiny, model):
    configs = [
        BASE.replace(activation=name, model=model, channels=(4,), epochs=1) for name in ACTIVATIONS
    ]
    *_, last = train(configs, tiny, "cpu", torch.float64)
    for row, config in enumerate(configs):
        loop = Textbook(config, tiny.image_shape)
        loop.train_epochs(tiny.train.pixels(slice(None), torch.float64))
        torch.testing.assert_close(flat(last.model(row)), flat(loop), rtol=1e-9, atol=1e-9)
        network = build(config, tiny.image_shape)
        assert covers(config, network, terms_of(config)) == (
            (model, config.activation) == ("mlp", "relu")
        )


# --- recipes of other code, whose loss is not divided by D (docs/recipes.md) ----------------------

D = 64
CONVERTED = [  # settings of other code, and of the harness
    ({"lr": 1e-2, "eps": 0.1}, {"learning_rate": 1e-2, "adam_eps": 0.1 / D}),
    (
        {"lr": 1e-2, "weight_decay": 0.3},
        {"learning_rate": 1e-2, "weight_decay": 0.3 / D, "adam_eps": 1e-8 / D},
    ),
    (
        {"lr": 1e-2, "clip": 0.5, "eps": 0.1},
        {"learning_rate": 1e-2, "clip_norm": 0.5 / D, "adam_eps": 0.1 / D},
    ),
    (
        {"lr": 1e-2, "weight_decay": 0.3},
        {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.3, "adam_eps": 1e-8 / D},
    ),
    (
        {"lr": 2e-3, "momentum": 0.9, "weight_decay": 0.3, "clip": 0.5},
        {
            **{"optimizer": "sgd", "learning_rate": 2e-3 * D, "momentum": 0.9},
            **{"weight_decay": 0.3 / D, "clip_norm": 0.5 / D},
        },
    ),
]


@pytest.mark.parametrize(("theirs", "ours"), CONVERTED, ids=["eps", "L2", "clip", "adamw", "sgd"])
def test_settings_of_other_code_are_converted_as_the_page_says(tiny, theirs, ours):
    config, clip = BASE.replace(**ours, epochs=2), theirs.get("clip", 0.0)
    loop = Textbook(config, tiny.image_shape)
    given = {name: value for name, value in theirs.items() if name != "clip"}
    optimizer = optimizer_of(RunConfig(optimizer=config.optimizer), loop.parameters(), **given)
    pixels = tiny.train.pixels(slice(None), torch.float64)
    loop.train_epochs(pixels, optimizer, clip=clip, scale=D)
    *_, last = train([config], tiny, "cpu", torch.float64)
    # clip_grad_norm_ adds 1e-6 to the norm of either gradient.
    limit = 1e-4 if clip else 1e-9
    torch.testing.assert_close(flat(last.model(0)), flat(loop), rtol=limit, atol=limit)


# --- the best epoch, and early stops --------------------------------------------------------------

WILD = BASE.replace(learning_rate=0.05, kl_weight=0.1, epochs=12)
"""Whose best epoch is not the last."""


def check_equal(one: RunResult, other: RunResult) -> None:
    assert torch.equal(flat(one.model), flat(other.model))
    assert one.metrics == other.metrics


def test_the_best_weights_are_those_of_a_run_that_ends_there(tiny):
    plain = WILD.replace(latent="deterministic", kl_weight=0.0)
    grey = WILD.replace(likelihood="bernoulli")
    for result in trained([c.replace(keep="best") for c in (WILD, plain, grey)], tiny):
        best = result.best_epoch
        assert 1 < best < len(result.history) == 12
        (short,) = trained([result.config.replace(epochs=best, keep="last")], tiny)
        check_equal(result, short)
        assert all(
            result.metrics[k] == v for k, v in result.history[best - 1].items() if k[0] == "v"
        )


def test_patience_stops_a_run_and_leaves_the_others(tiny, request):
    configs = [WILD.replace(seed=s, patience=2 * (s < 2), keep="best") for s in range(3)]
    alone = [trained([config], tiny)[0] for config in configs]
    for how in ("apart", "together"):
        for one, result in zip(alone, trained(configs, tiny), strict=True):
            last = result.best_epoch + 2
            assert len(result.history) == (last if result.config.patience else 12)
            assert result.best_epoch < 10 or not result.config.patience
            if how == "apart":
                check_equal(result, one)
            ours, its = (flat(found.model) for found in (result, one))
            torch.testing.assert_close(ours, its, rtol=1e-9, atol=1e-9)
            assert result.metrics.keys() == alone[2].metrics.keys()
        request.getfixturevalue("together")


def test_a_record_has_the_rows_that_are_finished(tiny):
    configs = [WILD.replace(patience=2), WILD, WILD.replace(seed=1)]
    finished = {}
    for found in train(configs, tiny, "cpu"):
        finished |= {found.rows[row]: found.epoch for row in found.finished}
        assert found.finished == [*found.stopped] or found.epoch == 12
        found.drop([len(found.rows) - 1] if found.epoch == 3 else [])
    assert 2 < finished.pop(0) < 12
    assert finished == {1: 12}


def test_best_weights_have_the_buffers_of_layers_too(tiny, registered):
    @harness.network("normalized")
    def normalized(shape, latent_size):
        encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(D), nn.Linear(D, 2 * latent_size))
        return encoder, nn.Sequential(nn.Linear(latent_size, D), nn.Unflatten(1, shape))

    config = RunConfig(model="normalized", batch_size=8, epochs=12, learning_rate=0.1)
    (result,) = trained([config.replace(keep="best")], tiny)
    assert result.best_epoch < 12
    (short,) = trained([config.replace(epochs=result.best_epoch)], tiny)
    check_equal(result, short)
    assert result.model.encoder[1].num_batches_tracked == 12 * result.best_epoch


# --- checkpoints ----------------------------------------------------------------------------------


def check_resumed(configs: list[RunConfig], data: Dataset, folder: Path, limit: float) -> None:
    kept, stop = Checkpoints(folder, every=100), configs[0].epochs // 2
    running = train(configs, data, "cpu", checkpoints=kept)
    list(islice(running, stop))
    running.close()
    models = {}
    for found in train(configs, data, "cpu", checkpoints=kept):
        assert set(found.resumed) == {stop}
        models |= {found.rows[row]: found.model(row) for row in found.finished}
    for row, result in enumerate(trained(configs, data, dtype=torch.float32)):
        ours, its = flat(models.pop(row)), flat(result.model)
        torch.testing.assert_close(ours, its, rtol=limit, atol=limit)
    assert not models


def test_every_recipe_goes_on_from_its_checkpoint_with_the_same_bits(tiny, tmp_path):
    configs = [c.replace(epochs=4, keep="best", patience=3) for c in RECIPES]
    check_resumed(configs, tiny, tmp_path, limit=0)


@pytest.mark.slow
def test_stacks_go_on_from_checkpoints(tiny, tmp_path, together):
    check_resumed(RECIPES, tiny, tmp_path, limit=1e-4)


def test_a_stopped_run_is_resumed_at_its_end_or_before(tiny, tmp_path):
    config = WILD.replace(keep="best", patience=2)
    (whole,), last = trained([config], tiny, dtype=torch.float32), 0
    for stop in (3, 20):
        folder = tmp_path / str(stop)
        running = train([config], tiny, "cpu", checkpoints=Checkpoints(folder, every=100))
        list(islice(running, stop))
        running.close()
        *_, last = train([config], tiny, "cpu", checkpoints=Checkpoints(folder, every=100))
        assert last.resumed == (min(stop, len(whole.history)),)
        assert (last.epoch, last.finished) == (len(whole.history), [0])
        assert torch.equal(flat(last.model(0)), flat(whole.model))


# --- refusals -------------------------------------------------------------------------------------

REFUSED = [
    ({"momentum": 0.9}, "momentum=0.9 with optimizer='adam' has no effect: .* optimizer='sgd'"),
    ({"optimizer": "sgd", "adam_betas": (0.5, 0.9)}, "adam_betas.* optimizer='sgd' has no effect"),
    ({"optimizer": "sgd", "adam_eps": 1e-4}, "adam_eps.* or optimizer='adamw'$"),
    ({"lr_milestones": (3,)}, "lr_milestones.* lr_schedule='constant' has no effect"),
    ({"lr_schedule": "cosine", "lr_factor": 0.5}, "lr_factor=0.5 with lr_schedule='cosine' has no"),
    ({"lr_schedule": "exponential"}, "lr_factor=1.0 has no effect: give a factor below 1"),
    ({"lr_schedule": "steps", "lr_milestones": (3,)}, "lr_factor=1.0 has no effect"),
    ({"lr_schedule": "steps", "lr_factor": 0.5}, "lr_milestones=.*: give at least one epoch"),
    ({"lr_milestones": (3, 2)}, "lr_milestones=.*: give ascending epochs"),
    ({"lr_milestones": 3}, "lr_milestones=3: give a list of whole numbers >= 1"),
    ({"lr_factor": 1.5}, "lr_factor=1.5: give a number <= 1"),
    ({"adam_betas": (0.9,)}, "adam_betas=.*: give two numbers"),
    ({"adam_betas": (0.9, 1.0)}, "adam_betas=.*: give two numbers < 1"),
    ({"adam_betas": (0.9, "x")}, "adam_betas='x': give a finite number >= 0"),
    ({"adam_eps": 0}, "adam_eps=0: give a finite number > 0"),
    ({"momentum": 1.0}, "momentum=1.0: give a number < 1"),
    ({"clip_norm": math.inf}, "clip_norm=inf: give a finite number >= 0"),
    ({"patience": -1}, "patience=-1: give a whole number >= 0"),
    ({"lr_warmup_epochs": 9}, "lr_warmup_epochs=9 with epochs=9: the warm-up must end before"),
    ({"optimizer": "lion"}, "optimizer='lion': choose one of adam, adamw, sgd"),
    ({"lr_schedule": "linear"}, "choose one of constant, cosine, exponential, steps"),
    ({"keep": "all"}, "keep='all': choose one of last, best"),
    ({"activation": "sin"}, "choose one of relu, tanh, gelu, silu, leaky_relu, elu"),
    (
        {"model": "linear", "activation": "elu"},
        "activation='elu' with model='linear' has no effect",
    ),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_a_recipe_that_cannot_be_followed_is_refused(changes, why):
    with pytest.raises(UserError, match=why):
        BASE.replace(**changes)


def test_an_activation_beside_a_users_network_is_refused(registered):
    registry.network("mine")(lambda shape, size: None)
    with pytest.raises(UserError, match="activation='elu' with model='mine' has no effect"):
        RunConfig(model="mine", activation="elu")


def test_a_stored_run_without_a_recipe_has_the_default_one():
    text = RunConfig().to_json()
    values = json.loads(text)
    for name in (*UPDATE, "clip_norm", "patience", "keep", "activation"):
        del values[name]
    assert RunConfig.from_json(json.dumps(values)) == RunConfig.from_json(text) == RunConfig()
