"""Every metric against plain NumPy, one run and one image at a time."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.engine import train
from harness.evaluate import (
    active_units,
    chunks,
    evaluate,
    evaluation_noise,
    measure,
    mse_per_class,
)
from harness.streams import noise
from harness.vae import VAE, SingleVAE, initial

SIZES = (5, 2, 9)
SETTINGS = [
    {"head": "gaussian"},
    {"head": "relu"},
    {"model": "linear"},
    {"latent": "deterministic"},
]
WEIGHTS = (0.3, 0.0, 0.01)
MODES = ("pixels", "batch", "latent")
all_settings = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: next(iter(s.values())))


def lively_run(config: RunConfig) -> SingleVAE:
    """Return a run with weights so large that some latents are active and some are not."""
    run = initial(config, (1, 8, 8)).double()
    with torch.no_grad():
        for part in run.encoder:
            if isinstance(part, nn.Linear):
                part.weight *= 2
        for latent in range(0, config.latent_size, 2):
            run.encoder[-1].weight[latent] *= 1e-2
    return run


def stack_of(settings: dict) -> VAE:
    base = RunConfig(hidden=(16, 12), kl_weight=0.0, **settings)
    plain = base.latent == "deterministic"
    weights = (0.0, 0.0, 0.0) if plain else WEIGHTS
    configs = [
        base.replace(latent_size=n, seed=s, kl_weight=weights[s], kl_normalization=MODES[s])
        for s, n in enumerate(SIZES)
    ]
    return VAE([lively_run(c) for c in configs])


def by_hand(run: SingleVAE, split: Split, name: str) -> dict[str, np.ndarray | float]:
    """Return the metrics of one run, computed image by image in NumPy."""
    config, weights = run.config, [p.detach().numpy() for p in run.parameters()]
    half = len(weights) // 2
    eps = noise([config], name, len(split))[0].double().numpy()
    errors, kls, means = [], [], []
    for image, e in zip(split.images.numpy(), eps, strict=True):
        x = image / 16
        mean, variance = posterior(config, network(weights[:half], x))
        z = mean if config.latent == "deterministic" else mean + np.sqrt(variance) * e
        y = network(weights[half:], z)
        y = 1 / (1 + np.exp(-y)) if config.model == "mlp" else y
        errors.append(np.sum((x - y) ** 2))
        kls.append((mean**2 + variance - np.log(variance) - 1) / 2)
        means.append(mean)
    return {"error": np.array(errors), "kl": np.mean(kls, 0), "mean": np.array(means)}


def network(weights: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    for i in range(0, len(weights), 2):
        x = np.maximum(x, 0) if i else x
        x = weights[i] @ x + weights[i + 1]
    return x


def posterior(config: RunConfig, output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.split(output, 2)
    if config.head == "relu":
        return np.maximum(first, 0), np.maximum(second, 0) ** 2 + 1e-8
    return first, np.exp(second)


def beta_by_hand(config: RunConfig) -> float:
    factor = {"pixels": 1, "batch": 64, "latent": 64 / config.latent_size}
    return config.kl_weight * factor[config.kl_normalization]


def expected_metrics(run: SingleVAE, split: Split, name: str, variance: float | None) -> dict:
    raw, config = by_hand(run, split, name), run.config
    mse, rate = raw["error"].mean() / 64, raw["kl"].sum()
    variance = mse if variance is None else variance
    distortion = 32 * (math.log(2 * math.pi * variance) + mse / variance)
    active = np.mean((raw["mean"] - raw["mean"].mean(0)) ** 2, axis=0) > 0.01
    labels = split.labels.numpy()
    metrics = {
        "mse": mse,
        "distortion": distortion,
        "calibration_ratio": beta_by_hand(config) / 2 / mse,
        "active_units": active.sum(),
    } | {f"mse_class/{c}": raw["error"][labels == c].mean() / 64 for c in range(10)}
    if config.latent == "deterministic":
        return metrics | {"loss": mse}
    return (
        metrics
        | {"rate": rate, "loss": mse + beta_by_hand(config) * rate / 64}
        | {"neg_elbo": distortion + rate}
        | {f"kl/{i}": value for i, value in enumerate(raw["kl"])}
    )


def linear_loss_by_hand(config: RunConfig, train: Split, split: Split) -> float:
    """Return the loss of pPCA with the exact posterior, written with matrices (Bishop, 12.2)."""
    x, y = train.images.numpy() / 16, split.images.numpy() / 16
    s2 = beta_by_hand(config) / 2
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    kept = [-1 - i for i in range(config.latent_size) if values[-1 - i] > max(s2, 1e-12)]
    w = vectors[:, kept] * np.sqrt(values[kept] - s2)
    m = np.linalg.inv(w.T @ w + s2 * np.eye(len(kept)))
    mean, covariance = (y - x.mean(0)) @ w @ m, s2 * m
    error = np.square(y - x.mean(0) - mean @ w.T).sum(1).mean() + np.trace(w @ covariance @ w.T)
    if s2 == 0:
        return error / 64
    kl = np.square(mean).sum(1).mean() + np.trace(covariance) - len(kept)
    return (error + 2 * s2 * (kl - np.linalg.slogdet(covariance)[1]) / 2) / 64


@all_settings
def test_every_metric_is_the_one_computed_by_hand(tiny, settings):
    stack = stack_of(settings)
    for s, metrics in enumerate(evaluate(stack, tiny)):
        run = stack.run(s)
        val = expected_metrics(run, tiny.val, "evaluate/val", None)
        test = expected_metrics(run, tiny.test, "evaluate/test", val["mse"])
        for metrics_of_part, split in ((val, tiny.val), (test, tiny.test)):
            if run.config.latent == "stochastic":
                linear = linear_loss_by_hand(run.config, tiny.train, split)
                metrics_of_part["gap_to_linear"] = 100 * (1 - metrics_of_part["loss"] / linear)
        expected = {f"val/{k}": v for k, v in val.items()}
        expected |= {f"test/{k}": v for k, v in test.items()} | test
        assert metrics == pytest.approx(expected, rel=1e-10)


def test_the_stack_has_active_and_inactive_latents(tiny):
    # Else the test of `active_units` would be empty.
    for metrics, size in zip(evaluate(stack_of({}), tiny), SIZES, strict=True):
        assert 0 < metrics["active_units"] < size


@all_settings
def test_a_run_does_not_have_metrics_that_mean_nothing_to_it(tiny, settings):
    for metrics, size in zip(evaluate(stack_of(settings), tiny), SIZES, strict=True):
        kls = {k for k in metrics if k.startswith("kl/")}
        if settings.get("latent") == "deterministic":
            assert not kls
            assert not {"rate", "neg_elbo"} & set(metrics)
        else:
            assert kls == {f"kl/{i}" for i in range(size)}


def test_test_distortion_uses_the_validation_variance(tiny):
    for metrics in evaluate(stack_of({}), tiny):
        variance, mse = metrics["val/mse"], metrics["test/mse"]
        assert variance != pytest.approx(mse, rel=1e-3)
        log_p = -32 * (math.log(2 * math.pi * variance) + mse / variance)
        assert metrics["test/distortion"] == pytest.approx(-log_p, rel=1e-12)
        least = 32 * (math.log(2 * math.pi * metrics["val/mse"]) + 1)
        assert metrics["val/distortion"] == pytest.approx(least, rel=1e-12)


def test_the_test_split_changes_no_validation_metric(tiny):
    stack = stack_of({})
    other = replace(tiny, test=tiny.train.head(50))
    for a, b in zip(evaluate(stack, tiny), evaluate(stack, other), strict=True):
        assert {k: v for k, v in a.items() if k.startswith("val/")} == {
            k: v for k, v in b.items() if k.startswith("val/")
        }
        assert a["test/mse"] != b["test/mse"]


def test_plain_names_are_those_of_the_test_split(tiny):
    for metrics in evaluate(stack_of({}), tiny):
        plain = {k: v for k, v in metrics.items() if not k.startswith(("val/", "test/"))}
        assert plain == {
            k.removeprefix("test/"): v for k, v in metrics.items() if k.startswith("test/")
        }


def test_large_images_are_evaluated_few_at_once():
    assert [*chunks(1200, 784)] == [slice(0, 500), slice(500, 1000), slice(1000, 1200)]
    assert next(chunks(50, 3 * 512 * 512)) == slice(0, 21)
    assert next(chunks(50, 10**9)) == slice(0, 1)


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_chunks_do_not_matter(tiny, monkeypatch, chunk):
    stack = stack_of({})
    expected = evaluate(stack, tiny)
    # `harness.evaluate` as an attribute is the public function, so the module is asked for so.
    monkeypatch.setattr(sys.modules["harness.evaluate"], "CHUNK", chunk)
    for a, b in zip(evaluate(stack, tiny), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_a_run_taken_out_of_the_stack_has_the_same_metrics(data):
    base = RunConfig(epochs=1, hidden=(32,), kl_weight=0.1)
    configs = [base.replace(latent_size=n, seed=n) for n in SIZES]
    *_, last = train(configs, data, device="cpu")
    for s, metrics in enumerate(evaluate(last.model, data)):
        (alone,) = evaluate(last.model.run(s), data)
        assert alone == pytest.approx(metrics, rel=1e-6, abs=1e-9)


def test_evaluation_repeats_bitwise_and_leaves_the_model_alone(tiny):
    stack = stack_of({})
    before = {k: v.clone() for k, v in stack.state_dict().items()}
    assert evaluate(stack, tiny) == evaluate(stack, tiny)
    assert all(torch.equal(v, before[k]) for k, v in stack.state_dict().items())


def test_metrics_are_float64_and_one_per_run(tiny):
    stack = stack_of({}).float()
    metrics = measure(stack, tiny.val, evaluation_noise(stack, "val", len(tiny.val)), 10)
    assert all(v.shape == (3,) and v.dtype == torch.float64 for v in metrics.values())
    assert not any(v.requires_grad for v in metrics.values())


def test_active_units_counts_variances_above_a_hundredth():
    deviation = torch.tensor([0.0, 0.0999, 0.1001, 3.0], dtype=torch.float64)
    mean = 5 + deviation * torch.tensor([-1.0, 1.0]).repeat(50).view(1, 100, 1)
    assert active_units(mean).tolist() == [2.0]
    assert active_units(mean.float()).tolist() == [2.0]


def test_a_class_without_images_has_no_error():
    mse = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    per_class = mse_per_class(mse, torch.tensor([2, 0, 2]), classes=3)
    assert per_class[0, [0, 2]].tolist() == [2.0, 2.5]
    assert per_class[0, 1].isnan()


def test_a_collapsed_model_has_rate_zero_and_the_datas_variance(data):
    config = RunConfig(model="linear", latent_size=2)
    run = initial(config, data.image_shape).double()
    with torch.no_grad():
        for parameter in run.parameters():
            parameter.zero_()
        run.decoder[-1].bias.copy_(pixels(data).mean(0))
    (metrics,) = evaluate(run, data)
    variance = pixels(data).var(0, correction=0).mean().item()
    assert metrics["val/mse"] == pytest.approx(variance, rel=1e-12)
    assert metrics["val/rate"] == metrics["active_units"] == 0


def pixels(data: Dataset) -> torch.Tensor:
    return data.val.pixels(slice(None), torch.float64)
