"""Training: a generator of one record an epoch, for one run or many.

On a GPU runs of equal shapes are computed as one stack, in this process. On a CPU each run is
computed alone, in a worker of the `Pool`, and gives the same bits alone or beside others. A `State`
holds weights and moments of a run or a stack; a `Step` trains it for an epoch and measures
it. The epochs of a run so far and its tensors make a checkpoint (`Saved`).
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from harness import objective, processes, registry
from harness.config import Precision, RunConfig
from harness.data.dataset import Columns, Dataset
from harness.data.mapped import Mapped
from harness.errors import UserError
from harness.linear.vae import linear_losses
from harness.metrics.evaluate import (
    CHUNK,
    evaluate,
    finite,
    pixels,
    registered_metrics,
    registered_values,
)
from harness.models.stack import has_hooks, stack_key
from harness.models.vae import VAE, build, check_network
from harness.parts import likelihoods
from harness.processes import Pool
from harness.training.checkpoint import Checkpoints, Epoch, Saved, made_with
from harness.training.step import Measured, State, Step

log = logging.getLogger(__name__)

STACK_WIDTH = {"cpu": 16, "cuda": 64}  # runs trained together (CPU: benchmarks/RESULTS.md)
STACKED = {"cuda"}  # devices on which runs of equal shapes are computed as one


@dataclass(frozen=True)
class EpochRecord:
    """Metrics of one epoch of all S runs in training; arrays are float64, shape (S,).

    Records up to the epoch after which a run was resumed from a checkpoint repeat stored metrics,
    and hold the model of that epoch.
    """

    epoch: int  # epochs finished, counted from 1
    seconds: float  # wall time of the epoch, less the share of evaluation
    images: int  # training images seen in the epoch by all runs together
    train: dict[str, np.ndarray]  # metrics on the first training images, as many as `val` has
    val: dict[str, np.ndarray]  # metrics on the validation split
    kl_warmup: np.ndarray  # factor of beta at the epoch's last step
    configs: tuple[RunConfig, ...]
    rows: tuple[int, ...]  # positions of the runs in the list that `train` was given, ascending
    resumed: tuple[int, ...]  # epoch after which each run was resumed, or 0
    _places: Sequence[tuple[State, int]] = field(repr=False)
    stopped: frozenset[int] = frozenset()  # rows whose training `patience` ends with this record
    dropped: set[int] = field(default_factory=set)  # rows that the caller ends with this record
    still: frozenset[int] = frozenset()  # rows with a weight whose second moment, Adam's, is inf

    @property
    def finished(self) -> list[int]:
        """Rows whose training is complete with this record, and that the caller has not dropped."""
        rows = set(range(len(self.rows))) if self.epoch == self.configs[0].epochs else self.stopped
        return sorted(rows - self.dropped)

    def drop(self, rows: Iterable[int]) -> None:
        """End the training of some rows of this record; the next one is over the others alone."""
        chosen = set(rows)
        if unknown := chosen.difference(range(len(self.rows))):
            last = len(self.rows) - 1
            raise UserError(f"drop({sorted(unknown)}): the rows of this record are 0 to {last}")
        self.dropped.update(chosen)

    def model(self, row: int) -> VAE:
        """Return a copy of the model of a row; not after the next record is requested.

        With `keep="best"` it is that of the best epoch so far.
        """
        state, place = self._places[row]
        return state.model_of(place)

    @property
    def columns(self) -> Columns | None:
        """Columns of the table that the runs are trained on; None of pixels in [0, 1]."""
        return self._places[0][0].model.columns if self._places else None

    @property
    def images_per_second(self) -> float:
        """Training images per second, summed over the runs."""
        return self.images / self.seconds


@dataclass(frozen=True)
class RunResult:
    """A finished run; its model is a plain module on the CPU."""

    config: RunConfig
    metrics: dict[str, float]  # final ones; names prefixed `val/` and `test/`, and plain for test
    history: list[dict[str, float]] = field(repr=False)  # by epoch; prefixed `train/` and `val/`
    model: VAE = field(repr=False)

    @property
    def best_epoch(self) -> int:
        """Epoch with the lowest `val/neg_elbo`, or `val/loss` for a run without ELBO; from 1."""
        return best_epoch([e.get(f"val/{self.config.selection}", math.inf) for e in self.history])


def best_epoch(values: Sequence[float]) -> int:
    """Return the first epoch, counted from 1, at which a metric given epoch by epoch is lowest."""
    numbers = [math.inf if math.isnan(value) else value for value in values]
    return 1 + numbers.index(min(numbers))


def resolve_device(name: str, precision: Precision = "float32") -> torch.device:
    """Return the device of a name; "auto" is CUDA where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name!r}: choose one of auto, cpu, cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda': no CUDA device is usable here; use --device cpu or auto")
    if precision == "tf32" and name == "cpu":
        raise UserError("precision='tf32' on a CPU: only a GPU has it; use --precision float32")
    return torch.device(name)


@overload
def train_and_evaluate(
    configs: RunConfig,
    data: Dataset,
    device: str = ...,
    dtype: torch.dtype = ...,
    *,
    progress: bool = ...,
    threads_per_run: int = ...,
) -> RunResult: ...


@overload
def train_and_evaluate(
    configs: Sequence[RunConfig],
    data: Dataset,
    device: str = ...,
    dtype: torch.dtype = ...,
    *,
    progress: bool = ...,
    threads_per_run: int = ...,
) -> list[RunResult]: ...


def train_and_evaluate(
    configs: RunConfig | Sequence[RunConfig],
    data: Dataset,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    progress: bool = False,
    threads_per_run: int = 1,
) -> RunResult | list[RunResult]:
    """Train and evaluate one run or a list of runs, in whose order results are returned.

    Args:
        configs: one run, or runs that may differ in every setting.
        data: their dataset.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        dtype: torch.float32 or torch.float64.
        progress: whether a bar of the epochs of all runs is shown.
        threads_per_run: cores that train one run on a CPU, which decide its last bits. More than 1
            are meant for large networks of fewer runs than cores (their gain is not measured).
    """
    if isinstance(configs, RunConfig):
        more: dict[str, Any] = {"progress": progress, "threads_per_run": threads_per_run}
        return train_and_evaluate([configs], data, device, dtype, **more)[0]
    results: dict[int, RunResult] = {}
    with progress_bar(configs, shown=progress) as advance:
        for rows in together(configs, STACK_WIDTH[resolve_device(device).type]):
            histories: list[list[dict[str, float]]] = [[] for _ in rows]
            done: dict[int, VAE] = {}
            chosen = [configs[row] for row in rows]
            for record in train(chosen, data, device, dtype, threads_per_run=threads_per_run):
                for s, place in enumerate(record.rows):
                    histories[place].append(flat_record(record, s))
                done |= {record.rows[s]: record.model(s) for s in record.finished}
                advance(record)
            models = [done[place] for place in range(len(rows))]
            trained = list(zip(chosen, models, strict=True))
            finals, further = evaluate(trained, data), registered_metrics(trained, data)
            del record  # and with it the stack, before the next one takes a GPU's memory
            for s, row in enumerate(rows):
                values, errors = further[s]
                for name, error in errors.items():
                    log.warning("metric %r of run %d failed: %s", name, row, error)
                metrics = finals[s] | with_plain_names(values)
                results[row] = RunResult(configs[row], metrics, histories[s], models[s].cpu())
    return [results[row] for row in range(len(configs))]


@contextmanager
def progress_bar(
    configs: Sequence[RunConfig], *, shown: bool
) -> Iterator[Callable[[EpochRecord], None]]:
    """Show a bar of the epochs of runs; yield the function that advances it by a record."""
    if not shown:
        yield lambda record: None
        return
    from tqdm.auto import tqdm  # a notebook has another bar than a terminal

    with tqdm(total=sum(config.epochs for config in configs), unit="epoch") as bar:

        def advance(record: EpochRecord) -> None:
            ended = record.dropped | record.stopped
            bar.total -= sum(record.configs[i].epochs - record.epoch for i in ended)
            bar.update(len(record.rows))

        yield advance


def with_plain_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with those of the test split under their plain names too."""
    return {name.removeprefix("test/"): value for name, value in metrics.items()} | dict(metrics)


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
    threads_per_run: int = 1,
) -> Iterator[EpochRecord]:
    """Train runs and yield one record an epoch; the caller can drop runs.

    The runs are equal in `epochs` and `precision`; other arguments are those of
    `train_and_evaluate`. A run that `patience` stops is in no later record. With `checkpoints`
    unfinished runs are written and resumed, on a CPU to the same bits as if they had never been
    stopped.
    """
    check_runs(configs, data, dtype)
    target, last = resolve_device(device, configs[0].precision), configs[0].epochs
    check_threads(threads_per_run, target.type)
    made = [made_with(c, data, target.type, dtype) if checkpoints else {} for c in configs]
    for one in made:
        one["threads_per_run"] = threads_per_run
    given = zip(configs, made, strict=True)
    runs = [checkpoints.load(*run) if checkpoints else Saved([], {}) for run in given]
    resumed = [len(run.epochs) for run in runs]
    work = _begin(configs, runs, data, target, dtype)

    def save(record: EpochRecord) -> None:
        for r, (row, (state, s)) in enumerate(zip(record.rows, record._places, strict=True)):
            trained = len(runs[row].epochs) > resumed[row]
            if checkpoints and trained and r not in record.dropped:
                checkpoints.save(configs[row], made[row], Saved(runs[row].epochs, state.of_run(s)))

    # Hooks do not survive being sent to another process.
    here = target.type != "cpu" or any(has_hooks(state.model) for state in work.states.values())
    with Pool(1 if here else len(work.states), (work,), threads_per_run) as pool:
        for epoch in range(1, last + 1):
            for row, trained in _train_epoch(work, resumed, pool, epoch):
                runs[row].epochs.append(trained)
            stopped = [*_select(work, resumed, runs, epoch)]
            record = _record(work, resumed, runs, epoch, stopped)
            try:
                yield record
            except GeneratorExit:
                try:
                    save(record)
                except OSError as error:
                    log.warning("The last epochs could not be kept as checkpoints: %s", error)
                raise
            if checkpoints and (epoch % checkpoints.every == 0 or record.finished):
                save(record)
            dropped = {record.rows[r] for r in record.dropped | record.stopped}
            for index, state in list(work.states.items()):
                kept = [s for s, row in enumerate(state.rows) if row not in dropped]
                if len(kept) < len(state.rows):
                    del work.states[index]
                    work.steps.pop(index, None)  # before another takes a GPU's memory
                    if kept:  # of a stack, which is computed in this process
                        work.states[index] = state.keep(kept)
            if not work.states:
                return


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
        if (size := config.batch_size) > (images := len(data.train)):
            what = "images" if data.columns is None else "rows"
            problem = f"batch_size={size}: {data.name} has {images} training {what}"
            raise UserError(f"{problem}; give at most {images}")
        if unknown := sorted(set(config.terms) - set(registry.TERMS)):
            known = ", ".join(registry.TERMS) or "none"
            raise UserError(f"terms: {unknown[0]!r} is not registered (registered: {known})")
        config.replace()  # checks options of terms that were not registered when it was made
    check_data(configs, data)
    for name in {c.likelihood for c in configs} - {*registry.BUILT_IN_LIKELIHOODS}:
        likelihoods.check(name, registry.LIKELIHOODS[name].load(), data.image_shape)
    for own in {stack_key(c): c for c in configs if c.model not in registry.BUILT_IN}.values():
        check_network(own, data.image_shape)
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"dtype={dtype}: choose torch.float32 or torch.float64")


def check_threads(threads_per_run: int, device: str, sharing: int = 1) -> None:
    """Raise a `UserError` for more threads than cores, which so many processes share."""
    cores = processes.available() if device == "cpu" else 1
    most = max(1, cores // sharing)
    if not 1 <= threads_per_run <= most:
        where = f"{cores} core{'s' * (cores > 1)}" if device == "cpu" else "a GPU"
        where += f" that {sharing} processes share" * (sharing > 1)
        give = f"1 to {most}" if most > 1 else "1"
        raise UserError(f"threads_per_run={threads_per_run} on {where}: give {give}")


def check_data(configs: Sequence[RunConfig], data: Dataset) -> None:
    """Raise a `UserError` for runs whose settings are not for data of this kind."""
    drawn = [config for config in configs if config.drawing != "none"]
    if drawn and isinstance(data.train.images, Mapped):
        option = "dequantize" if drawn[0].binarization == "none" else "binarization"
        problem = f"{option}={drawn[0].drawing!r}: {data.name} is too large for memory"
        raise UserError(f"{problem}; give a smaller one, or 0 and 255 in the file")
    if (data.columns or data.rounded) and any(config.dequantize != "none" for config in configs):
        given = f"dequantize='uniform': {data.name} has floats, and no grey levels of its own"
        raise UserError(f"{given}; give uint8 images, or leave it out")
    if data.is_image:
        return
    for config in configs:
        if config.model == "conv":
            raise UserError(f"model='conv': {data.name} holds no images; give mlp or linear")
        if config.likelihood.endswith("bernoulli") and data.columns is not None:
            given = f"likelihood={config.likelihood!r}: the columns of {data.name} are no pixels"
            raise UserError(f"{given} in [0, 1]; give gaussian or laplace")


class Work(NamedTuple):
    """The runs in training, and the other arguments of `Step`."""

    states: dict[int, State]  # of runs that are computed together, by the row of the first
    steps: dict[int, Step]  # of those that this process trains
    data: dict[str, Dataset]
    linear: Tensor
    metrics: dict[str, registry.Metric]  # registered ones that are measured every epoch


def _begin(
    configs: Sequence[RunConfig],
    saved: Sequence[Saved],
    data: Dataset,
    device: torch.device,
    dtype: torch.dtype,
) -> Work:
    grey = data.to(device).shared()
    kinds = {config.drawing for config in configs} - {"none"}
    shown = {"none": grey} | {kind: grey.drawn(kind).shared() for kind in kinds}
    splits = (data.train.head(len(data.val)), data.val)  # grey, as the linear model is fitted
    losses = np.stack([linear_losses(configs, data, split) for split in splits], 1)
    linear = torch.from_numpy(losses).to(device)
    metrics = {name: metric for name, metric in registry.METRICS.items() if metric.every_epoch}
    work = Work({}, {}, shown, linear, metrics)

    def begin(rows: list[int], *, stacked: bool) -> None:
        chosen = [configs[row] for row in rows]
        models = [_untrained(config, shown[config.drawing], dtype) for config in chosen]
        terms = objective.terms_of(chosen[0])
        state = State(rows, chosen, models, terms, stacked=stacked)
        if stacked:
            work.steps[rows[0]] = Step(state, shown, linear)
        work.states[rows[0]] = state
        for s, row in enumerate(rows):
            if saved[row].epochs:
                state.restore(s, saved[row].state)

    stacked, alike = device.type in STACKED, dict[object, list[int]]()
    for row, config in enumerate(configs):
        key = (stack_key(config), len(saved[row].epochs)) if stacked else row
        alike.setdefault(key, []).append(row)
    waiting = list(alike.values())
    while waiting:
        rows = waiting.pop(0)
        first = configs[rows[0]]
        try:
            begin(rows, stacked=stacked)
            continue
        except Exception as error:  # any error of a user's layer or of PyTorch
            full, reason = _is_out_of_memory(error), (str(error) or repr(error)).splitlines()[0]
            from_user = first.terms or first.model not in registry.BUILT_IN
            from_user = from_user or first.likelihood not in registry.BUILT_IN_LIKELIHOODS
            if not full and not (stacked and from_user):
                raise
        torch.cuda.empty_cache()
        if not full:
            log.warning("Runs are trained one by one: %s", reason)
            for row in rows:
                begin([row], stacked=False)
        elif len(rows) > 1:
            # Halves are trained in turns and stay in the GPU's memory together.
            waiting[:0] = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        else:
            problem = "one run needs more memory than is free on the GPU"
            raise UserError(f"{problem}; give a smaller network or batch, or --device cpu")
    return work


def _untrained(config: RunConfig, data: Dataset, dtype: torch.dtype) -> VAE:
    largest = max(data.train.largest, data.train.levels - 1)  # levels: of dequantised pixels
    model = build(config, data.image_shape, largest, data.columns)
    model.to(data.train.labels.device, dtype).eval()
    if config.sigma == "learned":
        torch.nn.init.constant_(model.log_decoder_variance, math.log(_initial_scale(model, data)))
    return model


def _initial_scale(model: VAE, data: Dataset) -> float:
    # Of a decoder that returns the mean image: its mse; of other likelihoods from fewer images.
    if model.likelihood == "gaussian":
        return data.pixel_variance
    x = pixels(model, data.train, slice(CHUNK))
    output = x.new_zeros(()).expand_as(x) if model.kind.logits else x.mean(0).expand_as(x)
    mean_error = model.kind.error(x, output).double().mean()
    return float(likelihoods.fitted(model.kind, mean_error, model.pixels))


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def _train_epoch(
    work: Work, resumed: Sequence[int], pool: Pool, epoch: int
) -> Iterator[tuple[int, Epoch]]:
    # Of the runs that were not resumed from a later epoch; by row of the run.
    start = time.perf_counter()
    items = [(i, epoch) for i, state in work.states.items() if epoch > resumed[state.rows[0]]]
    done = [(work.states[items[k][0]], *found) for k, found in pool.map(_compute, items)]
    seconds = time.perf_counter() - start
    training = sum(found[1] for found in done)
    seconds *= training / (training + sum(found[2] for found in done)) if done else 1
    sizes = [config.batch_size for state, *_ in done for config in state.configs]
    images = sum(len(work.data["none"].train) // size * size for size in sizes)
    for state, *_, metrics in done:
        for row, both in zip(state.rows, metrics, strict=True):
            yield row, Epoch(seconds, images, *both)


def _compute(work: Work, item: tuple[int, int]) -> Measured:
    index, epoch = item
    if index not in work.steps:
        work.steps[index] = Step(work.states[index], work.data, work.linear)
    step = work.steps[index]
    measured = step.epoch(epoch)
    for row, (_, val) in enumerate(measured[2] if work.metrics else ()):
        model = step.state.model_of(row, now=True)
        val |= registered_values(model, step.data.val, work.metrics)[0]
    return measured


def _select(work: Work, resumed: Sequence[int], runs: Sequence[Saved], epoch: int) -> Iterator[int]:
    # Keeps the weights of runs whose best epoch is this one, and yields runs to stop early.
    for state in work.states.values():
        for s, (row, config) in enumerate(zip(state.rows, state.configs, strict=True)):
            if not config.patience and config.keep == "last":
                continue
            best = best_epoch([done.val[config.selection] for done in runs[row].epochs[:epoch]])
            if best == epoch > resumed[row]:
                state.keep_best(s)
            if 0 < config.patience <= epoch - best:
                yield row


def _record(
    work: Work, resumed: Sequence[int], runs: Sequence[Saved], epoch: int, stopped: Iterable[int]
) -> EpochRecord:
    places = {row: (state, s) for state in work.states.values() for s, row in enumerate(state.rows)}
    rows = tuple(sorted(places))
    found = [places[row] for row in rows]
    configs = tuple(state.configs[s] for state, s in found)
    images = len(work.data["none"].train)
    factors = [objective.kl_warmup(c, epoch, images // c.batch_size)[-1] for c in configs]
    warmup = np.array(list(map(float, factors)))
    each = [runs[row].epochs[epoch - 1] for row in rows]
    behind = tuple(resumed[row] for row in rows)
    newest = each[behind.index(min(behind))]
    train, val = (_joined([getattr(e, part) for e in each]) for part in ("train", "val"))
    largest = {id(s): s.second.amax(1).tolist() for s in work.states.values() if s.second.numel()}
    still = {i for i, (s, k) in enumerate(found) if math.inf in largest.get(id(s), [])[k : k + 1]}
    return EpochRecord(
        *(epoch, newest.seconds, newest.images, train, val, warmup, configs, rows, behind, found),
        frozenset(map(rows.index, stopped)),
        still=frozenset(still),
    )


def _joined(each: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for metrics in each for name in metrics)
    return {name: np.array([metrics.get(name, np.nan) for metrics in each]) for name in names}
