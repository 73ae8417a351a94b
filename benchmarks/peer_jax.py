"""The same training step in JAX: jitted, `lax.scan` over the epoch's steps, Adam of optax.

Images are uint8 in memory, gathered and scaled in the step; permutation and noise are drawn by JAX
inside the compiled epoch. `vmap` over runs makes a stack of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import blog

WIDTHS = (blog.PIXELS, 256, 64, 2 * blog.LATENTS), (blog.LATENTS, 64, 256, blog.PIXELS)
"""Of encoder and decoder."""

ADAM = optax.adam(blog.LEARNING_RATE)

Layers = list[tuple[jax.Array, jax.Array]]
State = tuple[Any, Any]
"""Weights and Adam's state."""


def initial(key: jax.Array) -> State:
    """Return weights uniform in +-1 / sqrt(inputs), as PyTorch draws them, and Adam's state."""
    keys = iter(jax.random.split(key, 12))
    weights = [
        [
            (_uniform(next(keys), (a, b), a), _uniform(next(keys), (b,), a))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        ]
        for widths in WIDTHS
    ]
    return weights, ADAM.init(weights)


def _uniform(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-(inputs**-0.5), maxval=inputs**-0.5)


def _mlp(layers: Layers, x: jax.Array) -> jax.Array:
    *hidden, (weight, bias) = layers
    for inner, shift in hidden:
        x = jax.nn.relu(x @ inner + shift)
    return x @ weight + bias


def loss(weights: list[Layers], x: jax.Array, eps: jax.Array) -> jax.Array:
    """Return the blog's loss of pixels (B, D) with noise (B, L)."""
    encoder, decoder = weights
    mu, sigma = jnp.split(jax.nn.relu(_mlp(encoder, x)), 2, axis=1)
    output = jax.nn.sigmoid(_mlp(decoder, mu + sigma * eps))
    kl = 0.5 * jnp.sum(mu**2 + sigma**2 - jnp.log(1e-8 + sigma**2) - 1) / x.size
    return jnp.mean((output - x) ** 2) + kl


def epoch(state: State, key: jax.Array, images: jax.Array) -> State:
    """Train one pass over images (N, D), uint8."""
    order_key, noise_key = jax.random.split(key)
    steps = len(images) // blog.BATCH
    order = jax.random.permutation(order_key, len(images))[: steps * blog.BATCH]
    noise = jax.random.normal(noise_key, (steps, blog.BATCH, blog.LATENTS))

    def step(state: State, batch: tuple[jax.Array, jax.Array]) -> tuple[State, None]:
        weights, adam = state
        rows, eps = batch
        slopes = jax.grad(loss)(weights, images[rows].astype(jnp.float32) / 255, eps)
        updates, adam = ADAM.update(slopes, adam)
        return (optax.apply_updates(weights, updates), adam), None

    return jax.lax.scan(step, state, (order.reshape(steps, blog.BATCH), noise))[0]


def rounds(images: np.ndarray, runs: int) -> Iterator[int]:
    """Train for ever; yield the images seen by all runs after each pass.

    Args:
        images: uint8, shape (N, D).
        runs: how many are trained as one, by `vmap`.
    """
    resident = jnp.asarray(images)
    start, keys = jax.random.split(jax.random.key(0))
    one = jax.jit(epoch, donate_argnums=0)
    stack = jax.jit(jax.vmap(epoch, (0, 0, None)), donate_argnums=0)
    first = jax.random.split(start, runs)
    state = initial(start) if runs == 1 else jax.vmap(initial)(first)
    seen = len(images) // blog.BATCH * blog.BATCH * runs
    while True:
        keys, key = jax.random.split(keys)
        if runs == 1:
            state = one(state, key, resident)
        else:
            state = stack(state, jax.random.split(key, runs), resident)
        jax.block_until_ready(state)
        yield seen
