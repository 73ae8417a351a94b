"""How long a plan takes, estimated from finished runs like it on this machine."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING

from harness.config import RunConfig, UserError
from harness.tracking import addresses, connect

if TYPE_CHECKING:
    from harness.data.dataset import Dataset

ALIKE = ("model", "hidden", "channels", "batch_size", "head", "likelihood", "precision")
"""Fields of `RunConfig` that set how fast a run of a dataset is, other than `epochs`."""

AROUND = 20.0
"""Seconds for start, figures, pictures and report."""

UNKNOWN = "duration: not known (no finished run like these here)"


def sentence(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: str,
    tracking_uri: str | None,
    at_once: Callable[[int], int],
) -> str:
    """Return a sentence with the number of stacks and the estimated duration of runs.

    `at_once` returns the width of the plan's stacks for a device's; `device` may be "auto".
    """
    from harness.training.engine import STACK_WIDTH, resolve_device, together

    kind = resolve_device(device).type
    stacks = together(configs, at_once(STACK_WIDTH[kind]))
    rows = finished_runs(configs[0], data, kind, tracking_uri)
    return (
        f"{len(stacks)} stack{'s'[: len(stacks) > 1]} of up to {max(map(len, stacks))} runs on "
        f"{kind}; {expected(rows, configs, len(data.train)) if rows else UNKNOWN}. "
        "Nothing was trained."
    )


def expected(
    rows: Sequence[tuple[float, int, int, float]], configs: Sequence[RunConfig], images: int
) -> str:
    """Return the estimated duration of runs and its basis: `finished_runs` on so many images."""
    rate = median(speed for speed, *_ in rows)
    rests = (
        seconds / width - epochs * images / speed for speed, width, epochs, seconds in rows
    )  # what a run took beside its training
    training = sum(config.epochs for config in configs) * images / rate
    whole = training + len(configs) * max(0.0, median(rests)) + AROUND
    return (
        f"duration: about {duration(whole)} with final metrics and report (the last {len(rows)} "
        f"finished runs like these trained at {rate:,.0f} images/s here)"
    )


def duration(seconds: float) -> str:
    """Return a duration as roughly as it is known: "40 s", "7 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(round(minutes, -1), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def finished_runs(
    config: RunConfig, data: Dataset, device: str, tracking_uri: str | None
) -> list[tuple[float, int, int, float]]:
    """Return (images/s, stack width, epochs, seconds) of the last finished runs like one.

    Only a database that exists is read, so that a dry run writes nothing.
    """
    address = addresses.tracking_address(tracking_uri)
    file = addresses.sqlite_file(address)
    if file is None or not file.exists():
        return []
    alike = {name: str(value) for name, value in asdict(config).items() if name in ALIKE}
    alike |= {"dataset": data.name, "device": device}
    tests = [f"params.{name} = '{value}'" for name, value in alike.items() if "'" not in value]
    tests += [f"tags.host = '{socket.gethostname()}'", "attributes.status = 'FINISHED'"]
    try:
        client = connect(address).client
    except UserError:
        return []
    experiments = [found.experiment_id for found in client.search_experiments()]
    order, test = ["attributes.end_time DESC"], " and ".join(tests)
    found = client.search_runs(experiments, test, max_results=48, order_by=order)
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
