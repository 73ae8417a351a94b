"""Likelihoods that are built in, each a class of static functions that a user could write.

Symbols: B images of a batch, D pixels (all channels), x pixels in [0, 1], y the decoder's output
behind its non-linearity, a the output before it (logits). The `error` of an image is what training
sums; its negative log-density is linear in the error, so that a mean error gives the mean density.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from harness.errors import UserError, line_of

LARGEST_LOG_SCALE = 30.0  # of a scale that `fitted` finds by bisection
BISECTIONS = 64
SMALL_LOGIT = 0.5  # below which the continuous Bernoulli's normaliser is a series
SERIES = (1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600, -691 / 15692092416000)


class Likelihood(Protocol):
    """The functions of a likelihood; those of a user may leave out `fit`, `std` and the flags."""

    logits: bool  # whether the functions take the decoder's output before its non-linearity
    has_scale: bool  # whether the density has a scale

    @staticmethod
    def error(x: Tensor, output: Tensor) -> Tensor:
        """Return the error of each image, shape (B,), for x and output of shape (B, ...)."""

    @staticmethod
    def neg_log_density(error: Tensor, scale: Tensor, D: int) -> Tensor:  # noqa: N803 - D pixels
        """Return -ln p(x|z) of errors, nats in their shape, for a scale of shape ()."""

    @staticmethod
    def mean(output: Tensor) -> Tensor:
        """Return the mean of the density, in the shape of the output."""


Kind = type[Likelihood]


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared error of each image, summed over its pixels: SSE = sum_d (x_d - y_d)^2.

    Pixel^2, shape (B,), of pixels x and decoder means y of shape (B, ...).
    """
    return (x - y).square().flatten(1).sum(-1)


def absolute_error(x: Tensor, y: Tensor) -> Tensor:
    """Return the absolute error of each image, summed over its pixels: S1 = sum_d |x_d - y_d|.

    Shape (B,), of pixels x and decoder means y of shape (B, ...).
    """
    return (x - y).abs().flatten(1).sum(-1)


def cross_entropy(x: Tensor, logits: Tensor) -> Tensor:
    """Return the cross-entropy of each image under independent Bernoulli pixels.

    CE = sum_d ln(1 + exp(a_d)) - x_d a_d   (Kingma & Welling 2013, appendix C.1)

    Nats, shape (B,), of pixels x and logits a of shape (B, ...). It is -ln p(x|z) for pixels that
    are 0 or 1, and no likelihood for grey ones.
    """
    return (functional.softplus(logits) - x * logits).flatten(1).sum(-1)


class Gaussian:
    """Independent Gaussian pixels of one variance, the scale: the error is SSE, pixel^2."""

    logits, has_scale = False, True
    error = staticmethod(squared_error)

    @staticmethod
    def neg_log_density(error: Tensor, scale: Tensor, D: int) -> Tensor:  # noqa: N803
        """Return (D ln(2 pi variance) + SSE / variance) / 2."""
        return (D * torch.log(2 * math.pi * scale) + error / scale) / 2

    @staticmethod
    def distortion(mean_error: Tensor, scale: Tensor | None, D: int) -> Tensor:  # noqa: N803
        """Return that of a mean error as D/2 (ln(2 pi variance) + mse / variance).

        The order of operations decides the last bits, which recorded numbers have.
        """
        mse = mean_error / D
        variance = mse if scale is None else scale
        return D / 2 * (torch.log(2 * math.pi * variance) + mse / variance)

    @staticmethod
    def fit(mean_error: Tensor, D: int) -> Tensor:  # noqa: N803
        """Return the variance at which the density is largest: the mse."""
        return mean_error / D

    @staticmethod
    def mean(output: Tensor) -> Tensor:
        """Return the output itself."""
        return output

    @staticmethod
    def std(scale: float) -> float:
        """Return the standard deviation of a pixel."""
        return math.sqrt(scale)


class Laplace:
    """Independent Laplace pixels of one scale b: the error is S1, the summed absolute error."""

    logits, has_scale = False, True
    error = staticmethod(absolute_error)
    mean, fit = staticmethod(Gaussian.mean), staticmethod(Gaussian.fit)

    @staticmethod
    def neg_log_density(error: Tensor, scale: Tensor, D: int) -> Tensor:  # noqa: N803
        """Return D ln(2 b) + S1 / b, largest at b = S1 / D, the mean absolute error."""
        return D * torch.log(2 * scale) + error / scale

    @staticmethod
    def std(scale: float) -> float:
        """Return the standard deviation of a pixel, sqrt(2) b."""
        return math.sqrt(2) * scale


class Bernoulli:
    """Independent Bernoulli pixels: a likelihood of pixels that are 0 or 1."""

    logits, has_scale = True, False
    error = staticmethod(cross_entropy)

    @staticmethod
    def neg_log_density(error: Tensor, scale: Tensor, D: int) -> Tensor:  # noqa: N803
        """Return the error, the cross-entropy."""
        return error

    @staticmethod
    def mean(output: Tensor) -> Tensor:
        """Return the probability that a pixel is 1."""
        return output.sigmoid()


class ContinuousBernoulli:
    """Independent pixels in [0, 1] of density p(x) = C lambda^x (1 - lambda)^(1 - x).

    lambda = sigmoid(a), C = a / tanh(a / 2): the density whose shape is that of grey-pixel
    cross-entropy. (Loaiza-Ganem & Cunningham 2019, 1907.06845.)
    """

    logits, has_scale = True, False
    neg_log_density = staticmethod(Bernoulli.neg_log_density)

    @staticmethod
    def error(x: Tensor, output: Tensor) -> Tensor:
        """Return -ln p(x|z) = sum_d ln((exp(a_d) - 1) / a_d) - x_d a_d, nats.

        As a (1/2 - x) + ln(sinh(a/2) / (a/2)), whose second part is even, and a series near 0.
        """
        is_small, a = output.abs() < SMALL_LOGIT, output
        squares = torch.where(is_small, a, 0).square()
        series = torch.zeros_like(squares)
        for coefficient in reversed(SERIES):
            series = (series + coefficient) * squares
        b = torch.where(is_small, 1, a).abs()
        exact = b / 2 + (-torch.expm1(-b)).log() - b.log()
        even = torch.where(is_small, series, exact)
        return (a * (0.5 - x) + even).flatten(1).sum(-1)

    @staticmethod
    def mean(output: Tensor) -> Tensor:
        """Return lambda / (2 lambda - 1) + 1 / (2 atanh(1 - 2 lambda)), 1/2 at a = 0.

        As 1/2 + 1 / (2 tanh(a/2)) - 1 / a, and a series near 0.
        """
        is_small, a = output.abs() < SMALL_LOGIT, output
        near = torch.where(is_small, a, 0)
        series = torch.zeros_like(near)
        for n, coefficient in reversed([*enumerate(SERIES, 1)]):
            series = series * near.square() + 2 * n * coefficient
        far = torch.where(is_small, 1, a)
        exact = 0.5 / (far / 2).tanh() - 1 / far
        return 0.5 + torch.where(is_small, series * near, exact)


def fitted(kind: Kind, mean_error: Tensor, pixels: int) -> Tensor:
    """Return the scale at which the density of a mean error, shape (), is largest; 1 without one.

    By the `fit` of the likelihood, else by bisection of the slope in ln(scale), where the density
    has one maximum. No gradient flows through the latter: at the maximum it is 0.
    """
    if not kind.has_scale:
        return torch.ones_like(mean_error)
    if fit := getattr(kind, "fit", None):
        found: Tensor = fit(mean_error, pixels)
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
        found: Tensor = own(mean_error, scale, pixels)
        return found
    at = fitted(kind, mean_error, pixels) if scale is None else scale
    return kind.neg_log_density(mean_error, at, pixels)


@cache
def unit(kind: Kind, pixels: int) -> float:
    """Return the scale for which error + rate is a negative ELBO: 1/2 of a Gaussian's variance.

    It is the weight of the error in the density at scale 1. The weight is proportional to 1 /
    scale, so that error + beta * rate is one, up to a factor and a constant, at scale beta * unit.
    """
    one = torch.ones((), dtype=torch.float64)
    return float(torch.func.grad(lambda error: kind.neg_log_density(error, one, pixels))(one))


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

    x, output = (torch.full(shape, value) for value in (0.5, 0.25))
    call("error", (3,), x, output)
    call("mean", shape, output)
    if kind.has_scale and getattr(kind, "fit", None):
        call("fit", (), torch.ones(()), pixels)
    first, second, third = (density(error, 1.0) for error in (1.0, 2.0, 3.0))
    wide = density(2.0, 2.0) - density(1.0, 2.0)
    near = 1e-6 * max(map(abs, (first, second, third, 1.0)))
    if not abs(third - 2 * second + first) < near:  # NaN too
        numbers = f"{first:g}, {second:g} and {third:g} at errors 1, 2 and 3"
        raise UserError(f"{what}: its neg_log_density is not linear in the error: {numbers}")
    if not kind.has_scale and density(1.0, 2.0) != first:
        raise UserError(f"{what}: its neg_log_density has a scale; leave has_scale = False out")
    if kind.has_scale and not (second > first and abs(second - first - 2 * wide) < near):
        weights = f"{second - first:g} at scale 1 and {wide:g} at scale 2"
        raise UserError(
            f"{what}: its neg_log_density weighs the error by {weights}; the weight must be "
            "proportional to 1 / scale (a variance, no deviation), or set has_scale = False"
        )
    best = float(fitted(kind, torch.ones((), dtype=torch.float64), pixels))
    if kind.has_scale and not density(1.0, best) < min(density(1.0, best * f) for f in (0.9, 1.1)):
        raise UserError(f"{what}: its fit returns {best:g}, which is not the best scale of error 1")
