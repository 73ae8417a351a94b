"""One contestant in a process of its own, which trains for a turn whenever it is told to.

`python -m benchmarks.contestant NAME ...` writes `ready`, then answers every line of its input with
the training images per second of one turn. What a contestant sets (threads, denormals, the core it
stays on) meets no other. `benchmarks.throughput` starts these processes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

Rounds = Iterator[tuple[int, float]]
"""Images seen and seconds taken, again and again."""

FOREVER = 10**6
"""Epochs of a harness training that is stopped from outside."""


def main() -> None:
    """Get ready, then serve turns until the input ends."""
    args = parse()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    if args.core is not None:
        stay_on(args.core)
    rounds = CONTESTANTS[args.name](args)
    next(rounds)  # compiles, captures, warms caches
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(turn(rounds, args.seconds), file=answers, flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contestant", description=__doc__)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="of 32 images, in a round")
    parser.add_argument("--seconds", type=float, required=True, help="least length of a turn")
    parser.add_argument("--runs", type=int, default=1, help="trained together, if it can do so")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--core", type=int, help="the only core that it may use")
    return parser.parse_args()


def stay_on(core: int) -> None:
    """Keep this process to one core and one thread; before PyTorch or JAX is imported."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"


def turn(rounds: Rounds, seconds: float) -> float:
    """Return images per second of as many rounds as fill the time."""
    images, taken = 0, 0.0
    while taken < seconds:
        more, time_of_it = next(rounds)
        images, taken = images + more, taken + time_of_it
    return images / taken


def timed(rounds: Iterator[int], wait: Callable[[], None] = lambda: None) -> Rounds:
    """Time rounds that say only how many images they saw; `wait` ends with the device's work."""
    while True:
        start = time.perf_counter()
        images = next(rounds)
        wait()
        yield images, time.perf_counter() - start


def harness(args: argparse.Namespace) -> Rounds:
    """Train a stack of the harness; an epoch's seconds are its training without evaluation."""
    from harness import RunConfig, load_dataset, train

    data = load_dataset(args.dataset, args.data_dir)
    configs = [RunConfig.seed_recipe(seed=seed, epochs=FOREVER) for seed in range(args.runs)]
    images = args.steps * configs[0].batch_size
    short = replace(data, train=data.train.head(images), val=data.val.head(500))
    for record in train(configs, short, args.device):
        yield record.images, record.seconds


def blog_loop(args: argparse.Namespace) -> Rounds:
    """Train the blog's loop as written: DataLoader, ToTensor, one step at a time."""
    import torch
    import torchvision
    from torch.utils.data import DataLoader, Subset
    from torchvision.transforms import ToTensor

    from benchmarks import blog
    from harness.data.mnist import TORCHVISION

    source = getattr(torchvision.datasets, TORCHVISION[args.dataset])
    part = source(args.data_dir, train=True, transform=ToTensor())
    part = Subset(part, range(args.steps * blog.BATCH))
    loader = DataLoader(part, batch_size=blog.BATCH, shuffle=True)
    model = blog.BlogVAE().to(torch.device(args.device))
    optimizer = blog.adam(model)

    def rounds() -> Iterator[int]:
        while True:
            yield blog.train(model, optimizer, loader)

    return timed(rounds(), waiter(args.device))


def eager(args: argparse.Namespace) -> Rounds:
    """Train a plain PyTorch loop of one run with its data in memory."""
    from benchmarks import eager as loop

    return timed(loop.rounds(images_of(args)), waiter(args.device))


def pythae(args: argparse.Namespace) -> Rounds:
    """Train pythae's VAE with its own trainer."""
    from benchmarks import peer_pythae

    return timed(peer_pythae.rounds(images_of(args)), waiter(args.device))


def jax(args: argparse.Namespace) -> Rounds:
    """Train the JAX twin."""
    from benchmarks import peer_jax

    return timed(peer_jax.rounds(images_of(args).cpu().numpy(), args.runs))


def images_of(args: argparse.Namespace) -> torch.Tensor:  # noqa: F821 - imported where it is used
    """Return the training images of a round on the device, uint8, shape (N, D)."""
    from benchmarks import blog
    from harness import load_dataset

    part = load_dataset(args.dataset, args.data_dir).train.head(args.steps * blog.BATCH)
    return part.images.to(args.device)


def waiter(device: str) -> Callable[[], None]:
    """Return what waits until the device has done what it was given."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


CONTESTANTS: dict[str, Callable[[argparse.Namespace], Rounds]] = {
    "blog": blog_loop,
    "harness": harness,
    "eager": eager,
    "pythae": pythae,
    "jax": jax,
}


if __name__ == "__main__":
    main()
