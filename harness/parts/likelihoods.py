"""Likelihoods that are built in, each a class of static functions that a user could write.

Symbols: B images of a batch, D pixels (all channels), x pixels in [0, 1], y the decoder's output
behind its non-linearity, a the output before it, which classes with `logits` take. The error of an
image is what training sums; its negative log-density is linear in it, so that a mean error gives
the mean density. A scale is a tensor of shape (), and the weight of the error is in proportion to
1 / scale.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.errors import UserError, line_of

LARGEST_LOG_SCALE, BISECTIONS = 30.0, 64  # of the search for a scale without `fit`
SMALL_LOGIT = 0.5  # below which the continuous Bernoulli's normaliser is a series
SERIES = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600, -691 / 15692092416000)

Kind = Any
"""A likelihood: a class as `registry.likelihood` describes it."""


class Gaussian:
    """Independent Gaussian pixels whose variance is the scale: the error is SSE, pixel^2."""

    logits, has_scale = False, True

    @staticmethod
    def error(x: Tensor, output: Tensor) -> Tensor:
        """Return SSE = sum_d (x_d - y_d)^2, shape (B,), of decoder means y."""
        return (x - output).square().flatten(1).sum(-1)

    @staticmethod
    def neg_log_density(error: Tensor, scale: Tensor, pixels: int) -> Tensor:
        """Return (D ln(2 pi variance) + SSE / variance) / 2."""
        return (pixels * torch.log(2 * math.pi * scale) + error / scale) / 2

    @staticmethod
    def distortion(mean_error: Tensor, scale: Tensor | None, pixels: int) -> Tensor:
        """Return D/2 (ln(2 pi variance) + mse / variance): the same, in the bits of old numbers."""
        mse = mean_error / pixels
        variance = mse if scale is None else scale
        return pixels / 2 * (torch.log(2 * math.pi * variance) + mse / variance)

    @staticmethod
    def fit(mean_error: Tensor, pixels: int) -> Tensor:
        """Return the mean error of a pixel."""
        return mean_error / pixels

    @staticmethod
    def mean(output: Tensor) -> Tensor:
        """Return the output itself."""
        return output

    @staticmethod
    def std(scale: float) -> float:
        """Return the standard deviation of a pixel."""
        return math.sqrt(scale)


class Laplace:
    """Independent Laplace pixels of scale b: the error is S1, pixel."""

    logits, has_scale = False, True
    mean, fit = Gaussian.mean, Gaussian.fit

    @staticmethod
    def error(x: Tensor, output: Tensor) -> Tensor:
        """Return S1 = sum_d |x_d - y_d|, shape (B,), of decoder means y."""
        return (x - output).abs().flatten(1).sum(-1)

    @staticmethod
    def neg_log_density(error: Tensor, scale: Tensor, pixels: int) -> Tensor:
        """Return D ln(2 b) + S1 / b."""
        return pixels * torch.log(2 * scale) + error / scale

    @staticmethod
    def std(scale: float) -> float:
        """Return the standard deviation of a pixel, sqrt(2) b."""
        return math.sqrt(2) * scale


class Bernoulli:
    """Independent Bernoulli pixels: a likelihood of pixels that are 0 or 1."""

    logits, has_scale = True, False
    mean = staticmethod(torch.sigmoid)

    @staticmethod
    def error(x: Tensor, output: Tensor) -> Tensor:
        """Return CE = sum_d ln(1 + exp(a_d)) - x_d a_d, nats (Kingma & Welling 2013, C.1)."""
        return (functional.softplus(output) - x * output).flatten(1).sum(-1)

    @staticmethod
    def neg_log_density(error: Tensor, scale: Tensor, pixels: int) -> Tensor:
        """Return the error."""
        return error


class ContinuousBernoulli:
    """Independent pixels in [0, 1] of density p(x) = C lambda^x (1 - lambda)^(1 - x).

    lambda = sigmoid(a), C = a / tanh(a / 2): the density whose shape is that of grey-pixel
    cross-entropy. (Loaiza-Ganem & Cunningham 2019, 1907.06845.)
    """

    logits, has_scale = True, False
    neg_log_density = Bernoulli.neg_log_density

    @staticmethod
    def error(x: Tensor, output: Tensor) -> Tensor:
        """Return -ln p(x|z) = sum_d ln((exp(a_d) - 1) / a_d) - x_d a_d, nats.

        As a (1/2 - x) + ln(sinh(a/2) / (a/2)), whose second part is even, and a series near 0.
        """
        is_small = output.abs() < SMALL_LOGIT
        squares, series = output.masked_fill(~is_small, 0).square(), torch.zeros_like(output)
        for coefficient in reversed(SERIES):
            series = (series + coefficient) * squares
        b = output.masked_fill(is_small, 1).abs()
        exact = b / 2 + (-torch.expm1(-b)).log() - b.log()
        return (output * (0.5 - x) + torch.where(is_small, series, exact)).flatten(1).sum(-1)

    @staticmethod
    def mean(output: Tensor) -> Tensor:
        """Return lambda / (2 lambda - 1) + 1 / (2 atanh(1 - 2 lambda)), 1/2 at a = 0.

        As 1/2 + 1 / (2 tanh(a/2)) - 1 / a, and a series near 0.
        """
        is_small = output.abs() < SMALL_LOGIT
        a, series = output.masked_fill(~is_small, 0), torch.zeros_like(output)
        for n, coefficient in reversed([*enumerate(SERIES, 1)]):
            series = series * a.square() + 2 * n * coefficient
        far = output.masked_fill(is_small, 1)
        return 0.5 + torch.where(is_small, series * a, 0.5 / (far / 2).tanh() - 1 / far)


def fitted(kind: Kind, mean_error: Tensor, pixels: int) -> Tensor:
    """Return the scale at which the density of a mean error, shape (), is largest; 1 without one.

    By the likelihood's `fit`, else by bisection of the slope in ln(scale), without a gradient: at
    the maximum it is 0.
    """
    if not kind.has_scale:
        return torch.ones_like(mean_error)
    if getattr(kind, "fit", None):
        found: Tensor = kind.fit(mean_error, pixels)
        return found
    error = mean_error.detach()
    slope = torch.func.grad(lambda log: kind.neg_log_density(error, log.exp(), pixels))
    low, high = (torch.full_like(error, end) for end in (-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_above = slope(middle) > 0
        low, high = torch.where(is_above, low, middle), torch.where(is_above, middle, high)
    return ((low + high) / 2).exp()


def distortion(kind: Kind, mean_error: Tensor, scale: Tensor | None, pixels: int) -> Tensor:
    """Return -E_q ln p(x|z) of mean errors with z from q(z|x), at their best scale if it is None.

    Nats per image, in the shape of the errors.
    """
    if own := vars(kind).get("distortion"):  # not that of a class from which a user's inherits
        return torch.as_tensor(own(mean_error, scale, pixels))
    at = fitted(kind, mean_error, pixels) if scale is None else scale
    return torch.as_tensor(kind.neg_log_density(mean_error, at, pixels))


@cache
def unit(kind: Kind, pixels: int) -> float:
    """Return the weight of the error in the density at scale 1: 1/2 of a Gaussian.

    error + beta * rate is a negative ELBO, up to a factor and a constant, at scale beta * unit.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    error = torch.ones_like(one, requires_grad=True)
    with torch.enable_grad():  # not `torch.func.grad`, whose first call imports for two seconds
        return float(torch.autograd.grad(kind.neg_log_density(error, one, pixels), error)[0])


def check(name: str, kind: Kind, data_shape: tuple[int, ...]) -> None:
    """Raise a `UserError` for a user's likelihood whose functions cannot be used on such images."""
    what, shape, pixels = f"likelihood {name!r}", (3, *data_shape), math.prod(data_shape)

    def call(function: str, wanted: tuple[int, ...], *given: Any) -> Tensor:  # noqa: ANN401
        try:
            result = getattr(kind, function)(*given)
        except Exception as error:
            raise UserError(f"{what}: its {function} fails: {line_of(error)}") from error
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        if found != wanted:
            raise UserError(f"{what}: its {function} returns {found}; expected {wanted}")
        return result

    def density(error: float, scale: float) -> float:
        numbers = torch.tensor([error, scale], dtype=torch.float64)
        return float(call("neg_log_density", (), *numbers, pixels))

    call("error", (3,), torch.full(shape, 0.5), torch.full(shape, 0.25))
    call("mean", shape, torch.full(shape, 0.25))
    first, second, third = (density(error, 1.0) for error in (1.0, 2.0, 3.0))
    wide, weight = density(2.0, 2.0) - density(1.0, 2.0), second - first
    near, why = 1e-6 * max(map(abs, (first, second, third, 1.0))), ""
    if not abs(third - second - weight) < near:  # NaN too
        why = f"is not linear in the error: {first:g}, {second:g} and {third:g} at errors 1, 2, 3"
    elif not kind.has_scale and density(1.0, 2.0) != first:
        why = "has a scale; leave has_scale = False out"
    elif kind.has_scale and not (weight > 0 and abs(weight - 2 * wide) < near):
        why = (
            f"weighs the error by {weight:g} at scale 1 and {wide:g} at scale 2; it must be "
            "proportional to 1 / scale (a variance, no deviation), or has_scale = False"
        )
    if why:
        raise UserError(f"{what}: its neg_log_density {why}")
    if not kind.has_scale:
        return
    if getattr(kind, "fit", None):
        call("fit", (), torch.ones(()), pixels)
    best = float(fitted(kind, torch.ones((), dtype=torch.float64), pixels))
    if not density(1.0, best) < min(density(1.0, best * factor) for factor in (0.9, 1.1)):
        raise UserError(f"{what}: its fit returns {best:g}, which is not the best scale of error 1")
