"""What share of a sweep's wall time goes to tracking, and what to the measuring of its runs.

`python -m benchmarks.tracking_overhead --data-dir DIR` runs a real study, `studies.kl_weight` on
MNIST with 8 weights x 4 seeds = 32 runs x 20 epochs, into new databases, with a clock around the
functions that do each kind of work; time inside another clocked function counts there only.

All is done as in a whole sweep (every epoch, metric, picture and file) except that training sees
one image in `--cut`: seconds in the training steps are multiplied by it, everything else, the
evaluation after each epoch included, is as measured.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import harness
from benchmarks import machine
from harness.data.dataset import Dataset
from harness.training.engine import resolve_device
from studies import kl_weight
from studies.runner.options import Options
from studies.runner.run import run
from studies.runner.study import make_plan
from studies.runner.terminal import Steps, Terminal

WEIGHTS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0)
SEEDS = 4

WORK = {
    "MLflow": (
        "studies.runner.run:connect",
        "studies.runner.summary:log_summary load_run",
        "harness.tracking.store.Store:experiment start runs close tag deliver undelivered",
        "harness.tracking.runs.RunLog:__init__ metrics dataset picture folder text tag model end",
    ),
    "pictures": ("harness.metrics.pictures:reconstructions prior_samples",),
    "Optuna": (
        "studies.runner.run:open_storage open_queue",
        "studies.runner.queue.Queue:take judge note finish reassign give_back left trials "
        "failed_keys",
    ),
    "final evaluation": ("harness.metrics.evaluate:evaluate",),
    "quality metrics": (
        "harness.metrics.quality:measure_quality",
        "harness.tracking.record:linear_metrics",
    ),
    "summary, figures, report": ("studies.runner.summary:summarize",),
}
"""Kind of work -> module or class, and its functions."""

TRACKING = ("MLflow", "pictures", "Optuna")
"""What the target of 10 % is about."""


class Clock:
    """Seconds in each kind of work, exclusive: what is nested counts for the inner kind only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = time.perf_counter()

    def switch(self, kind: str | None) -> None:
        """Begin a kind of work, or end the one that was begun last."""
        now = time.perf_counter()
        current = self._stack[-1] if self._stack else "rest"
        self.seconds[current] = self.seconds.get(current, 0.0) + now - self._since
        self._since = now
        if kind is None:
            self._stack.pop()
        else:
            self._stack.append(kind)

    def clocked(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time taken, a generator's item by item."""

        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            self.switch(kind)
            try:
                result = function(*args, **kwargs)
            finally:
                self.switch(None)
            return self._items(kind, result) if isinstance(result, Iterator) else result

        return timed

    def _items(self, kind: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.switch(kind)
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.switch(None)
            yield item

    def watch(self) -> None:
        """Put a clock around every function of `WORK`."""
        for kind, places in WORK.items():
            for place in places:
                owner, names = place.split(":")
                for name in names.split():
                    self._wrap(kind, owner, name)

    def _wrap(self, kind: str, owner: str, name: str) -> None:
        module, _, last = owner.rpartition(".")
        holder = (
            getattr(importlib.import_module(module), last)
            if last[0].isupper()
            else importlib.import_module(owner)
        )
        function = getattr(holder, name)
        timed = self.clocked(kind, function)
        setattr(holder, name, timed)
        if getattr(harness, name, None) is function:  # its public name
            setattr(harness, name, timed)


@machine.clear_errors()
def main() -> None:
    """Run the study and print."""
    args = parse()
    importlib.import_module("mlflow.pytorch")  # start-up has its own benchmark
    clock = Clock()
    clock.watch()
    trained = 0.0

    def on_epoch(record: harness.EpochRecord) -> None:
        nonlocal trained
        trained += record.seconds

    data = harness.load_dataset("mnist", args.data_dir)
    start = time.perf_counter()
    run_study(cut(data, args.cut), clock, on_epoch, args)
    wall = time.perf_counter() - start
    print("\n".join([*machine.hardware(resolve_device(args.device)), *settings(args), ""]))
    print(table(parts(clock.seconds, trained, wall, args.cut)))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = machine.parser("tracking_overhead", __doc__)
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--cut", type=int, default=20, help="train on 1 image in so many")
    return parser.parse_args()


def cut(data: Dataset, factor: int) -> Dataset:
    """Return the dataset with fewer training images."""
    return replace(data, train=data.train.head(len(data.train) // factor))


def run_study(
    data: Dataset, clock: Clock, on_epoch: Callable[[Any], None], args: argparse.Namespace
) -> None:
    """Run the study in a new folder; its time is counted from here."""
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            dataset="mnist",
            values=WEIGHTS,
            seeds=SEEDS,
            settings={"epochs": args.epochs},
            device=args.device,
            storage=f"sqlite:///{folder}/optuna.db",
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
        )
        plan = make_plan(kl_weight.STUDY, options)
        clock.seconds.clear()
        clock.switch("rest")
        run(plan, data, options, Watched(on_epoch))
        clock.switch(None)


class Told(Steps):
    """Hands every epoch on instead of showing it."""

    def __init__(self, on_epoch: Callable[[Any], None]) -> None:
        super().__init__(Terminal(), 1)
        self._on_epoch = on_epoch

    def __call__(self, record: harness.EpochRecord) -> None:
        """Hand the epoch on."""
        self._on_epoch(record)


class Watched(Terminal):
    """A terminal without a bar."""

    def __init__(self, on_epoch: Callable[[Any], None]) -> None:
        super().__init__()
        self._on_epoch = on_epoch

    @contextmanager
    def progress(self, runs: int, left: int) -> Iterator[Steps]:
        """Yield what is called after every epoch."""
        yield Told(self._on_epoch)


def parts(
    seconds: dict[str, float], trained: float, wall: float, factor: int
) -> dict[str, tuple[float, float]]:
    """Return each kind of work's seconds as measured and in the whole sweep."""
    rest = seconds.pop("rest") - trained
    named = {kind: (taken, taken) for kind, taken in seconds.items()}
    return {
        "training": (trained, trained * factor),
        "evaluation each epoch, set-up": (rest, rest),
        **named,
    }


def settings(args: argparse.Namespace) -> list[str]:
    """Return what was run, in a line."""
    return [
        f"MNIST, {len(WEIGHTS)} weights x {SEEDS} seeds x {args.epochs} epochs, 1 training image "
        f"in {args.cut}, training's seconds multiplied by {args.cut}; n = 1."
    ]


def table(kinds: dict[str, tuple[float, float]]) -> str:
    """Return a Markdown table of seconds and shares."""
    kinds = dict(kinds)
    tracked = [kinds[kind] for kind in TRACKING]
    kinds["tracking: " + ", ".join(TRACKING)] = tuple(map(sum, zip(*tracked, strict=True)))
    kinds["everything"] = tuple(
        sum(pair[i] for kind, pair in kinds.items() if not kind.startswith("tracking"))
        for i in range(2)
    )
    total = kinds["everything"][1]
    rows = [
        [kind, f"{measured:.1f}", f"{whole:.1f}", f"{100 * whole / total:.1f} %"]
        for kind, (measured, whole) in kinds.items()
    ]
    return machine.table(["work", "s, measured", "s, whole sweep", "share"], rows)


if __name__ == "__main__":
    main()
