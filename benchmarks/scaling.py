"""How training's cost grows with stack width, hidden size, batch size and latent size.

`python -m benchmarks.scaling --data-dir DIR` prints a table for benchmarks/RESULTS.md and draws
benchmarks/figures/scaling.png: images per second against each of them, with the floor of
`benchmarks.floor` drawn in. All points take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pandas as pd
import seaborn as sns
import torch

from benchmarks import machine
from benchmarks.floor import Floor, floor
from harness import RunConfig, load_dataset, train
from harness.data.dataset import Dataset
from harness.training.engine import resolve_device

FIGURE = Path(__file__).parent / "figures" / "scaling.png"
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STACK = {"cpu": 2, "cuda": 64}
"""Runs of the points at which something else than the width changes: the device is full."""

HIDDEN = ((64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
BATCHES = (8, 16, 32, 64, 128, 256)
LATENTS = (2, 10, 50, 200)


@dataclass(frozen=True)
class Point:
    """One thing to measure: a value of an axis, with the runs that show it."""

    axis: str
    value: int
    runs: int
    config: RunConfig


@machine.clear_errors()
def main() -> None:
    """Measure, print and draw."""
    args = parse()
    device = resolve_device(args.device)
    data = load_dataset(args.dataset, args.data_dir)
    points = list(listed(device.type))
    rates, floors = measure(points, data, device, args)
    print("\n".join([*machine.hardware(device), *settings(args), rates_of(floors[1]), ""]))
    print(table(points, rates, floors))
    draw(points, rates, floors, args.figure)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = machine.parser("scaling", __doc__)
    parser.add_argument("--dataset", choices=("mnist", "fashion_mnist", "kmnist"), default="mnist")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each point; default: 3")
    parser.add_argument("--images", type=int, default=16_384, help="of a turn; default: 16384")
    parser.add_argument("--figure", type=Path, default=FIGURE, help=f"default: {FIGURE.name}")
    return parser.parse_args()


def listed(device: str) -> Iterator[Point]:
    """Yield every point, axis by axis; the blog's recipe is on all of them."""
    base, stack = RunConfig.seed_recipe(), STACK[device]
    for runs in WIDTHS:
        yield Point("stack width", runs, runs, base)
    for hidden in HIDDEN:
        yield Point("first hidden layer", hidden[0], stack, base.replace(hidden=hidden))
    for batch in BATCHES:
        yield Point("batch size", batch, stack, base.replace(batch_size=batch))
    for latents in LATENTS:
        yield Point("latent size", latents, stack, base.replace(latent_size=latents))


Rates = list[list[float]]
"""Of each point, turn by turn."""

Floors = list[list[Floor]]


def measure(
    points: list[Point], data: Dataset, device: torch.device, args: argparse.Namespace
) -> tuple[Rates, Floors]:
    """Return the images per second of every point and the floor measured right after them."""
    rates: Rates = [[] for _ in points]
    floors: Floors = [[] for _ in points]
    for turn in range(args.repeats):
        for place, point in enumerate(points):
            rates[place].append(rate(point, data, args.images, device))
            floors[place].append(floor(point.config, data.pixels, point.runs, device))
            latest = f"{point.axis} {point.value}: {rates[place][-1]:,.0f}/s"
            print(f"{turn + 1}/{args.repeats} {latest}", file=sys.stderr)
    return rates, floors


def rate(point: Point, data: Dataset, images: int, device: torch.device) -> float:
    """Train two short epochs, of which the first warms up; return the second's images a second."""
    own = max(4 * point.config.batch_size, images // point.runs)
    short = replace(data, train=data.train.head(own), val=data.val.head(100))
    configs = [point.config.replace(seed=seed, epochs=2) for seed in range(point.runs)]
    *_, timed = train(configs, short, device.type)
    return timed.images_per_second


def settings(args: argparse.Namespace) -> list[str]:
    """Say what was trained, in a line."""
    return [
        f"{args.dataset}, the blog's recipe in float32 but for the axis, Adam; {args.repeats} "
        f"turns of about {args.images:,} images, medians and ranges."
    ]


def rates_of(bounds: list[Floor]) -> str:
    """Say what the floor of a point is made of, by its medians."""
    operations, update = bounds[0].operations, bounds[0].update
    products, traffic = (
        median(times)
        for times in zip(*((b.products, b.update / b.bandwidth) for b in bounds), strict=True)
    )
    return (
        f"Floor of a step, {bounds[0].cores} at once: {operations / 1e6:.1f} million operations at "
        f"{operations / products / 1e9:.0f} GFLOP/s ({products * 1e3:.2f} ms), "
        f"{update / 1e6:.1f} MB of Adam at {update / traffic / 1e9:.0f} GB/s "
        f"({traffic * 1e3:.2f} ms)."
    )


def table(points: list[Point], rates: Rates, floors: Floors) -> str:
    """Return a Markdown table: measured rate, floor, and the floor's rate over the measured."""
    rows = []
    for point, values, bounds in zip(points, rates, floors, strict=True):
        most = [bound.images_per_second for bound in bounds]
        over = machine.spread([a / b for a, b in zip(most, values, strict=True)], 2)
        label = f"{point.axis} {point.value}"
        rows.append(
            [label, str(point.runs), *machine.spread(values), f"{median(most):,.0f}", *over]
        )
    header = ["what", "runs", "images/s, all runs", "range", "floor", "floor / this", "range"]
    return machine.table(header, rows)


def draw(points: list[Point], rates: Rates, floors: Floors, figure: Path) -> None:
    """Draw images per second against each axis, with its floor."""
    kinds = {
        "measured": rates,
        "floor": [[bound.images_per_second for bound in bounds] for bounds in floors],
    }
    frame = pd.DataFrame(
        {"axis": point.axis, "value": point.value, "images per second": value, "what": what}
        for what, values in kinds.items()
        for point, own in zip(points, values, strict=True)
        for value in own
    )
    sns.set_theme(style="whitegrid", palette="colorblind")
    grid = sns.relplot(
        frame,
        x="value",
        y="images per second",
        col="axis",
        hue="what",
        style="what",
        kind="line",
        estimator="median",
        errorbar=("pi", 100),
        markers=True,
        col_wrap=2,
        height=3,
        aspect=1.4,
        facet_kws={"sharex": False, "sharey": False},
    )
    grid.set(xscale="log", ylim=(0, None)).set_titles("{col_name}").set_xlabels("")
    for name, axes in grid.axes_dict.items():
        values = sorted({p.value for p in points if p.axis == name})
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
    figure.parent.mkdir(parents=True, exist_ok=True)
    grid.savefig(figure, dpi=110)
    print(f"figure: {figure}", file=sys.stderr)


if __name__ == "__main__":
    main()
