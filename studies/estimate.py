"""How long a plan takes, about: by finished runs like it on this machine, else by a short trial."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

import harness
from harness import places
from harness.config import RunConfig, UserError

if TYPE_CHECKING:
    from harness.data.dataset import Dataset
    from harness.tracking import Store

ALIKE = ("model", "hidden", "channels", "batch_size", "head", "likelihood", "precision")
"""Fields of `RunConfig` that set how fast a run of a dataset is, other than `epochs`."""

RECENT = 48
"""Finished runs that are looked at, the last ones."""

TRIAL_STEPS, TRIAL_EPOCHS = 32, 3
"""Length of the trial where no run like it has finished; only its last epoch is timed."""

FINAL_IMAGES = {64: 60_000, 784: 110_000}
"""Pixels -> training images that take as long as what is measured and written at a run's end.

Roughly, from the times in LOG.md: evaluation, log-likelihood, Frechet distances, probes, MLflow.
"""

AROUND = 20.0
"""Seconds for start, figures, pictures and report."""


@dataclass(frozen=True)
class Pace:
    """How fast runs are.

    Attributes:
        images_per_second: training images of a whole stack.
        final: seconds a run for all that is not training.
        basis: what this is known from, for people.
    """

    images_per_second: float
    final: float
    basis: str

    def seconds(self, configs: Sequence[RunConfig], data: Dataset) -> float:
        """Return about how long runs take together."""
        images = sum(config.epochs for config in configs) * len(data.train)
        return images / self.images_per_second + len(configs) * self.final + AROUND


def sentence(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: str,
    tracking_uri: str | None,
    at_once: Callable[[int], int],
) -> str:
    """Say in how many stacks and about how long runs are trained, and what that is known from.

    Args:
        configs: the runs, alike but for what is swept.
        data: their dataset.
        device: "auto", "cpu" or "cuda".
        tracking_uri: where finished runs are looked for, as an option.
        at_once: width of a device's stack -> width of the plan's.
    """
    from harness.training.engine import STACK_WIDTH, resolve_device, together

    kind = resolve_device(device).type
    width = at_once(STACK_WIDTH[kind])
    stacks = together(configs, width)
    known = pace(configs[0], data, kind, tracking_uri)
    return (
        f"{len(stacks)} stack{'s'[: len(stacks) > 1]} of up to {max(map(len, stacks))} runs on "
        f"{kind}. About {duration(known.seconds(configs, data))} with final metrics and report: "
        f"{known.basis}. Nothing was trained."
    )


def pace(config: RunConfig, data: Dataset, device: str, tracking_uri: str | None) -> Pace:
    """Return how fast runs like one are: of finished runs if there are any, else of a trial."""
    return _recorded(config, data, device, tracking_uri) or _tried(config, data, device)


def duration(seconds: float) -> str:
    """Write a time as roughly as it is known: "40 s", "7 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(round(minutes, -1), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def _recorded(
    config: RunConfig, data: Dataset, device: str, tracking_uri: str | None
) -> Pace | None:
    """Return the pace of the last finished runs of this machine that are alike, if there are any.

    Only a store that is there is read, so that a dry run writes nothing.
    """
    address = places.tracking_address(tracking_uri)
    file = places.sqlite_file(address)
    if file is None or not file.exists():
        return None
    wanted = {name: str(value) for name, value in asdict(config).items() if name in ALIKE}
    wanted |= {"dataset": data.name, "device": device}
    tests = [f"params.{name} = '{value}'" for name, value in wanted.items() if "'" not in value]
    tests += [f"tags.host = '{socket.gethostname()}'", "attributes.status = 'FINISHED'"]
    try:
        rows = _last_runs(harness.tracking.connect(address), " and ".join(tests))
    except UserError:
        return None
    if not rows:
        return None
    rates, finals = zip(*(_paces(row, len(data.train)) for row in rows), strict=True)
    said = f"the last {len(rows)} finished runs like these trained at"
    rate = median(rates)
    return Pace(rate, max(0.0, median(finals)), f"{said} {rate:,.0f} images/s here")


def _last_runs(store: Store, test: str) -> list[tuple[float, int, int, float]]:
    """Return (images/s, stack width, epochs, seconds) of the last runs that pass a test."""
    experiments = [found.experiment_id for found in store.client.search_experiments()]
    order = ["attributes.end_time DESC"]
    found = store.client.search_runs(experiments, test, max_results=RECENT, order_by=order)
    return [
        (
            run.data.metrics["progress/images_per_second"],
            int(run.data.params["stack_width"]),
            int(run.data.params["epochs"]),
            (run.info.end_time - run.info.start_time) / 1000,
        )
        for run in found
        if "progress/images_per_second" in run.data.metrics and "stack_width" in run.data.params
    ]


def _paces(row: tuple[float, int, int, float], images: int) -> tuple[float, float]:
    """Return images/s of a run's stack, and seconds a run that it spent on all else."""
    rate, width, epochs, seconds = row
    return rate, seconds / width - epochs * images / rate


def _tried(config: RunConfig, data: Dataset, device: str) -> Pace:
    """Train a few steps of as many runs as there are cores."""
    steps = TRIAL_STEPS * config.batch_size
    few = replace(data, train=data.train.head(steps), val=data.val.head(64))
    from harness.training.engine import STACK_WIDTH

    width = STACK_WIDTH[device] if device == "cuda" else os.cpu_count() or 1
    plain = config.replace(epochs=TRIAL_EPOCHS, kl_warmup_epochs=0, kl_cycles=1)
    trial = [plain.replace(seed=seed) for seed in range(width)]
    *_, last = harness.train(trial, few, device)
    rate = last.images_per_second
    nearest = min(FINAL_IMAGES, key=lambda pixels: abs(pixels - data.pixels))
    said = f"a trial of {TRIAL_STEPS} steps trained at {rate:,.0f} images/s here; no run like these"
    return Pace(rate, FINAL_IMAGES[nearest] / rate, f"{said} has finished yet")
