"""Training images per second of users' networks: alone, in a stack, and in a plain PyTorch loop.

`python -m benchmarks.networks --data-dir DIR` prints a section for benchmarks/RESULTS.md. The three
take turns, the first uncounted, and a ratio is taken within a turn. On a CPU a stack is its runs on
all cores, and a run alone and the plain loop have one thread, or those of `--threads N`. "colour"
is the built-in convolutions on colour images of 64 x 64.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from harness import RunConfig, load_dataset, registry, train
from harness.data.dataset import Dataset
from harness.models.vae import build
from harness.training.engine import resolve_device

FILE = Path(__file__).with_name("users_networks.py")
NAMES = (
    *("layer_norm", "residual_mlp", "group_norm", "upsampling", "tied", "attention", "recurrent"),
    *("buffers", "dropout", "batch_norm", "branch", "spatial"),
)
FOREVER = 10**6
"""Epochs of a training that is stopped from outside."""


@machine.clear_errors()
def main() -> None:
    """Measure and print."""
    args = parse()
    device = resolve_device(args.device)
    data = load_dataset("mnist", args.data_dir)
    data = replace(data, train=data.train.head(32 * args.steps), val=data.val.head(100))
    images = torch.randint(256, (32 * args.steps + 200, 3, 64, 64), dtype=torch.uint8)
    parts = {"val": range(100), "test": range(100, 200), "train": range(200, len(images))}
    colour = Dataset.from_tensors("colour", images, rows=parts)
    rows = []
    for name in args.networks:
        if name == "colour":
            rates = measure("conv", colour, device, args)
        else:
            registry.load(f"{FILE}:{name}", "network")
            rates = measure(name, data, device, args)
        rows.append(row(name, *rates))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    settings = (
        f"MNIST, L = 16, float32, batch 32, Adam; {args.repeats} interleaved turns of {args.steps} "
        f"steps a run, stacks of {args.runs}; threads of a run alone: {args.threads}; medians, and "
        "ranges of ratios within a turn."
    )
    header = ["network", "alone", "stack", "plain loop", "stack / alone", "range"]
    header += ["alone / plain", "range"]
    print("\n".join([*machine.hardware(device), settings, "", machine.table(header, rows)]))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser, every = machine.parser("networks", __doc__), (*NAMES, "colour")
    parser.add_argument("--networks", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each; default: 5")
    parser.add_argument("--steps", type=int, default=300, help="of a turn; default: 300")
    parser.add_argument("--runs", type=int, default=8, help="of a stack; default: 8")
    parser.add_argument("--threads", type=int, default=1, help="of a run alone; default: 1")
    return parser.parse_args()


def measure(
    name: str, data: Dataset, device: torch.device, args: argparse.Namespace
) -> list[list[float]]:
    """Return the images per second of each turn: alone, in a stack, in a plain loop."""
    config = RunConfig(model=name, latent_size=16, epochs=FOREVER)
    stack = [config.replace(seed=seed) for seed in range(args.runs)]
    kinds = (
        harness([config], data, device, args.threads),
        harness(stack, data, device),
        plain(config, data, device, args.threads),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention in a stack is a loop over runs
        turns = [[next(kind) for kind in kinds] for _ in range(args.repeats + 1)]
    for kind in kinds:
        kind.close()
    return [list(rates) for rates in zip(*turns[1:], strict=True)]


def harness(
    configs: list[RunConfig], data: Dataset, device: torch.device, threads: int = 1
) -> Generator[float, None, None]:
    """Train runs of the harness; yield images per second, without evaluation."""
    for record in train(configs, data, device.type, threads_per_run=threads):
        yield record.images_per_second


def plain(
    config: RunConfig, data: Dataset, device: torch.device, count: int
) -> Generator[float, None, None]:
    """Train as a user would, data in memory and autograd; yield images per second."""
    model = build(config, data.image_shape).to(device).train()
    pixels = data.train.pixels(slice(None), torch.float32).unflatten(1, data.image_shape).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    threads = torch.get_num_threads()
    while True:
        torch.set_num_threads(count)
        start = time.perf_counter()
        for rows in torch.randperm(len(pixels), device=device).split(config.batch_size):
            optimizer.zero_grad()
            plain_loss(model.encoder, model.decoder, pixels[rows]).backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        torch.set_num_threads(threads)
        yield len(pixels) / seconds


def plain_loss(encoder: torch.nn.Module, decoder: torch.nn.Module, x: Tensor) -> Tensor:
    """Return the squared error and the KL divergence, per pixel."""
    mean, log_variance = encoder(x).chunk(2, dim=1)
    z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    kl = (mean.square() + log_variance.exp() - log_variance - 1).sum() / 2
    return ((decoder(z).sigmoid() - x).square().sum() + kl) / x.numel()


def row(name: str, alone: list[float], stack: list[float], plain: list[float]) -> list[str]:
    """Return a line of the table."""
    rates = [machine.spread(values)[0] for values in (alone, stack, plain)]
    of_stack = machine.spread([a / b for a, b in zip(stack, alone, strict=True)], 2)
    of_one = machine.spread([a / b for a, b in zip(alone, plain, strict=True)], 2)
    return [name, *rates, *of_stack, *of_one]


if __name__ == "__main__":
    main()
