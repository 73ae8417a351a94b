"""Training: a generator of one record an epoch, for one run or many.

On a GPU runs of equal shapes are computed as one stack. On a CPU each run is computed alone, one
process a core, and gives the same bits alone or beside others.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from harness import objective, registry
from harness.config import Precision, RunConfig
from harness.data.dataset import Dataset
from harness.errors import UserError
from harness.linear.vae import linear_losses
from harness.metrics.evaluate import evaluate, finite
from harness.models.stack import has_hooks, stack_key
from harness.models.vae import VAE
from harness.processes import Pool
from harness.training.checkpoint import Checkpoints, Epoch, History, made_with
from harness.training.group import (
    Group,
    Measured,
    computes_stacks,
    first_training_images,
    untrained,
)
from harness.training.state import State

log = logging.getLogger(__name__)

STACK_WIDTH = {"cpu": 16, "cuda": 64}
"""Runs trained together by default; measured on the CPU (benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class EpochRecord:
    """Metrics of one epoch of all S runs that are still trained; arrays are float64, shape (S,).

    The caller can end the training of some runs before the others: `record.drop([0, 2])` ends the
    runs in rows 0 and 2 of this record. The other runs go on unchanged, and the next record is over
    them alone.

    Attributes:
        epoch: epochs finished, counted from 1.
        seconds: wall time of the epoch's training, evaluation excluded; where runs are computed
            side by side, training's share of the epoch's wall time.
        images: training images seen in the epoch by all runs together.
        train: metric name -> values on the first training images, as many as `val` has.
        val: metric name -> values on the validation split.
        kl_warmup: factor of beta at the epoch's last step.
        configs: settings of the runs.
        rows: positions of the runs in the list that `train` was given, ascending.
        resumed: epoch after which each run was resumed from a checkpoint, 0 for one that began
            here. Up to it a record repeats stored metrics, and the run's model is that of this
            epoch.
        dropped: rows of this record that are not trained further.
    """

    epoch: int
    seconds: float
    images: int
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    kl_warmup: np.ndarray
    configs: tuple[RunConfig, ...]
    rows: tuple[int, ...]
    resumed: tuple[int, ...]
    _places: Sequence[tuple[State, int]] = field(repr=False)
    dropped: set[int] = field(default_factory=set)

    def drop(self, rows: Iterable[int]) -> None:
        """End the training of some rows of this record; dropping all of them ends it all."""
        chosen = set(rows)
        if unknown := chosen.difference(range(len(self.rows))):
            last = len(self.rows) - 1
            raise UserError(f"drop({sorted(unknown)}): the rows of this record are 0 to {last}")
        self.dropped.update(chosen)

    def model(self, row: int) -> VAE:
        """Return a copy of the model of a row, until the next record is requested."""
        state, place = self._places[row]
        return state.model_of(place)

    @property
    def images_per_second(self) -> float:
        """Training images per second, summed over the runs."""
        return self.images / self.seconds


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        config: its settings.
        metrics: final metrics, names prefixed `val/` and `test/`, and plain names for test.
        history: one dict per epoch, names prefixed `train/` and `val/`.
        model: the trained model, a plain module on the CPU.
    """

    config: RunConfig
    metrics: dict[str, float]
    history: list[dict[str, float]] = field(repr=False)
    model: VAE = field(repr=False)

    @property
    def best_epoch(self) -> int:
        """Epoch with the lowest `val/neg_elbo`, or `val/loss` for a run without ELBO; from 1."""
        return best_epoch(
            [e.get("val/neg_elbo", e.get("val/loss", math.inf)) for e in self.history]
        )


def best_epoch(values: Sequence[float]) -> int:
    """Return the first epoch, counted from 1, at which a metric given epoch by epoch is lowest."""
    return 1 + min(range(len(values)), key=values.__getitem__)


def resolve_device(name: str, precision: Precision = "float32") -> torch.device:
    """Return the device of a name, checked; "auto" is CUDA where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name!r}: choose one of auto, cpu, cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda': no CUDA device is usable here; use --device cpu or auto")
    if precision == "tf32" and name == "cpu":
        raise UserError("precision='tf32' on a CPU: only a GPU has it; use --precision float32")
    return torch.device(name)


def train_and_evaluate(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> list[RunResult]:
    """Train and evaluate any list of runs, and return results in its order.

    Device, dtype and errors are those of `train`.
    """
    results: dict[int, RunResult] = {}
    for rows in together(configs, STACK_WIDTH[resolve_device(device).type]):
        histories: list[list[dict[str, float]]] = [[] for _ in rows]
        for record in train([configs[row] for row in rows], data, device, dtype):
            for s, history in enumerate(histories):
                history.append(flat_record(record, s))
        models = [record.model(s) for s in range(len(rows))]
        finals = evaluate(list(zip(record.configs, models, strict=True)), data)
        del record  # and with it the stack, before the next one takes a GPU's memory
        for s, row in enumerate(rows):
            results[row] = RunResult(configs[row], finals[s], histories[s], models[s].cpu())
    return [results[row] for row in range(len(configs))]


def together(configs: Sequence[RunConfig], width: int) -> list[list[int]]:
    """Return groups of runs for one call of `train`: lists of positions, at most `width` long."""
    groups: dict[object, list[int]] = {}
    for row, config in enumerate(configs):
        groups.setdefault((config.epochs, config.precision), []).append(row)
    return [rows[i : i + width] for rows in groups.values() for i in range(0, len(rows), width)]


def flat_record(record: EpochRecord, row: int) -> dict[str, float]:
    """Return one run's metrics of an epoch, names prefixed `train/` and `val/`."""
    named = {f"train/{name}": float(values[row]) for name, values in record.train.items()}
    return finite(named | {f"val/{name}": float(v[row]) for name, v in record.val.items()})


def train(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    checkpoints: Checkpoints | None = None,
) -> Iterator[EpochRecord]:
    """Train runs with Adam and yield one record an epoch; the caller can drop runs.

    Args:
        configs: the runs; equal in `epochs` and `precision`.
        data: the dataset; it is moved to the device.
        device: "auto", "cpu" or "cuda".
        dtype: torch.float32 or torch.float64.
        checkpoints: where unfinished runs are kept and resumed from: every so many epochs, after
            the last, and when the caller stops early. On a CPU a resumed run gives the same bits as
            one that was never stopped.

    Raises:
        UserError: when the first record is requested: settings that cannot be trained together, an
            unusable device, another dtype, a batch larger than the training split, or a loss term
            that is not registered.
    """
    check_runs(configs, data, dtype)
    target = resolve_device(device, configs[0].precision)
    made = made_with(data, target.type, dtype) if checkpoints else {}
    history = History(configs, made, checkpoints)
    groups = _groups(configs, data, target, dtype, history)
    live = list(range(len(groups)))
    with Pool(_workers(groups, target), (groups,)) as pool:
        for epoch in range(1, configs[0].epochs + 1):
            record = _epoch(groups, live, pool, epoch, history)
            try:
                yield record
            except GeneratorExit:
                try:
                    _save(groups, _drop(groups, live, record), history)
                except OSError as error:
                    log.warning("The last epochs could not be kept as checkpoints: %s", error)
                raise
            live = _drop(groups, live, record)
            if history.is_due(epoch):
                _save(groups, live, history)
            if not live:
                return


def _workers(groups: Sequence[Group], device: torch.device) -> int:
    """Return how many processes train; hooks are lost or cannot be sent on the way to another."""
    if device.type != "cpu" or any(has_hooks(group.state.model) for group in groups):
        return 1
    return len(groups)


def check_runs(
    configs: Sequence[RunConfig], data: Dataset, dtype: torch.dtype = torch.float32
) -> None:
    """Raise a `UserError` for runs that cannot be trained together, or not on this dataset."""
    if not configs:
        raise UserError("configs is empty: give at least one RunConfig")
    for name in ("epochs", "precision"):
        if len(values := {getattr(config, name) for config in configs}) > 1:
            given = ", ".join(map(str, sorted(values)))
            raise UserError(f"{name}: runs that are trained together must agree; given {given}")
    for config in configs:
        if config.batch_size > len(data.train):
            raise UserError(
                f"batch_size={config.batch_size}: {data.name} has {len(data.train)} training "
                "images; give a smaller batch"
            )
        if unknown := sorted(set(config.terms) - set(registry.TERMS)):
            known = ", ".join(registry.TERMS) or "none"
            raise UserError(
                f"terms: {unknown[0]!r} is not registered (registered: {known}); register it with "
                "@harness.term"
            )
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"dtype={dtype}: choose torch.float32 or torch.float64")


def _groups(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: torch.device,
    dtype: torch.dtype,
    history: History,
) -> list[Group]:
    """Return all runs, untrained or as resumed, in the groups that they are computed in."""
    grey = data.to(device).shared()
    others = {c.binarization for c in configs} - {"none"}
    by_kind = {"none": grey} | {kind: grey.binarized(kind).shared() for kind in others}
    splits = (first_training_images(data), data.val)  # of grey images, as all comparable losses are
    linear = torch.from_numpy(np.stack([linear_losses(configs, data, s) for s in splits], 1))
    together: dict[object, list[int]] = {}
    for row, config in enumerate(configs):
        key = (stack_key(config), history.starts[row]) if computes_stacks(device) else row
        together.setdefault(key, []).append(row)
    groups = []
    for rows in together.values():
        measured_on = by_kind[configs[rows[0]].binarization]
        groups += untrained(configs, rows, grey, measured_on, linear.to(device), dtype)
    for group in groups:
        if states := [state for row in group.rows if (state := history.states[row])]:
            group.state.restore(states)
    return groups


def _epoch(
    groups: Sequence[Group], live: Sequence[int], pool: Pool, epoch: int, history: History
) -> EpochRecord:
    """Train an epoch of the groups that have not done it yet, and return the record of all."""
    items = [(i, epoch) for i in live if epoch > history.starts[groups[i].rows[0]]]
    start = time.perf_counter()
    done = [(groups[items[k][0]], measured) for k, measured in pool.map(_train_epoch, items)]
    seconds = time.perf_counter() - start
    if done:
        training = sum(measured.training for _, measured in done)
        seconds *= training / (training + sum(measured.measuring for _, measured in done))
    batches = {c.batch_size: len(groups[0].images) // c.batch_size for c in history.configs}
    seen = [c.batch_size for group, _ in done for c in group.state.configs]
    images = sum(size * batches[size] for size in seen)
    new = {
        row: Epoch(seconds, images, *metrics)
        for group, measured in done
        for row, metrics in zip(group.rows, measured.metrics, strict=True)
    }
    history.add(new)
    places = {row: (groups[i].state, s) for i in live for s, row in enumerate(groups[i].rows)}
    rows = tuple(sorted(places))
    configs = tuple(history.configs[row] for row in rows)
    warmups = [objective.kl_warmup(c, epoch, batches[c.batch_size])[-1] for c in configs]
    each = [new[row] if row in new else history.epochs[row][epoch - 1] for row in rows]
    pace = next(iter(new.values()), each[0])
    return EpochRecord(
        epoch,
        pace.seconds,
        pace.images,
        _joined([one.train for one in each]),
        _joined([one.val for one in each]),
        np.array([float(warmup) for warmup in warmups]),
        configs,
        rows,
        tuple(history.starts[row] for row in rows),
        [places[row] for row in rows],
    )


def _train_epoch(groups: Sequence[Group], item: tuple[int, int]) -> Measured:
    index, epoch = item
    return groups[index].epoch(epoch)


def _joined(each: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Join the metrics of runs; NaN where a run lacks one, for want of latents, say."""
    names = dict.fromkeys(name for metrics in each for name in metrics)
    return {name: np.array([metrics.get(name, np.nan) for metrics in each]) for name in names}


def _drop(groups: list[Group], live: Sequence[int], record: EpochRecord) -> list[int]:
    """Take the dropped rows of a record out of their groups; return the groups that go on."""
    dropped, going = {record.rows[s] for s in record.dropped}, []
    for index in live:
        kept = [s for s, row in enumerate(groups[index].rows) if row not in dropped]
        if kept:
            going.append(index)
            if len(kept) < len(groups[index].rows):  # only a stack, computed in this process
                groups[index] = groups[index].keep(kept)
    return going


def _save(groups: Sequence[Group], live: Sequence[int], history: History) -> None:
    for index in live:
        history.save(groups[index].rows, groups[index].state.runs())
