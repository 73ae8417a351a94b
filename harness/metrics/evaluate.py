"""Metrics of one run on a split, and the final metrics of finished runs.

The forward pass and the sum over an image's pixels are computed in the model's dtype; sums over
latents and images, and metrics of them, in float64. Names and units are those of docs/metrics.md.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harness import objective, registry, streams
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.errors import line_of
from harness.linear.vae import gap_to_linear, linear_losses
from harness.models.stack import has_hooks, kernels
from harness.models.vae import VAE, lay_out
from harness.objective import SET_RATE, Coefficients, Parts, Posterior, Terms
from harness.parts import likelihoods
from harness.parts.likelihoods import Gaussian, Laplace
from harness.processes import Pool

CHUNK = 500  # most images evaluated at once; fixed, so that sums are always the same
TOGETHER = 32  # tensors of chunks that are kept one by one
CHUNK_PIXELS = 2**24  # most pixels evaluated at once: 64 MiB a run
ERRORS = {"mse": Gaussian.error, "mae": Laplace.error}  # of the decoder means, per pixel

R = TypeVar("R")
Run = tuple[RunConfig, VAE]
Metrics = dict[str, Tensor]  # name -> float64 value of shape (), on the model's device


def active_units(mean: Tensor) -> Tensor:
    """Count the latents whose posterior mean (N, L) varies: #{i : Var_x[mean_i(x)] > 0.01}.

    float64, shape (). (Burda et al. 2015, 1509.00519, section 5.2.)
    """
    return (mean.double().var(0, correction=0) > objective.ACTIVE_VARIANCE).sum(-1).double()


def mse_per_class(mse: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Average the mse (N,) over the images of each class (C,); NaN for a class without images."""
    member = functional.one_hot(labels, classes).to(mse)
    # A product of matrices: that of a vector and a matrix may sum in another order.
    return (mse.unsqueeze(0) @ member).squeeze(0) / member.sum(0)


def coefficients(
    config: RunConfig, pixels: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> Coefficients:
    """Return the numbers of a run's loss after any warm-up, on images of D pixels."""
    number = partial(torch.tensor, dtype=dtype, device=device)
    return Coefficients(
        number(objective.beta(config, pixels)),
        number(config.free_bits) if config.free_bits else None,
        {name: number(weight) for name, weight in config.terms.items()},
    )


@torch.no_grad()
def measure(
    config: RunConfig,
    model: VAE,
    split: Split,
    classes: int,
    noise: Tensor,
    coefficients: Coefficients,
    linear_loss: Tensor | None = None,
    variance: Tensor | None = None,
    terms: Terms | None = None,
    prior: Tensor | None = None,
    training_size: int = 0,
    *,
    is_final: bool = False,
) -> Metrics:
    """Return every metric of a run on a split: those of docs/metrics.md that are defined for it.

    No branch depends on values, so that `torch.vmap` can map the function over runs and a GPU can
    capture it; of the configuration only settings that all runs of a stack share are read. The
    model is in `eval` mode; noise (N, L) and draws from the prior (N, L), for loss terms, are of
    its dtype, and all other numbers float64. `linear_loss` is that of the exact linear model on the
    split; `variance` is the decoder's, or its scale, for `distortion`, by default fitted to the
    split. Terms are averaged over parts of the split of about a batch. Standard errors over images
    are of final metrics alone.
    """
    each, means, term_means = _forward(
        config, model, split, noise, terms or {}, prior, training_size
    )
    pixels, kind = split.images.shape[1], model.kind
    scale = None if model.scale is None else model.scale.double()
    best = likelihoods.fitted(kind, means.error, pixels)
    fitted = best if variance is None else variance
    loss = objective.loss(config, means, coefficients, scale, pixels, kind)
    for name, value in term_means.items():
        loss = loss + coefficients.weights[name] * value / pixels
    metrics = {"loss": loss} | {name: each[name].mean(0) / pixels for name in ERRORS}
    if means.kl is not None:
        metrics["rate"] = means.kl.sum(-1)
    if config.has_likelihood:
        metrics["distortion"] = likelihoods.distortion(kind, means.error, fitted, pixels)
    if {"rate", "distortion"} <= metrics.keys():
        metrics["neg_elbo"] = metrics["distortion"] + metrics["rate"]
        if is_final:
            distortion = likelihoods.distortion(kind, each["error"], fitted, pixels)
            std = (distortion + each["rate"]).std()
            metrics["neg_elbo_se"] = std / math.sqrt(len(split))
        if config.drawing != "none":
            bits = metrics["neg_elbo"] / (pixels * math.log(2)) + math.log2(split.levels)
            metrics["bits_per_dim"] = bits
    is_gaussian = config.likelihood == "gaussian"
    if kind.has_scale and (config.sigma != "fixed" or SET_RATE.isdisjoint(config.terms)):
        # The loss is an ELBO for the decoder variance, or scale, beta * unit.
        free = fitted if scale is None else scale
        unit = free if config.sigma != "fixed" else likelihoods.unit(kind, pixels)
        metrics["calibration_ratio"] = coefficients.beta * unit / best
        if not is_gaussian:
            metrics[f"{config.likelihood}_scale"] = coefficients.beta * unit
    if kind.has_scale and not is_gaussian:
        metrics["fitted_scale"] = best
    metrics["active_units"] = active_units(each["mean"])
    if scale is not None:
        metrics["learned_variance" if is_gaussian else "learned_scale"] = scale
    if linear_loss is not None:
        metrics["gap_to_linear"] = gap_to_linear(linear_loss, loss)
    metrics |= {f"term/{name}": value for name, value in term_means.items()}
    if means.kl is not None:
        metrics |= {f"kl/{i}": value for i, value in enumerate(means.kl.unbind())}
    if classes:
        of_class = mse_per_class(each["mse"] / pixels, split.labels, classes)
        metrics |= {f"mse_class/{c}": value for c, value in enumerate(of_class.unbind())}
    return metrics


def _forward(
    config: RunConfig,
    model: VAE,
    split: Split,
    noise: Tensor,
    terms: Terms,
    prior: Tensor | None = None,
    training_size: int = 0,
) -> tuple[Metrics, Parts, Metrics]:
    # Of each image, error, SSE, S1, rate and posterior mean; means over images; and mean terms.
    kept = defaultdict[str, list[Tensor]](list)
    for rows in _batches(config, split) if terms else chunks(*split.images.shape):
        x = pixels(model, split, rows)
        batch = model.batch(x, noise[rows], None if prior is None else prior[rows], training_size)
        part = objective.per_image(config, batch, model.kind)
        each = {"error": part.error, "mean": batch.posterior.mean}
        for name, error in ERRORS.items():  # that of the likelihood is computed already
            known = model.kind.error is error
            each[name] = part.error if known else error(batch.x, batch.reconstruction)
        if part.kl is not None:
            each["kl"] = part.kl.double().sum(0, keepdim=True)
            each["rate"] = part.kl.double().sum(-1)
        each |= {f"term/{n}": term(batch).double().view(1) * len(x) for n, term in terms.items()}
        for name, value in each.items():
            # Joined now and then: thousands of small tensors that are kept between large ones that
            # are freed would break up the heap, by 1 GB for 300,000 images.
            kept[name].append(value)
            if len(kept[name]) == TOGETHER:
                kept[name] = [torch.cat(kept[name])]
    found = {name: torch.cat(values).double() for name, values in kept.items()}
    kl = found["kl"].sum(0) / len(split) if "kl" in found else None
    means = Parts(found["error"].mean(0), kl)
    return found, means, {name: found[f"term/{name}"].sum(0) / len(split) for name in terms}


def fitted_scale(metrics: Metrics) -> Tensor:
    """Return the decoder's variance, or scale, that was fitted to a split, from its metrics."""
    return metrics.get("fitted_scale", metrics["mse"])


def _batches(config: RunConfig, split: Split) -> Iterator[slice]:
    # Parts of nearly equal size, none larger than a batch of training.
    parts = math.ceil(len(split) / config.batch_size)
    for rows in np.array_split(np.arange(len(split)), parts):
        yield slice(int(rows[0]), int(rows[-1]) + 1)


def chunks(images: int, pixels: int) -> Iterator[slice]:
    """Yield the rows of the images, of so many pixels each, that are evaluated at once."""
    size = max(1, min(CHUNK, CHUNK_PIXELS // pixels))
    for start in range(0, images, size):
        yield slice(start, min(start + size, images))


def pixels(model: VAE, split: Split, rows: Tensor | slice) -> Tensor:
    """Return the chosen images as a model takes them: (B, *data_shape), in [0, 1]."""
    x = split.pixels(rows, model.dtype).to(model.device)
    return x.unflatten(1, model.data_shape)


@torch.no_grad()
def posteriors(model: VAE, split: Split) -> Posterior:
    """Return the posteriors of a split, shape (N, L), on the model's device."""
    each = [model.posterior(pixels(model, split, rows)) for rows in chunks(*split.images.shape)]
    return Posterior(*map(torch.cat, zip(*each, strict=True)))


@kernels()
@torch.no_grad()
def per_image(
    model: VAE, split: Split, seed: int = 0, *, part: str = "test", variance: float | None = None
) -> dict[str, np.ndarray]:
    """Return metrics of every image of a split, float64, shape (N,), by name.

    The error is the squared error per pixel, whose mean over images is `mse`; the means of rate,
    distortion and neg_elbo are the metrics of their names. What is not defined for the model is
    absent, as in docs/metrics.md.

    Args:
        model: a trained model.
        split: images as the model is measured on: `data.drawn(config.drawing)`.
        seed: that of the run; with the part, "val" or "test", it fixes the noise.
        part: of the dataset.
        variance: of the decoder, pixel^2, or its scale, for `distortion`: the logged values have
            the run's `val/mse`, or `val/fitted_scale`. None fits it to these images.
    """
    model, split = frozen(model), split.to(model.device)
    config = RunConfig(latent=model.latent)  # type: ignore[arg-type]
    eps = streams.noise(seed, f"evaluate/{part}", len(split), model.latent_size)
    eps = eps.to(model.device, model.dtype)
    each, means, _ = _forward(config, model, split, eps, {})
    found = {"error": each["mse"] / model.pixels}
    if means.kl is not None:
        found["rate"] = each["rate"]
    if model.likelihood != "bernoulli" or split.largest == 1:  # of grey pixels it is no likelihood
        fitted = likelihoods.fitted(model.kind, means.error, model.pixels)
        scale = fitted if variance is None else fitted.new_tensor(variance)
        found["distortion"] = likelihoods.distortion(model.kind, each["error"], scale, model.pixels)
    if {"rate", "distortion"} <= found.keys():
        found["neg_elbo"] = found["distortion"] + found["rate"]
    return {name: values.cpu().numpy() for name, values in found.items()}


def conditions(
    config: RunConfig, model: VAE, part: str, images: int, linear_loss: Tensor | None = None
) -> dict[str, Any]:
    """Return the arguments of `measure` on a split that differ between runs, at every epoch."""

    def noise(purpose: str) -> Tensor:
        drawn = streams.noise(config.seed, f"evaluate/{purpose}", images, config.latent_size)
        return drawn.to(model.device, model.dtype)

    given: dict[str, Any] = {"noise": noise(part), "linear_loss": linear_loss}
    given["coefficients"] = coefficients(config, model.pixels, model.device)
    return given | ({"prior": noise(f"prior/{part}")} if config.terms else {})


@kernels()
def evaluate(runs: Sequence[Run], data: Dataset) -> list[dict[str, float]]:
    """Return the final metrics of runs, pairs of a configuration and a model on one device.

    The decoder variance is fitted on the validation split. Names are prefixed `val/` and `test/`,
    and plain for test. Metrics that are not defined for the run, or not finite, are absent.
    """
    configs = [config for config, _ in runs]
    linear = [linear_losses(configs, data, split).tolist() for split in (data.val, data.test)]
    further = [
        (objective.terms_of(config), losses)
        for config, losses in zip(configs, zip(*linear, strict=True), strict=True)
    ]
    return on_all_cores(_finals, runs, as_measured(runs, data), further)


def _finals(
    config: RunConfig, model: VAE, data: Dataset, terms: Terms, linear: tuple[float, float]
) -> dict[str, float]:
    found: dict[str, Metrics] = {}
    variance = None
    for part, loss in zip(("val", "test"), linear, strict=True):
        split = getattr(data, part)
        exact = torch.tensor(loss, dtype=torch.float64, device=model.device)
        given = conditions(config, model, part, len(split), exact)
        given |= {"variance": variance, "terms": terms, "training_size": len(data.train)}
        given["is_final"] = part == "test"
        found[part] = measure(config, model, split, data.classes, **given)
        variance = fitted_scale(found["val"])
    named = {f"{part}/{k}": v for part, metrics in found.items() for k, v in metrics.items()}
    return finite(to_floats(named | found["test"]))


@kernels()
def registered_metrics(
    runs: Sequence[Run], data: Dataset
) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Return the values of registered metrics as `val/NAME` and `test/NAME`, and errors by name."""
    if not registry.METRICS:
        return [({}, {})] * len(runs)
    function = partial(_registered, dict(registry.METRICS))
    return on_all_cores(function, runs, as_measured(runs, data))


def _registered(
    metrics: dict[str, registry.Metric], config: RunConfig, model: VAE, data: Dataset
) -> tuple[dict[str, float], dict[str, str]]:
    values, errors = dict[str, float](), dict[str, str]()
    for part in ("val", "test"):
        found, failed = registered_values(model, getattr(data, part), metrics)
        values |= {f"{part}/{name}": value for name, value in found.items()}
        errors |= failed
    return values, errors


@torch.no_grad()
def registered_values(
    model: VAE, split: Split, metrics: Mapping[str, registry.Metric]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return metrics of a model on a split, and the errors of those that have no finite value."""
    values, errors = dict[str, float](), dict[str, str]()
    for name, metric in metrics.items():
        try:
            value = float(metric.function(model, split))
            if not math.isfinite(value):
                raise ValueError(f"its value is {value}")
            values[name] = value
        except Exception as error:  # of a user's function
            errors[name] = line_of(error)
    return values, errors


def as_measured(runs: Sequence[Run], data: Dataset) -> dict[str, Dataset]:
    """Return the dataset on the device of the runs, for each `drawing` among them."""
    kinds = {config.drawing: model.device for config, model in runs}
    return {kind: data.to(device).drawn(kind).shared() for kind, device in kinds.items()}


def frozen(model: VAE) -> VAE:
    """Return a copy of a model in `eval` mode, whose numbers have the same bits in any process."""
    model = copy.deepcopy(model).eval()
    lay_out(model)
    return model


def on_all_cores(
    function: Callable[..., R],
    runs: Sequence[Run],
    by_drawing: Mapping[str, Any],
    further: Sequence[tuple[Any, ...]] | None = None,
) -> list[R]:
    """Return `function(config, model, data of its drawing)` of each run, in their order."""
    return list(in_turn(function, runs, by_drawing, further))


def in_turn(
    function: Callable[..., R],
    runs: Sequence[Run],
    by_drawing: Mapping[str, Any],
    further: Sequence[tuple[Any, ...]] | None = None,
) -> Iterator[R]:
    """Yield what `on_all_cores` returns, while later runs are computed.

    On a CPU each core computes one run at a time. The models are `frozen`; `further` arguments are
    those of each run.
    """
    # Models with hooks cannot always be sent to another process.
    here = any(model.device.type != "cpu" or has_hooks(model) for _, model in runs)
    with Pool(1 if here else len(runs), (function, by_drawing)) as pool:
        # Plain tuples: workers would import a named one's module, `harness.tracking` with MLflow.
        items = ((*run, *more) for run, more in zip(runs, further or [()] * len(runs), strict=True))
        found, place = dict[int, R](), 0
        for index, result in pool.map(_of_run, items):
            found[index] = result
            while place in found:
                yield found.pop(place)
                place += 1


def _of_run(function: Callable[..., R], by_drawing: Mapping[str, Any], item: Any) -> R:  # noqa: ANN401
    config, model, *further = item
    return function(config, frozen(model), by_drawing[config.drawing], *further)


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Return metrics as numbers, copied to the host in one transfer."""
    values = torch.stack(list(metrics.values())).tolist() if metrics else []
    return dict(zip(metrics, values, strict=True))


def finite(values: dict[str, float]) -> dict[str, float]:
    """Leave out metrics without a number (NaN, inf)."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


class BatchLosses(NamedTuple):
    """Losses of batches and their parts beta * rate / D, pixel^2, float64, shape (steps,)."""

    loss: np.ndarray
    kl_term: np.ndarray


@kernels()
@torch.no_grad()
def batch_losses(config: RunConfig, model: VAE, data: Dataset) -> BatchLosses:
    """Return the losses of the batches of one more epoch, as the blog prints them, weights held.

    The KL term is the loss less the loss at beta = 0 with the same noise. Loss terms are left out.
    """
    model, epoch = frozen(model), config.epochs + 1
    split = data.to(model.device).drawn(config.drawing).train
    order = streams.batches(config, len(split), epoch)
    noise = streams.noise(config.seed, "noise", len(order), config.latent_size, epoch)
    known = coefficients(config, data.pixels, model.device, model.dtype)
    columns = []
    parts = (drawn.split(config.batch_size) for drawn in (order, noise))
    for rows, eps in zip(*parts, strict=True):
        batch = model.batch(pixels(model, split, rows), eps.to(model.device, model.dtype))
        means = objective.per_image(config, batch).mean()
        both = [
            objective.loss(config, means, known._replace(beta=beta), batch.scale, data.pixels)
            for beta in (known.beta, 0 * known.beta)
        ]
        columns.append(torch.stack(both))
    loss, error = torch.stack(columns, -1).double().cpu().numpy()
    return BatchLosses(loss, loss - error)
