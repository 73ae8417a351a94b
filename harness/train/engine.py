"""Training: a generator of one record an epoch, for one run or many.

On a GPU runs of equal shapes are computed as one stack. On a CPU each run is computed alone, one
process a core, and gives the same bits alone or beside others.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness import objective, processes, registry, streams
from harness.config import Precision, RunConfig
from harness.data.dataset import Dataset, Split
from harness.errors import UserError
from harness.linear.vae import linear_losses
from harness.metrics.evaluate import coefficients, evaluate, evaluation_noise, finite, measure
from harness.models.stack import kernels, stack_key
from harness.models.vae import VAE, build
from harness.objective import Coefficients
from harness.train.checkpoint import Checkpoints, Epoch, History, made_with
from harness.train.step import Draw, Run, Step, captured, refusal

STACK_WIDTH = {"cpu": 16, "cuda": 64}
"""Runs trained together by default; measured on the CPU (benchmarks/RESULTS.md)."""

MARGIN = 0.05
"""Share of a GPU's memory that is left free, for metrics of finished runs and other programs."""

Arrays = dict[str, np.ndarray]
"""Metric name -> float64 values of shape (S,)."""


@dataclass(frozen=True)
class EpochRecord:
    """Metrics of one epoch of all runs that are still trained; arrays are float64, shape (S,).

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
        rows: positions of the runs in the list that `train` was given, shape (S,).
        resumed: epoch after which each run was resumed from a checkpoint, 0 for one that began
            here, shape (S,). Up to it a record repeats stored metrics, and the run's model is that
            of this epoch.
        dropped: rows of this record that are not trained further.
    """

    epoch: int
    seconds: float
    images: int
    train: Arrays
    val: Arrays
    kl_warmup: np.ndarray
    configs: tuple[RunConfig, ...]
    rows: tuple[int, ...]
    resumed: tuple[int, ...]
    _model: Callable[[int], VAE] = field(repr=False)
    dropped: set[int] = field(default_factory=set)

    def drop(self, rows: Iterable[int]) -> None:
        """End the training of some rows of this record; dropping all of them ends it all.

        Raises:
            UserError: the record has no such row.
        """
        chosen = set(rows)
        if unknown := chosen.difference(range(len(self.rows))):
            last = len(self.rows) - 1
            raise UserError(f"drop({sorted(unknown)}): the rows of this record are 0 to {last}")
        self.dropped.update(chosen)

    def model(self, row: int) -> VAE:
        """Return a copy of the model of a row, until the next record is requested."""
        return self._model(self.rows[row])

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
    """Return the device of a name; "auto" is CUDA where there is one.

    Raises:
        UserError: the name is unknown, no CUDA device is usable, or the device lacks the precision.
    """
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
    """Train and evaluate any list of runs.

    Args:
        configs: the runs.
        data: the dataset.
        device: "auto", "cpu" or "cuda".
        dtype: torch.float32 or torch.float64.

    Returns:
        Results in the order of `configs`.

    Raises:
        UserError: as for `train`.
    """
    results: dict[int, RunResult] = {}
    for rows in together(configs, STACK_WIDTH[resolve_device(device).type]):
        histories: list[list[dict[str, float]]] = [[] for _ in rows]
        for record in train([configs[row] for row in rows], data, device, dtype):
            for s, history in enumerate(histories):
                history.append(flat_record(record, s))
        models = [record.model(s) for s in range(len(rows))]
        finals = evaluate(list(zip(record.configs, models, strict=True)), data)
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
    _check(configs, data, dtype)
    target = resolve_device(device, configs[0].precision)
    made = made_with(data, target.type, dtype) if checkpoints else {}
    history = History(configs, made, checkpoints)
    groups = _groups(configs, data, target, dtype, history)
    live = list(range(len(groups)))
    with processes.Pool(len(groups) if target.type == "cpu" else 1, (groups,)) as pool:
        for epoch in range(1, configs[0].epochs + 1):
            record = _epoch(groups, live, pool, epoch, history)
            try:
                yield record
            except GeneratorExit:
                history.stop(_states(groups, _drop(groups, live, record.dropped)), epoch)
                raise
            live = _drop(groups, live, record.dropped)
            history.save(_states(groups, live), epoch)
            if not live:
                return


def _check(configs: Sequence[RunConfig], data: Dataset, dtype: torch.dtype) -> None:
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


class Measured(NamedTuple):
    """One epoch of runs that are computed together: seconds, and metrics of shape (S,)."""

    training: float
    measuring: float
    train: Arrays
    val: Arrays


def _epoch(
    groups: Sequence[_Group],
    live: Sequence[int],
    pool: processes.Pool,
    epoch: int,
    history: History,
) -> EpochRecord:
    """Train an epoch of the groups that have not done it yet, and return the record of all."""
    items = [(i, epoch) for i in live if epoch > history.starts[groups[i].rows[0]]]
    start = time.perf_counter()
    done = {items[k][0]: measured for k, measured in pool.map(_train_epoch, items)}
    wall = time.perf_counter() - start
    rows = [row for i in live for row in groups[i].rows]
    configs = [config for i in live for config in groups[i].step.configs]
    if done:
        training = sum(measured.training for measured in done.values())
        share = training / (training + sum(measured.measuring for measured in done.values()))
        seen = sum(groups[i].step.images for i in done)
        pace = wall * share, seen
    else:
        pace = history.pace(rows[0], epoch)
    metrics = [
        done[i][2:] if i in done else history.metrics(groups[i].rows, epoch) for i in live
    ]
    train, val = (_joined(part) for part in zip(*metrics, strict=True))
    for s, row in enumerate(rows):
        of_run = [{n: float(v[s]) for n, v in part.items()} for part in (train, val)]
        history.note(row, epoch, Epoch(*pace, *of_run))
    where = {row: (groups[i].step, s) for i in live for s, row in enumerate(groups[i].rows)}

    def model(row: int) -> VAE:
        step, s = where[row]
        return step.model_of(s)

    warmups = [objective.kl_warmup(c, epoch, len(groups[0].images) // c.batch_size) for c in configs]
    return EpochRecord(
        epoch,
        *pace,
        train,
        val,
        kl_warmup=np.array([float(warmup[-1]) for warmup in warmups]),
        configs=tuple(configs),
        rows=tuple(rows),
        resumed=tuple(history.starts[row] for row in rows),
        _model=model,
    )


def _joined(every: Sequence[Arrays]) -> Arrays:
    """Join the metrics of groups; NaN where a group lacks one, for want of latents, say."""
    names = dict.fromkeys(name for arrays in every for name in arrays)
    sizes = [len(arrays["mse"]) for arrays in every]
    return {
        name: np.concatenate(
            [arrays.get(name, np.full(n, np.nan)) for arrays, n in zip(every, sizes, strict=True)]
        )
        for name in names
    }


def _drop(groups: list[_Group], live: Sequence[int], dropped: set[int]) -> list[int]:
    """Take the dropped rows of a record out of their groups; return the groups that go on."""
    going, first = [], 0
    for index in live:
        count = len(groups[index].rows)
        kept = [s for s in range(count) if first + s not in dropped]
        first += count
        if kept:
            going.append(index)
            if len(kept) < count:  # only a stack, which is computed in this process
                groups[index] = groups[index].keep(kept)
    return going


def _states(
    groups: Sequence[_Group], live: Sequence[int]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    for index in live:
        yield from zip(groups[index].rows, groups[index].step.states(), strict=True)


def _train_epoch(groups: Sequence[_Group], item: tuple[int, int]) -> Measured:
    index, epoch = item
    return groups[index].epoch(epoch)


class _Group:
    """Runs that are computed together: a stack on a GPU, one run on a CPU.

    Args:
        step: their training step.
        rows: their positions in the list that `train` was given.
        images: training images that batches are taken from.
        data: the dataset as the runs are measured on it.
        linear: loss of the exact linear model on the first training images and on validation
            images, float64, shape (2, S).
    """

    def __init__(
        self, step: Step, rows: Sequence[int], images: Split, data: Dataset, linear: Tensor
    ) -> None:
        self.step, self.rows, self.images, self.data = step, tuple(rows), images, data
        self.linear = linear
        self._arguments: tuple[object, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ahead: tuple[int, Draw] | None = None

    def epoch(self, epoch: int) -> Measured:
        """Train one epoch and measure the runs."""
        start = time.perf_counter()
        self.step.epoch(self._take(epoch))
        if self.step.device.type == "cuda":
            if epoch < self.step.configs[0].epochs:  # drawn while the GPU computes
                self._ahead = epoch + 1, self._draw(epoch + 1)
            torch.cuda.synchronize(self.step.device)
        between = time.perf_counter()
        metrics = self.measure()
        return Measured(between - start, time.perf_counter() - between, *metrics)

    def _take(self, epoch: int) -> Draw:
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead and ahead[0] == epoch else self._draw(epoch)

    def _draw(self, epoch: int) -> Draw:
        return draw(self.step, self.images, epoch).to(self.step.weights)

    def measure(self) -> tuple[Arrays, Arrays]:
        """Return the metrics on the first training images and on validation, in one transfer.

        A GPU captures their computation once and replays it.
        """
        if self._arguments is None:
            self._arguments = self._measure_arguments()
        with kernels():
            if self.step.device.type == "cuda" and self.step.stack is not None:
                if self._graph is None:
                    self._graph, self._captured = captured(self._metrics)
                else:
                    self._graph.replay()
                metrics = self._captured
            else:
                metrics = self._metrics()
        table = torch.stack([value.reshape(-1) for value in metrics.values()]).cpu().numpy()
        arrays = dict(zip(metrics, table, strict=True))
        train = {n.removeprefix("train/"): v for n, v in arrays.items() if n.startswith("train/")}
        return train, {n: v for n, v in arrays.items() if not n.startswith("train/")}

    def _metrics(self) -> dict[str, Tensor]:
        assert self._arguments is not None
        with torch.no_grad():
            if self.step.stack is None:
                return self._both(self.step.model, *self._arguments)
            return self.step.stack.lift(self._both)(*self._arguments)

    def _measure_arguments(self) -> tuple[object, ...]:
        """Return what differs between runs: noise, coefficients, the linear model's losses."""
        configs, like = self.step.configs, self.step.weights
        sizes = {"train": len(self._first), "val": len(self.data.val)}
        each = []
        for s, config in enumerate(configs):
            noise = [evaluation_noise(config, part, n) for part, n in sizes.items()]
            prior = [
                streams.noise(config.seed, f"prior/{part}", n, config.latent_size)
                for part, n in sizes.items()
                if config.terms
            ]
            floats = [tensor.to(like) for tensor in (*noise, *prior)]
            known = coefficients(config, self.data.pixels, like.device)
            each.append((known, self.linear[0, s], self.linear[1, s], *floats))
        if self.step.stack is None:
            return each[0]
        return torch.utils._pytree.tree_map(lambda *values: torch.stack(values), *each)

    @property
    def _first(self) -> Split:
        return first_training_images(self.data)

    def _both(
        self,
        model: VAE,
        known: Coefficients,
        linear_train: Tensor,
        linear_val: Tensor,
        noise_train: Tensor,
        noise_val: Tensor,
        prior_train: Tensor | None = None,
        prior_val: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the validation metrics of one run, and training metrics prefixed `train/`."""
        config, classes = self.step.configs[0], self.data.classes
        terms, size = self.step.terms, self.step.training_size
        val = measure(
            config,
            model,
            self.data.val,
            classes,
            noise_val,
            known,
            linear_val,
            terms=terms,
            prior=prior_val,
            training_size=size,
        )
        train = measure(
            config,
            model,
            self._first,
            classes,
            noise_train,
            known,
            linear_train,
            val["mse"],
            terms=terms,
            prior=prior_train,
            training_size=size,
        )
        return {f"train/{name}": value for name, value in train.items()} | val

    def rehearse(self) -> None:
        """Take all the memory that an epoch takes on a GPU, and change nothing.

        Raises:
            torch.OutOfMemoryError: it is not there, or less than `MARGIN` would be left.
        """
        if self.step.device.type != "cuda" or self.step.stack is None:
            return
        with kernels(self.step.configs[0].precision):
            self.step.capture(self._draw(1))
        self.measure()
        self._ahead = 1, self._draw(1)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.step.device)
        if free < MARGIN * total:
            raise torch.OutOfMemoryError(f"{free} bytes of {total} are left")

    def keep(self, kept: Sequence[int]) -> _Group:
        """Return the group with some of its runs; what a GPU captured goes first."""
        self._graph = self._captured = None
        rows = [self.rows[s] for s in kept]
        step = self.step.keep(kept)
        return _Group(step, rows, self.images, self.data, self.linear[:, list(kept)])


def draw(step: Step, images: Split, epoch: int) -> Draw:
    """Return all that an epoch of a step's runs takes from the data and the random streams."""
    by_seed = {c.seed: _draw(c, step, images, epoch) for c in step.configs}
    first = by_seed[step.configs[0].seed]
    if step.stack is None:
        return first
    draws = [by_seed[c.seed] for c in step.configs]
    pixels = list({id(one.images): one.images for one in draws}.values())
    starts = {id(copy): k * len(images) for k, copy in enumerate(pixels)}
    order = [one.order + starts[id(one.images)] for one in draws]
    prior = [one.prior for one in draws if one.prior is not None]
    return first._replace(
        images=pixels[0] if len(pixels) == 1 else torch.cat(pixels),
        order=torch.stack(order, 1),
        noise=torch.stack([one.noise for one in draws], 1),
        betas=torch.stack([_betas(c, step, epoch) for c in step.configs], 1),
        progress=torch.stack([one.progress for one in draws], 1),
        prior=torch.stack(prior, 1) if prior else None,
    )


def _draw(config: RunConfig, step: Step, images: Split, epoch: int) -> Draw:
    """Return the draw of one run; random pixels are drawn anew every epoch."""
    steps, batch, latents = step.steps, config.batch_size, config.latent_size
    if config.binarization == "stochastic":
        stream = streams.generator(config.seed, "binarize", epoch)
        images = images.binarized("stochastic", stream)
    noise, prior = (
        streams.noise(config.seed, purpose, steps * batch, latents, epoch).view(steps, batch, -1)
        if wanted
        else None
        for purpose, wanted in (("noise", True), ("prior", bool(config.terms)))
    )
    assert noise is not None
    done = (epoch - 1) * steps + torch.arange(steps, dtype=torch.float64)
    return Draw(
        images.images,
        images.largest,
        streams.batches(config, len(images), epoch).view(steps, batch),
        noise,
        _betas(config, step, epoch),
        done / (config.epochs * steps),
        prior,
        epoch,
    )


def _betas(config: RunConfig, step: Step, epoch: int) -> Tensor:
    beta = objective.beta(config, step.model.pixels)
    return objective.kl_warmup(config, epoch, step.steps) * beta


def first_training_images(data: Dataset) -> Split:
    """Return the training images that train metrics are measured on: as many as validation has."""
    return data.train.head(len(data.val))


def _groups(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: torch.device,
    dtype: torch.dtype,
    history: History,
) -> list[_Group]:
    """Return all runs, untrained or as resumed, in the groups that they are computed in."""
    grey = _in_shared_memory(data) if device.type == "cpu" else data.to(device)
    by_kind = {kind: grey.binarized(kind) for kind in {c.binarization for c in configs}}
    together: dict[object, list[int]] = {}
    for row, config in enumerate(configs):
        key = (stack_key(config), history.starts[row]) if computes_stacks(device) else row
        together.setdefault(key, []).append(row)
    groups = []
    for rows in together.values():
        kind = configs[rows[0]].binarization
        groups += _begin(configs, rows, grey, by_kind[kind], dtype)
    for group in groups:
        if states := history.states(group.rows):
            group.step.restore(states)
    return groups


def computes_stacks(device: torch.device) -> bool:
    """Return whether runs of equal shapes are computed as one on a device."""
    return device.type == "cuda"


def _in_shared_memory(data: Dataset) -> Dataset:
    """Return a dataset whose images worker processes share instead of copying."""
    parts = {
        name: replace(part, images=processes.shared(part.images))
        for name, part in (("train", data.train), ("val", data.val), ("test", data.test))
    }
    return replace(data, **parts)


def _begin(
    configs: Sequence[RunConfig],
    rows: Sequence[int],
    grey: Dataset,
    data: Dataset,
    dtype: torch.dtype,
) -> list[_Group]:
    """Return untrained runs as one group, or in halves that take turns if memory is short.

    All of them stay in memory: halves share only what an epoch takes for a while.

    Args:
        configs: every run.
        rows: those of the group.
        grey: the dataset as it is, on the device.
        data: the dataset as the runs are measured on it, pixels drawn once where they are random.
        dtype: torch.float32 or torch.float64.

    Raises:
        UserError: there is no room for one run.
    """
    try:
        return _untrained(configs, rows, grey, data, dtype)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    if len(rows) == 1:
        config = configs[rows[0]]
        raise UserError(
            f"model={config.model!r}, batch_size={config.batch_size}: one run needs more memory "
            "than is free on the GPU; give a smaller network or batch, or --device cpu"
        )
    torch.cuda.empty_cache()
    middle = len(rows) // 2
    halves = (rows[:middle], rows[middle:])
    return [group for half in halves for group in _begin(configs, half, grey, data, dtype)]


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one during whose handling it was raised, is a full GPU."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _untrained(
    configs: Sequence[RunConfig],
    rows: Sequence[int],
    grey: Dataset,
    data: Dataset,
    dtype: torch.dtype,
) -> list[_Group]:
    """Return runs as one stack if the device computes stacks and the runs can be one, else apart."""
    device, largest = data.train.images.device, data.train.largest
    images = grey.train if configs[rows[0]].binarization == "stochastic" else data.train
    runs = []
    for row in rows:
        model = build(configs[row], data.image_shape, largest).to(device, dtype).eval()
        if configs[row].sigma == "learned":  # the mse of a decoder that knows the mean image alone
            torch.nn.init.constant_(model.log_decoder_variance, math.log(data.pixel_variance))
        terms = {name: registry.TERMS[name] for name in configs[row].terms}
        runs.append(Run(configs[row], model, terms))
    stacked = computes_stacks(device)
    if stacked and (reason := refusal(runs[0], images)):
        logging.getLogger(__name__).info("Runs are trained one by one: %s", reason)
        stacked = False
    chosen = [configs[row] for row in rows]
    linear = torch.from_numpy(
        np.stack([linear_losses(chosen, data, s) for s in (first_training_images(data), data.val)])
    ).to(device)
    parts = [range(len(rows))] if stacked else [[s] for s in range(len(rows))]
    groups = []
    for part in parts:
        step = Step([runs[s] for s in part], len(images), stacked=stacked)
        groups.append(_Group(step, [rows[s] for s in part], images, data, linear[:, list(part)]))
        groups[-1].rehearse()
    return groups
