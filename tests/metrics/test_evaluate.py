"""Every metric against plain NumPy, one image at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from harness import registry
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.metrics import evaluate as module
from harness.metrics.evaluate import (
    active_units,
    chunks,
    coefficients,
    conditions,
    evaluate,
    measure,
    mse_per_class,
)
from harness.models.stack import lift, map_tensors
from harness.models.vae import VAE, build
from harness.streams import noise

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


def lively_run(config: RunConfig) -> tuple[RunConfig, VAE]:
    """Return a run with weights so large that some latents are active and some are not."""
    model = build(config, (1, 8, 8), largest=16).double()
    with torch.no_grad():
        for part in model.encoder:
            if isinstance(part, nn.Linear):
                part.weight *= 2
        for latent in range(0, config.latent_size, 2):
            model.encoder[-1].weight[latent] *= 1e-2
    return config, model


def lively_runs(settings: dict) -> list[tuple[RunConfig, VAE]]:
    base = RunConfig(hidden=(16, 12), kl_weight=0.0, **settings)
    plain = base.latent == "deterministic"
    weights = (0.0, 0.0, 0.0) if plain else WEIGHTS
    configs = [
        base.replace(latent_size=n, seed=s, kl_weight=weights[s], kl_normalization=MODES[s])
        for s, n in enumerate(SIZES)
    ]
    return [lively_run(c) for c in configs]


def by_hand(config: RunConfig, model: VAE, split: Split, name: str) -> dict:
    """Return the metrics of one run, computed image by image in NumPy."""
    weights = [p.detach().numpy() for p in model.parameters()]
    half = len(weights) // 2
    eps = noise(config.seed, name, len(split), config.latent_size).double().numpy()
    errors, absolute, kls, means = [], [], [], []
    for image, e in zip(split.images.numpy(), eps, strict=True):
        x = image / 16
        mean, variance = posterior(config, network(weights[:half], x))
        z = mean if config.latent == "deterministic" else mean + np.sqrt(variance) * e
        y = network(weights[half:], z)
        y = 1 / (1 + np.exp(-y)) if config.model == "mlp" else y
        errors.append(np.sum((x - y) ** 2))
        absolute.append(np.mean(np.abs(x - y)))
        kls.append((mean**2 + variance - np.log(variance) - 1) / 2)
        means.append(mean)
    return {
        "error": np.array(errors),
        "absolute": np.mean(absolute),
        "kl": np.mean(kls, 0),
        "rate": np.sum(kls, 1),
        "mean": np.array(means),
    }


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


def expected_metrics(
    config: RunConfig, model: VAE, split: Split, name: str, variance: float | None
) -> dict:
    raw = by_hand(config, model, split, name)
    mse, rate = raw["error"].mean() / 64, raw["kl"].sum()
    variance = mse if variance is None else variance
    distortion = 32 * (math.log(2 * math.pi * variance) + mse / variance)
    active = np.mean((raw["mean"] - raw["mean"].mean(0)) ** 2, axis=0) > 0.01
    labels = split.labels.numpy()
    each = raw["error"] / variance / 2 + raw["rate"]
    metrics = {
        "mse": mse,
        "mae": raw["absolute"],
        "distortion": distortion,
        "calibration_ratio": beta_by_hand(config) / 2 / mse,
        "active_units": active.sum(),
    } | {f"mse_class/{c}": raw["error"][labels == c].mean() / 64 for c in range(10)}
    if config.latent == "deterministic":
        return metrics | {"loss": mse}
    return (
        metrics
        | {"rate": rate, "loss": mse + beta_by_hand(config) * rate / 64}
        | {"neg_elbo": distortion + rate, "neg_elbo_se": each.std(ddof=1) / math.sqrt(len(each))}
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
    runs = lively_runs(settings)
    for (config, model), metrics in zip(runs, evaluate(runs, tiny), strict=True):
        val = expected_metrics(config, model, tiny.val, "evaluate/val", None)
        test = expected_metrics(config, model, tiny.test, "evaluate/test", val["mse"])
        for metrics_of_part, split in ((val, tiny.val), (test, tiny.test)):
            if config.latent == "stochastic":
                linear = linear_loss_by_hand(config, tiny.train, split)
                metrics_of_part["gap_to_linear"] = 100 * (1 - metrics_of_part["loss"] / linear)
        expected = {f"val/{k}": v for k, v in val.items() if k != "neg_elbo_se"}
        expected |= {f"test/{k}": v for k, v in test.items()} | test
        assert metrics == pytest.approx(expected, rel=1e-10)


def test_the_runs_have_active_and_inactive_latents(tiny):
    # Else the test of `active_units` would be empty.
    for metrics, size in zip(evaluate(lively_runs({}), tiny), SIZES, strict=True):
        assert 0 < metrics["active_units"] < size


@all_settings
def test_a_run_does_not_have_metrics_that_mean_nothing_to_it(tiny, settings):
    for metrics, size in zip(evaluate(lively_runs(settings), tiny), SIZES, strict=True):
        kls = {k for k in metrics if k.startswith("kl/")}
        if settings.get("latent") == "deterministic":
            assert not kls
            assert not {"rate", "neg_elbo"} & set(metrics)
        else:
            assert kls == {f"kl/{i}" for i in range(size)}


def test_cross_entropy_of_grey_pixels_is_no_likelihood(tiny):
    run = lively_run(RunConfig(hidden=(16,), likelihood="bernoulli"))
    (grey,) = evaluate([run], tiny)
    assert not {"distortion", "neg_elbo", "calibration_ratio", "gap_to_linear"} & set(grey)
    binary = run[0].replace(binarization="threshold"), run[1]
    (metrics,) = evaluate([binary], tiny)
    assert metrics["neg_elbo"] == metrics["distortion"] + metrics["rate"]
    assert metrics["neg_elbo"] / 64 == pytest.approx(metrics["loss"], rel=1e-12)  # beta = 1


def test_test_distortion_uses_the_validation_variance(tiny):
    for metrics in evaluate(lively_runs({}), tiny):
        variance, mse = metrics["val/mse"], metrics["test/mse"]
        assert variance != pytest.approx(mse, rel=1e-3)
        log_p = -32 * (math.log(2 * math.pi * variance) + mse / variance)
        assert metrics["test/distortion"] == pytest.approx(-log_p, rel=1e-12)
        least = 32 * (math.log(2 * math.pi * metrics["val/mse"]) + 1)
        assert metrics["val/distortion"] == pytest.approx(least, rel=1e-12)


def test_the_test_split_changes_no_validation_metric(tiny):
    runs = lively_runs({})
    other = replace(tiny, test=tiny.train.head(50))
    for a, b in zip(evaluate(runs, tiny), evaluate(runs, other), strict=True):
        assert {k: v for k, v in a.items() if k.startswith("val/")} == {
            k: v for k, v in b.items() if k.startswith("val/")
        }
        assert a["test/mse"] != b["test/mse"]


def test_plain_names_are_those_of_the_test_split(tiny):
    for metrics in evaluate(lively_runs({}), tiny):
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
    runs = lively_runs({})
    expected = evaluate(runs, tiny)
    monkeypatch.setattr(module, "CHUNK", chunk)
    for a, b in zip(evaluate(runs, tiny), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-12)


def test_the_numbers_are_the_same_bits_alone_in_company_and_on_any_number_of_cores(tiny, threads):
    runs = [*lively_runs({}), *lively_runs({"likelihood": "bernoulli"})]
    together = evaluate(runs, tiny)
    torch.set_num_threads(1)
    assert together == [evaluate([run], tiny)[0] for run in runs]


def test_evaluation_repeats_bitwise_and_leaves_the_model_alone(tiny):
    ((config, model),) = [lively_runs({})[0]]
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert evaluate([(config, model)], tiny) == evaluate([(config, model)], tiny)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


def measured(config: RunConfig, model: VAE, split: Split, **given) -> dict[str, torch.Tensor]:
    eps = conditions(config, model, "val", len(split))["noise"]
    known = coefficients(config, model.pixels, model.device)
    return measure(config, model, split, 10, eps, known, **given)


def test_metrics_are_float64_numbers(tiny):
    config, model = lively_runs({})[0]
    metrics = measured(config, model.float(), tiny.val)
    assert all(v.shape == () and v.dtype == torch.float64 for v in metrics.values())
    assert not any(v.requires_grad for v in metrics.values())


KINDS = [
    {},
    {"head": "relu", "free_bits": 0.1},
    {"sigma": "learned"},
    {"sigma": "optimal"},
    {"likelihood": "bernoulli"},
    {"model": "conv", "channels": (3, 4)},
    {"latent": "deterministic", "kl_weight": 0.0},
    {"terms": {"spread": 0.5}},
]


def spread(batch):
    return (batch.z - batch.prior).square().mean()


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_stack_of_runs_has_the_metrics_of_its_runs(tiny, settings):
    base = RunConfig(hidden=(16, 12), latent_size=3, **settings)
    weights = (0.0,) * 3 if base.latent == "deterministic" else WEIGHTS
    configs = [base.replace(seed=s, kl_weight=w) for s, w in enumerate(weights)]
    models = [build(c, (1, 8, 8), largest=16).double() for c in configs]
    terms = {name: spread for name in base.terms}
    each = []
    for config, model in zip(configs, models, strict=True):
        known = coefficients(config, 64, model.device)
        eps = conditions(config, model, "val", len(tiny.val))["noise"]
        linear, variance = torch.tensor([0.05, 0.1], dtype=torch.float64) * (1 + config.seed)
        each.append((eps, known, linear, variance, noise(config.seed, "prior", *eps.shape)))

    def metrics(model, eps, known, linear, variance, prior):
        return measure(
            base, model, tiny.val, 10, eps, known, linear, variance, terms, prior, training_size=96
        )

    args = map_tensors(lambda *values: torch.stack(values), *each)
    weights, constants = torch.func.stack_module_state(models)
    together = lift(models[0], metrics)(weights, constants, *args)
    for s, model in enumerate(models):
        alone = metrics(model.eval(), *each[s])
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[name][s], value, rtol=1e-9, atol=1e-9)


@pytest.fixture
def registered(monkeypatch):
    seen = []

    def size(batch):
        seen.append((len(batch.x), batch.training_size, batch.progress, batch.prior.shape))
        return batch.x.mean() * 3

    monkeypatch.setitem(registry.TERMS, "size", size)
    return seen


def test_a_term_is_averaged_over_parts_of_about_a_batch_and_added_to_the_loss(tiny, registered):
    config = RunConfig(hidden=(16,), batch_size=12, terms={"size": 0.5}, latent_size=4)
    model = build(config, (1, 8, 8), largest=16).double()
    (metrics,) = evaluate([(config, model)], tiny)
    (plain,) = evaluate([(config.replace(terms={}), model)], tiny)
    for part in ("val", "test"):
        split = getattr(tiny, part)
        mean = split.pixels(slice(None), torch.float64).mean().item()
        assert metrics[f"{part}/term/size"] == pytest.approx(3 * mean, rel=1e-12)
        loss = plain[f"{part}/loss"] + 0.5 * 3 * mean / 64
        assert metrics[f"{part}/loss"] == pytest.approx(loss, rel=1e-12)
    for name in plain.keys() - {"loss", "val/loss", "test/loss"}:
        if not name.endswith("gap_to_linear"):  # of another loss
            assert metrics[name] == pytest.approx(plain[name], rel=1e-9)
    assert [size for size, *_ in registered] == [10] * 9
    assert {tuple(rest) for _, *rest in registered} == {(96, 1.0, (10, 4))}


def test_parts_are_those_of_tensor_split(tiny):
    for images, batch in ((40, 12), (50, 32), (47, 9), (5, 32), (64, 32)):
        split = tiny.train.head(images)
        found = [*module._batches(RunConfig(batch_size=batch), split)]
        expected = torch.arange(images).tensor_split(math.ceil(images / batch))
        assert [(r.start, r.stop) for r in found] == [(int(e[0]), int(e[-1]) + 1) for e in expected]


def test_active_units_counts_variances_above_a_hundredth():
    deviation = torch.tensor([0.0, 0.0999, 0.1001, 3.0], dtype=torch.float64)
    mean = 5 + deviation * torch.tensor([-1.0, 1.0]).repeat(50).view(100, 1)
    assert active_units(mean) == 2
    assert active_units(mean.float()) == 2


def test_a_class_without_images_has_no_error():
    mse = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    per_class = mse_per_class(mse, torch.tensor([2, 0, 2]), classes=3)
    assert per_class[[0, 2]].tolist() == [2.0, 2.5]
    assert per_class[1].isnan()


def test_a_collapsed_model_has_rate_zero_and_the_datas_variance(data):
    config = RunConfig(model="linear", latent_size=2)
    model = build(config, data.image_shape, data.train.largest).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decoder[0].bias.copy_(pixels(data).mean(0))
    (metrics,) = evaluate([(config, model)], data)
    variance = pixels(data).var(0, correction=0).mean().item()
    assert metrics["val/mse"] == pytest.approx(variance, rel=1e-12)
    assert metrics["val/rate"] == metrics["active_units"] == 0


def pixels(data: Dataset) -> torch.Tensor:
    return data.val.pixels(slice(None), torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_gpu_captures_the_metrics_and_has_those_of_the_cpu(tiny, settings):
    config = RunConfig(hidden=(16, 12), **settings)
    model, terms = (
        build(config, (1, 8, 8), largest=16).double().eval(),
        dict.fromkeys(config.terms, spread),
    )
    prior = noise(0, "prior", len(tiny.val), 10).double()
    expected = measured(config, model, tiny.val, terms=terms, prior=prior)
    model, device = model.cuda(), torch.device("cuda")
    eps = conditions(config, model, "val", len(tiny.val))["noise"]
    known, prior, val = coefficients(config, 64, device), prior.cuda(), tiny.val.to(device)

    def metrics():
        return measure(config, model, val, 10, eps, known, terms=terms, prior=prior)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        metrics()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = metrics()
    graph.replay()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-9, atol=1e-9)
