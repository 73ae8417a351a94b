"""The least time of a training step on this machine: its arithmetic, its bytes, and their rates.

Products. A layer of a inputs and b outputs takes 2 B a b operations forward, as many for the
gradient of its weights, and as many for the slope at its input (which the first layer does not
need). With W = sum of a b over all layers and W1 that of the first:

    operations of a step = 2 B (3 W - W1)

70.9 million for 784-256-64-20, 10-64-256-784 and B = 32. They are timed as PyTorch's own products
of these very shapes, one after another, so their traffic is in their time.

Bytes beside them. Adam reads weight, gradient and both moments and writes all but the gradient:

    bytes of a step = 7 * 4 P

12.2 million with P = 437,540 weights and biases, divided by the measured bandwidth of
c = a + s b on vectors of P numbers. Floor of a step = products' time + bytes / bandwidth: the
update can begin when the gradient is there. Elementwise work of the forward and backward pass,
drawing, gathering and evaluating are counted as nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from harness.config import RunConfig
from harness.processes import Pool

ADAM_BYTES = 7 * 4
TRIAD_BYTES = 3 * 4
TIMES = 3
"""Measurements of a time, of which the median counts."""


@dataclass(frozen=True)
class Floor:
    """What bounds a step of `runs` runs that are computed together.

    Attributes:
        operations: of the products, a step.
        products: seconds of the products, a step.
        bandwidth: bytes a second.
        update: bytes of Adam, a step.
        images: of a step, all runs.
        cores: that do this at once.
    """

    operations: float
    products: float
    bandwidth: float
    update: float
    images: int
    cores: int

    @property
    def seconds(self) -> float:
        """Least seconds of a step."""
        return self.products + self.update / self.bandwidth

    @property
    def images_per_second(self) -> float:
        """Most images a second, all cores together."""
        return self.cores * self.images / self.seconds


def layers(config: RunConfig, pixels: int) -> list[tuple[int, int]]:
    """Return inputs and outputs of every layer, encoder first."""
    encoder = (pixels, *config.hidden, 2 * config.latent_size)
    decoder = (config.latent_size, *reversed(config.hidden), pixels)
    return [pair for w in (encoder, decoder) for pair in zip(w[:-1], w[1:], strict=True)]


def floor(config: RunConfig, pixels: int, runs: int, device: torch.device) -> Floor:
    """Measure what bounds a training of some runs: a run a core on a CPU, one stack on a GPU."""
    shapes, batch = layers(config, pixels), config.batch_size
    together = runs if device.type == "cuda" else 1
    cores = 1 if device.type == "cuda" else min(runs, torch.get_num_threads())
    weights = together * sum(a * b + b for a, b in shapes)

    def both(_: int) -> tuple[float, float]:
        return (
            _seconds(_products(shapes, batch, together, device), device),
            TRIAD_BYTES * weights / _seconds(_triad(weights, device), device),
        )

    with Pool(cores) as pool:  # at once, as in training
        measured = [result for _, result in pool.map(both, range(cores))]
    times, bandwidths = zip(*measured, strict=True)
    products = sum(a * b for a, b in shapes)
    return Floor(
        operations=2 * batch * together * (3 * products - shapes[0][0] * shapes[0][1]),
        products=sum(times) / cores,
        bandwidth=sum(bandwidths) / cores,
        update=ADAM_BYTES * weights,
        images=batch * together,
        cores=cores,
    )


def _products(
    shapes: Sequence[tuple[int, int]], batch: int, runs: int, device: torch.device
) -> Callable[[], None]:
    """Return the matrix products of a step, into buffers made once."""
    lead = () if runs == 1 else (runs,)
    mm = torch.mm if runs == 1 else torch.bmm
    inputs = [torch.rand(*lead, batch, a, device=device) for a, _ in shapes]
    outputs = [torch.rand(*lead, batch, b, device=device) for _, b in shapes]
    weights = [torch.rand(*lead, a, b, device=device) for a, b in shapes]
    slopes = [torch.rand(*lead, a, b, device=device) for a, b in shapes]

    def step() -> None:
        for x, weight, y in zip(inputs, weights, outputs, strict=True):
            mm(x, weight, out=y)
        for i in range(len(shapes) - 1, -1, -1):
            mm(inputs[i].mT, outputs[i], out=slopes[i])
            if i:
                mm(outputs[i], weights[i].mT, out=inputs[i])

    return step


def _triad(numbers: int, device: torch.device) -> Callable[[], None]:
    a, b, c = (torch.rand(numbers, device=device) for _ in range(3))
    return lambda: torch.add(a, b, alpha=0.5, out=c)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of one call, from several rows of calls of about 40 ms."""
    calls = max(1, int(0.04 / _row(work, 3, device)))
    return median(_row(work, calls, device) for _ in range(TIMES))


def _row(work: Callable[[], object], calls: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls
