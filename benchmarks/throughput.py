"""Training images per second: the blog's loop, one run of the harness, and stacks of runs.

`python -m benchmarks.throughput --data-dir DIR` prints a section for benchmarks/RESULTS.md. The
contestants take turns, so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from benchmarks import blog
from harness.config import RunConfig, UserError
from harness.data import TORCHVISION, Dataset, load_dataset
from harness.engine import resolve_device, train

WARM_UP_STEPS = 20
STACKS = (1, 8, 16)
EPOCHS = 3

Contestant = Callable[[], float]
"""Returns training images per second, summed over the runs that are trained together."""


def main() -> None:
    """Measure and print."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = resolve_device(args.device)
        data = load_dataset(args.dataset, args.data_dir)
    except UserError as error:
        sys.exit(f"error: {error}")
    loader = blog_loader(args.dataset, args.data_dir)
    contestants: dict[str, Contestant] = {
        "the blog's loop": lambda: blog_rate(loader, args.steps, device)
    }
    for runs in STACKS:
        name = f"harness, {'one run' if runs == 1 else f'stack of {runs}'}"
        contestants[name] = harness_contestant(data, runs, args.steps, device)
    rates = measure(contestants, args.repeats)
    print("\n".join([*hardware(device), *settings(args), "", *table(rates)]))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", choices=TORCHVISION, default="mnist")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="default: data")
    parser.add_argument("--repeats", type=int, default=3, help="of each contestant; default: 3")
    parser.add_argument("--steps", type=int, default=300, help="of 32 images; default: 300")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


def measure(contestants: dict[str, Contestant], repeats: int) -> dict[str, list[float]]:
    """Let the contestants take turns; return all rates of each."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name, rate in contestants.items():
            rates[name].append(rate())
            print(f"{turn + 1}/{repeats} {name}: {rates[name][-1]:,.0f}/s", file=sys.stderr)
    return rates


def blog_loader(dataset: str, root: Path) -> DataLoader:
    """Return the blog's loader: images decoded, scaled and shuffled one by one."""
    source = getattr(torchvision.datasets, TORCHVISION[dataset])
    part = source(root, train=True, transform=ToTensor())
    return DataLoader(part, batch_size=blog.BATCH, shuffle=True)


def blog_rate(loader: DataLoader, steps: int, device: torch.device) -> float:
    """Time the blog's loop on a number of steps after a warm-up."""
    torch.set_flush_denormal(False)  # the harness sets it; the blog does not
    model = blog.BlogVAE().to(device)
    optimizer = blog.adam(model)
    batches: Iterator = iter(loader)
    blog.train(model, optimizer, islice(batches, WARM_UP_STEPS))
    synchronize(device)
    start = time.perf_counter()
    images = blog.train(model, optimizer, islice(batches, steps))
    synchronize(device)
    return images / (time.perf_counter() - start)


def harness_contestant(data: Dataset, runs: int, steps: int, device: torch.device) -> Contestant:
    """Return the harness's training of a stack, timed on epochs of a number of steps."""
    configs = [RunConfig.seed_recipe(seed=seed, epochs=EPOCHS) for seed in range(runs)]
    images = steps * configs[0].batch_size
    short = replace(data, train=data.train.head(images), val=data.val.head(500))

    def rate() -> float:
        _, *timed = train(configs, short, device.type)  # the first epoch warms up
        return sum(r.images for r in timed) / sum(r.seconds for r in timed)

    return rate


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware(device: torch.device) -> list[str]:
    """Say what was measured on, in two lines."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU used"
    return [
        f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads, {gpu}.",
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"{platform.system()} {platform.release()}, {time.strftime('%Y-%m-%d')}.",
    ]


def cpu_name() -> str:
    """Return the CPU's model as the kernel tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def settings(args: argparse.Namespace) -> list[str]:
    """Say what was trained, in a line."""
    return [
        f"{args.dataset}, the blog's recipe in float32, batch {blog.BATCH}, {args.steps} steps; "
        f"median and range of {args.repeats} turns."
    ]


def table(rates: dict[str, list[float]]) -> list[str]:
    """Return a Markdown table: rates over all runs and per run, and ratios to the first row."""
    base = median(next(iter(rates.values())))
    runs = (1, *STACKS)
    rows = [
        "| what | images/s, all runs | range | images/s and run | all runs / blog |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for (name, values), count in zip(rates.items(), runs, strict=True):
        middle = median(values)
        rows.append(
            f"| {name} | {middle:,.0f} | {min(values):,.0f} to {max(values):,.0f} "
            f"| {middle / count:,.0f} | {middle / base:.1f} |"
        )
    return rows


if __name__ == "__main__":
    main()
