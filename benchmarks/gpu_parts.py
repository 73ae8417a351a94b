"""What `benchmarks.gpu` measures, a part in each process, with the core's libraries alone.

`python -m benchmarks.gpu_parts PART` prints a JSON object a line: a phase and its values, or its
error. What a part has printed is kept if it is killed.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import contestant
from harness.config import RunConfig
from harness.data.dataset import Dataset
from harness.data.load import load_dataset
from harness.training import engine
from harness.training.checkpoint import Saved
from harness.training.step import Step

FOREVER = 10**6
"""Epochs of runs whose training is never finished here."""

PROFILED, COMPARED = 20, 200
"""Steps that are profiled, and that are taken in each precision."""

TOP = 15
"""Kernels of a profile that are listed."""

SEVERAL = 4
"""Times that something is measured; the first does not count."""

Values = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one part."""
    args = parse(arguments)
    PARTS[args.part](args)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--short", action="store_true", help="few images, so that it takes seconds")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--began", type=float, default=time.time(), help="when, by the clock")
    return parser.parse_args(arguments)


def phase(name: str, function: Callable[[], Values]) -> None:
    """Print what a function returns, or how it failed: a failed capture hides its cause below."""
    try:
        found = function()
    except Exception as error:
        chain: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            chain.append(f"{type(cause).__name__}: {cause}"[:500])
            cause = cause.__cause__ or cause.__context__
        traceback.print_exc()
        found = {"error": " <- ".join(chain)}
    print(json.dumps({"phase": name} | found), flush=True)


def dataset(args: argparse.Namespace) -> Dataset:
    """Return MNIST where the folder has it, else drawn images of its size; on the CPU."""
    if (args.data_dir / "MNIST" / "raw").is_dir():
        data = load_dataset("mnist", args.data_dir)
    else:
        train, other = (160, 40) if args.short else (55_000, 5_000)
        shape = (train + 2 * other, 28, 28)
        images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
        parts = np.split(np.arange(len(images)), [train, train + other])
        rows = dict(zip(("train", "val", "test"), parts, strict=True))
        data = Dataset.from_tensors("drawn", images, np.arange(len(images)) % 10, rows=rows)
    return cut(data, 5, 40) if args.short else data


def cut(data: Dataset, steps: int, val: int = 500) -> Dataset:
    """Return a dataset with the training images of so many steps, and so many for validation."""
    return replace(data, train=data.train.head(32 * steps), val=data.val.head(val))


def recipe(runs: int, **changes: Any) -> list[RunConfig]:  # noqa: ANN401 - fields of RunConfig
    """Return runs of the blog's recipe."""
    return [RunConfig.seed_recipe(seed=s, epochs=FOREVER, **changes) for s in range(runs)]


def waiter(device: str) -> Callable[[], None]:
    """Return what waits until the device has done what it was given."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def stacked(configs: Sequence[RunConfig], data: Dataset, device: str) -> list[Step]:
    """Return untrained runs as `harness.train` begins with them; on a CPU as one stack, too."""
    begun = [Saved([], {}) for _ in configs]
    with patch.object(engine, "STACKED", {"cpu", "cuda"}):
        work = engine._begin(configs, begun, data, torch.device(device), torch.float32)
    return list(work.steps.values())


def stack(args: argparse.Namespace) -> None:
    """Measure a stack: start, epochs, memory, a step with its kernels, and a step in tf32."""
    made: list[Step] = []
    phase("start", lambda: start(args, made))
    if made:
        phase("throughput", lambda: throughput(made))
        phase("memory", lambda: memory(args))
        phase("step", lambda: step(made[0], args.device))
    made.clear()
    phase("profile", lambda: profile(args, few(args, PROFILED)))
    for precision in ("tf32", "float32"):
        phase(precision, lambda: step(few(args, COMPARED, precision=precision), args.device))  # noqa: B023


def few(args: argparse.Namespace, steps: int, **changes: Any) -> Step:  # noqa: ANN401 - fields of RunConfig
    """Return a stack whose epochs have few steps."""
    data = cut(dataset(args), 5 if args.short else steps, 40)
    return stacked(recipe(args.runs, **changes), data, args.device)[0]


def start(args: argparse.Namespace, made: list[Step]) -> Values:
    """Make a stack; return seconds since the process was started, until a step can be replayed."""
    seconds = {"imported": time.time() - args.began}
    data = dataset(args)
    seconds["data read"] = time.time() - args.began
    made += stacked(recipe(args.runs), data, args.device)
    waiter(args.device)()
    seconds["first step"] = time.time() - args.began
    return {"seconds": seconds, "stacks": len(made), "data": data.name}


def throughput(made: Sequence[Step]) -> Values:
    """Train epochs as `harness.train` does; seconds of drawing are those of the next epoch."""
    epochs = [[own.epoch(number) for own in made] for number in range(1, SEVERAL + 1)][1:]
    seen = sum(own.steps * len(own.state.rows) * own.state.configs[0].batch_size for own in made)
    training = [sum(seconds for seconds, *_ in epoch) for epoch in epochs]
    measuring = [sum(seconds for _, seconds, _ in epoch) for epoch in epochs]
    start = time.perf_counter()
    for own in made:
        list(own.parts(SEVERAL + 2))
    drawing = time.perf_counter() - start
    rates = [seen / seconds for seconds in training]
    return {
        "images_per_second": rates,
        "training": training,
        "evaluation": measuring,
        "drawing": drawing,
    }


def memory(args: argparse.Namespace) -> Values:
    """Return what PyTorch has held on the GPU at most."""
    if args.device == "cpu":
        return {"allocated": None, "reserved": None}
    allocated = torch.cuda.max_memory_allocated()
    return {"allocated": allocated, "reserved": torch.cuda.max_memory_reserved()}


def step(own: Step, device: str) -> Values:
    """Return the seconds of a step: an epoch that is drawn already, over its steps."""
    drawn = list(own.parts(1))
    taken = [timed(lambda: own.train(drawn, 1), device) / own.steps for _ in range(SEVERAL)]
    return {"seconds": taken[1:]}


def timed(function: Callable[[], object], device: str) -> float:
    """Return the seconds of a call and of what it makes the device do."""
    wait = waiter(device)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def profile(args: argparse.Namespace, own: Step) -> Values:
    """Return the kernels of a step by time; on a CPU, its operators.

    The copies that lay an epoch out are counted, too: about five in all its steps.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = args.device == "cuda"
    seconds = median(step(own, args.device)["seconds"])
    drawn = list(own.parts(1))
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profiler(activities=[activity], acc_events=True) as seen:
        timed(lambda: own.train(drawn, 1), args.device)
    times = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [
        (row.key, row.count / own.steps, getattr(row, times))
        for row in seen.key_averages()
        if not on_gpu or row.device_type == torch.autograd.DeviceType.CUDA  # not its launch
    ]
    rows = [(name, count, time / own.steps) for name, count, time in rows if time > 0]
    busy = sum(time for *_, time in rows)
    rows.sort(key=lambda row: -row[2])
    return {
        "seconds": seconds,
        "kernels": sum(count for _, count, _ in rows),
        "busy_microseconds": busy,
        "busy": busy / 1e6 / seconds,
        "top": [{"name": n[:90], "count": c, "microseconds": t} for n, c, t in rows[:TOP]],
    }


def eager(args: argparse.Namespace) -> None:
    """Measure a plain PyTorch loop of one run, its data in memory."""
    from benchmarks import eager as loop

    images = dataset(args).train.images.to(args.device)
    phase("throughput", lambda: rates(loop.rounds(images), args))


def blog(args: argparse.Namespace) -> None:
    """Measure the blog's loop as written, with DataLoader and ToTensor; it needs torchvision."""
    args.dataset, args.steps = "mnist", 5 if args.short else 300
    phase("throughput", lambda: of_rounds(contestant.blog_loop(args)))


def jax(args: argparse.Namespace) -> None:
    """Measure the JAX twin."""

    def measured() -> Values:
        from benchmarks import peer_jax

        found = rates(peer_jax.rounds(dataset(args).train.images.numpy(), args.runs), args)
        return found | {"devices": str(peer_jax.jax.devices())}

    phase("throughput", measured)


def rates(rounds: Iterator[int], args: argparse.Namespace) -> Values:
    """Return images per second of several rounds."""
    return of_rounds(contestant.timed(rounds, waiter(args.device)))


def of_rounds(rounds: Iterable[tuple[int, float]]) -> Values:
    """Return images per second of several rounds, each of so many images and seconds."""
    taken = list(islice(rounds, SEVERAL))[1:]
    return {"images_per_second": [images / seconds for images, seconds in taken]}


PARTS = {"stack": stack, "eager": eager, "blog": blog, "jax": jax}


if __name__ == "__main__":
    main()
