"""Train runs and log each of them: epochs, pictures, final metrics, model, a true end; load one."""

import json
import logging
import math
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload
from uuid import uuid4

from harness import objective as objectives
from harness import provenance, registry
from harness.config import RunConfig, UserError, checked_name
from harness.data.dataset import Dataset
from harness.data.load import is_named
from harness.errors import reading
from harness.linear.vae import linear_metrics
from harness.metrics import evaluate, frechet, pictures, quality
from harness.models.files import load_model
from harness.models.vae import VAE, build
from harness.processes import one_thread
from harness.tracking import End, Planned
from harness.tracking.addresses import (
    default_tracking,
    is_locked,
    sqlite_file,
    without_password,
    without_secrets,
)
from harness.tracking.runs import DIFF, NOTE, PICTURED, PROVENANCE, RunLog, part_file
from harness.tracking.store import Store, connect, trusting
from harness.training import engine
from harness.training.checkpoint import Checkpoints
from harness.training.engine import (
    EpochRecord,
    RunResult,
    best_epoch,
    flat_record,
    with_plain_names,
)

log = logging.getLogger(__name__)

# Metrics that measure the machine, so that no two trainings share them.
WALL_CLOCK = ("progress/epoch_seconds", "progress/images_per_second")

# Where a run has the code, versions and device that it was made with.
MADE_WITH = {
    "code": ("tags", "sources"),
    "versions": ("tags", "versions"),
    "device": ("params", "device"),
}
FAILED = "failed_metrics"  # tag of a finished run of which registered metrics failed
ACTS = "kl_weight_acts_as"  # tag with the decoder standard deviation that a KL weight acts as

Metrics = dict[str, float]


class Trained(NamedTuple):
    """A trained run: its settings and its model."""

    config: RunConfig
    model: VAE


def tags_of(made_with: Mapping[str, Any]) -> dict[str, str]:
    """Return the short values of a `provenance`, as tags; MLflow shows one as the commit."""
    commit, dirty = made_with["code"]["commit"], made_with["code"]["dirty"]
    known = {} if commit == provenance.UNKNOWN else {"mlflow.source.git.commit": commit}
    return known | {
        "git_commit": commit,
        "git_dirty": provenance.UNKNOWN if dirty is None else str(dirty).lower(),
        "sources": made_with["code"]["sources"][:12],  # the record has all
        "versions": ", ".join(f"{name} {v}" for name, v in made_with["versions"].items()),
        "device_name": made_with["device"]["name"],
    }


def measure(runs: Sequence[Trained], data: Dataset) -> Iterator[Metrics]:
    """Yield final metrics of runs and of their linear models, as `val/`, `test/` and `linear/`."""
    both = evaluate.evaluate(runs, data), quality.in_turn(runs, data, frechet.user_cache())
    for run, ends, measured in zip(runs, *both, strict=True):
        named = {name: value for name, value in ends.items() if name.startswith(("val/", "test/"))}
        named |= {f"test/{name}": value for name, value in measured.items()}
        yield named | linear_metrics(run.config, data)


def record(
    planned: Sequence[Planned],
    data: Dataset,
    device: str,
    start: Callable[[Planned], RunLog],
    *,
    judge: Callable[[EpochRecord], Mapping[int, End]] = lambda record: {},
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    checkpoints: Checkpoints | None = None,
    objective: str = "val/neg_elbo",
    train: Callable[..., Iterator[EpochRecord]] = engine.train,
    measure: Callable[[Sequence[Trained], Dataset], Iterable[Metrics]] = measure,
    pictured: bool = True,
    threads_per_run: int = 1,
) -> list[RunResult]:
    """Train one stack of runs (`harness.training.engine.together`) and log each of them.

    `start` starts the log of a run (`log_in`). A run that diverges, or of whose row `judge` returns
    an end, leaves the stack at once; `on_epoch` is called after that. Whatever interrupts the
    training, every run that was started gets a true end: KILLED by KeyboardInterrupt and
    SystemExit, else FAILED. The best epoch is chosen by `objective`, or is the one whose weights
    are kept. Final metrics of the validation split are not logged where the epochs have them; of
    kept weights, they are a further value of each, at the step after the last epoch.

    Returns:
        A result for each run. Its metrics are all final ones, those of the test split under their
        plain names too; a run that was ended early has none, and the model of its last epoch.
    """
    configs = [run.config for run in planned]
    parts = {config: registry.sources(config) for config in configs}
    made_with = provenance.provenance(data, device)
    tags, diff = tags_of(made_with), provenance.code().diff
    results: dict[int, RunResult] = {}
    finished: dict[int, Trained] = {}
    histories: list[list[Metrics]] = [[] for _ in planned]
    pictured = pictured and data.is_image
    logs: dict[int, RunLog] = {}
    try:
        for row, run in enumerate(planned):
            params = parameters(run.config, data) | run.params
            params |= {"device": device, "stack_width": len(planned)}
            params |= {"threads_per_run": threads_per_run} if threads_per_run > 1 else {}
            of_run = run.tags | tags | (PICTURED if pictured else {})
            if len(data.image_shape) == 3 and (acts := objectives.acts_as(run.config, data.pixels)):
                log.info(acts, extra={"progress": True})
                of_run |= {ACTS: acts}
            logs[row] = start(run._replace(params=params, tags=of_run))
            logs[row].dataset(data)
            used = {" ".join(part): text for part, text in parts[run.config].items()}
            digests = {part: registry.digest(text) for part, text in used.items()}
            logs[row].text(json.dumps(made_with | {"parts": digests}, indent=2), PROVENANCE)
            for part, text in used.items():
                logs[row].text(text, part_file(part))
            if diff:
                logs[row].text(diff, DIFF)
        if pictured:
            untrained = [
                Trained(c, build(c, data.image_shape, data.train.largest, data.columns))
                for c in configs
            ]
            _log_pictures(logs.values(), untrained, data, epoch=0)
        more: dict[str, Any] = {"checkpoints": checkpoints, "threads_per_run": threads_per_run}
        for current in train(configs, data, device, **more):
            for row, place in enumerate(current.rows):
                if current.epoch == 1 and current.resumed[row]:
                    logs[place].tag("resumed_from_epoch", str(current.resumed[row]))
                histories[place].append(flat_record(current, row))
                times = (current.seconds, current.images_per_second)
                metrics = histories[place][-1] | dict(zip(WALL_CLOCK, times, strict=True))
                metrics["progress/kl_warmup"] = float(current.kl_warmup[row])
                logs[place].epoch(metrics, current.epoch)
            due = current.epoch in picture_epochs(configs[0].epochs)
            if pictured and (due or current.stopped):
                # A resumed run repeats its metrics; its model is of a later epoch.
                rows = [row for row, last in enumerate(current.resumed) if last <= current.epoch]
                rows = [row for row in rows if due or row in current.stopped]
                there = [logs[current.rows[row]] for row in rows]
                _log_pictures(there, _trained(current, rows), data, current.epoch)
            found = {row: divergence(current, row) for row in range(len(current.rows))}
            during = f"diverged in epoch {current.epoch}"
            lost = {row: End("FAILED", f"{during}: {why}") for row, why in found.items() if why}
            for row, end in {**lost, **judge(current)}.items():
                place, model = current.rows[row], current.model(row).cpu()
                results[place] = RunResult(configs[place], {}, histories[place], model)
                if end.pruned:
                    logs[place].tag("pruned", "true")
                logs[place].end(end.status, end.reason)
                del logs[place]
                current.drop([row])
            places = [current.rows[row] for row in current.finished]
            finished |= zip(places, _trained(current, current.finished), strict=True)
            on_epoch(current)
        trained = list(finished.values())
        further = evaluate.registered_metrics(trained, data)
        finals = measure(trained, data)  # of a run while that before it is written
        each = zip(finished, trained, finals, further, strict=True)
        for i, (place, done, final, (values, errors)) in enumerate(each, 1):
            log.info("writing finished runs: %d of %d", i, len(trained), extra={"progress": True})
            history, config = histories[place], done.config
            last = len(history)
            best = _best(config, history, objective)
            once = {name: value for name, value in final.items() if not name.startswith("val/")}
            once |= {k: v for k, v in values.items() if k not in history[-1]}
            logs[place].metrics(once | best, last)
            if config.keep == "best":  # the last values are those of the weights that are saved
                again = {k: v for k, v in (final | values).items() if k.startswith("val/")}
                logs[place].metrics({k: v for k, v in again.items() if k not in once}, last + 1)
            if errors:
                text = "; ".join(f"{name}: {error}" for name, error in errors.items())
                logs[place].tag(FAILED, text)
            if pictured:
                with one_thread():  # others wait longer than they compute
                    samples = pictures.prior_samples(done.model, config.seed)
                logs[place].picture("prior_samples", samples, last)
            logs[place].model(*done)
            epochs = f"{config.patience} epoch{'s' * (config.patience > 1)}"
            waited = f"{epochs} without a better val/{config.selection}"
            reason = f"stopped at epoch {last}: {waited}" if last < config.epochs else ""
            logs[place].end(reason=reason)
            del logs[place]
            metrics = with_plain_names(final | values | best)
            results[place] = RunResult(config, metrics, history, done.model.cpu())
    except BaseException as error:
        if is_locked(error):  # each end would wait for it once more
            raise
        for one in logs.values():
            with suppress(Exception):  # what cannot be written now, the next start writes
                one.end(*interruption(error))
        raise
    return [results[place] for place in range(len(planned))]


@overload
def train_and_evaluate(
    configs: RunConfig,
    data: Dataset,
    *,
    experiment: str,
    tracking_uri: str | None = None,
    device: str = "auto",
    progress: bool = False,
    threads_per_run: int = 1,
) -> RunResult: ...
@overload
def train_and_evaluate(
    configs: Sequence[RunConfig],
    data: Dataset,
    *,
    experiment: str,
    tracking_uri: str | None = None,
    device: str = "auto",
    progress: bool = False,
    threads_per_run: int = 1,
) -> list[RunResult]: ...
def train_and_evaluate(
    configs: RunConfig | Sequence[RunConfig],
    data: Dataset,
    *,
    experiment: str,
    tracking_uri: str | None = None,
    device: str = "auto",
    progress: bool = False,
    threads_per_run: int = 1,
) -> RunResult | list[RunResult]:
    """Train and evaluate runs as `harness.train_and_evaluate`, and log each of them to MLflow.

    `harness.load_run` reads a run back, and `python -m studies.replay` repeats one.

    Args:
        configs: one run, or runs in any order.
        data: their dataset.
        experiment: name of the MLflow experiment, created where it is missing.
        tracking_uri: None means MLFLOW_TRACKING_URI or `mlflow.db` in the repository.
        device: "auto", "cpu" or "cuda".
        progress: whether a bar of the epochs of all runs is shown, in a notebook too.
        threads_per_run: as of `harness.train_and_evaluate`.

    Returns:
        One result, or results in the order of `configs`, with the metrics of
        `harness.measure_quality` too. A run that diverges has none.

    Examples:
        >>> from harness import RunConfig, load_dataset
        >>> from harness.tracking import train_and_evaluate
        >>> data = load_dataset("digits")
        >>> result = train_and_evaluate(RunConfig(epochs=2), data, experiment="first")
        >>> result.metrics["mse"] < 0.2
        True
    """
    listed = [configs] if isinstance(configs, RunConfig) else configs
    checked_name(experiment, "experiment")
    for config in listed:
        engine.check_runs([config], data)
        engine.resolve_device(device, config.precision)
    kind = engine.resolve_device(device).type
    engine.check_threads(threads_per_run, kind)
    store = connect(tracking_uri)
    start = log_in(store, experiment, "Runs of `harness.tracking.train_and_evaluate`.")
    planned = [_planned(config, place, experiment) for place, config in enumerate(listed)]
    results: dict[int, RunResult] = {}
    with engine.progress_bar(listed, shown=progress) as advance:
        for rows in engine.together(listed, engine.STACK_WIDTH[kind]):
            stack = [planned[row] for row in rows]
            more: dict[str, Any] = {"on_epoch": advance, "threads_per_run": threads_per_run}
            trained = record(stack, data, kind, start, **more)
            results |= dict(zip(rows, trained, strict=True))
    try:
        store.deliver()
    except UserError as error:  # the results are returned, and the records are on disk
        log.warning("%s", error)
    found = [results[row] for row in range(len(listed))]
    return found[0] if isinstance(configs, RunConfig) else found


@dataclass(frozen=True)
class TrackedRun:
    """A run read back from MLflow; `metrics` are its last logged values."""

    run_id: str
    config: RunConfig
    metrics: dict[str, float]
    model: VAE = field(repr=False)


def load_run(
    run_id: str, tracking_uri: str | None = None, *, trust: bool | None = None
) -> TrackedRun:
    """Rebuild the model of a run from its artifacts, without pickle.

    Args:
        run_id: the run's id in MLflow, or its key.
        tracking_uri: MLflow tracking URI; None means the default store.
        trust: whether the stored code of a user's network may be executed. None asks on the
            terminal. Nothing is executed where the network is registered from the same code.

    Raises:
        UserError: there is no such run, its model files are missing or broken, or code is not
            trusted.
    """
    store = connect(tracking_uri, write=False)
    run = store.run(run_id)
    with tempfile.TemporaryDirectory() as folder:
        files = store.fetch(run.run_id, "model", folder)
        with reading(f"run {run_id}"):
            config, model = load_model(files, trusting(trust=trust))
    return TrackedRun(run.run_id, config, run.metrics, model)


def _planned(config: RunConfig, place: int, study: str) -> Planned:
    """Plan a run that is named by the settings in which it differs from the defaults."""
    defaults = RunConfig().named()
    changed = {k: v for k, v in config.named().items() if k != "seed" and v != defaults.get(k)}
    label = ", ".join(f"{name}={value}" for name, value in changed.items()) or "defaults"
    tags = {"study": study, "role": "run", "configuration": label, "place": str(place)}
    return Planned(config, uuid4().hex, f"{label} seed={config.seed}", {}, tags)


def log_in(store: Store, experiment: str, question: str) -> Callable[[Planned], RunLog]:
    """Return the `start` of `record` for runs in an experiment, created where it is missing."""
    experiment_id = store.experiment(experiment, question)

    def start(run: Planned) -> RunLog:
        note = description(run.key, store.uri, run.params.get("dataset", ""))
        tags = run.tags | {NOTE: "\n\n".join(filter(None, (note, run.tags.get(ACTS, ""))))}
        try:
            return store.start(experiment_id, run.key, run.name, tags, run.params)
        except BaseException as error:  # it may have been created
            status, reason = interruption(error)
            with suppress(Exception):
                store.close(experiment, [run.key], reason, status)
            raise

    return start


def description(key: str, tracking_uri: str, dataset: str) -> str:
    """Return the Markdown on a run's page: the command that repeats it, without a data folder.

    A dataset of tensors is given in Python alone, so that the command is a call.
    """
    file, elsewhere = sqlite_file(tracking_uri), tracking_uri != default_tracking()
    known = f"sqlite:///{file}" if file else without_secrets(tracking_uri)  # from any folder
    command = f"python -m studies.replay {key}"
    command += f" --tracking-uri {shlex.quote(known)}" * elsewhere
    if not is_named(dataset):
        given = f"{key!r}, DATA" + f", tracking_uri={known!r}" * elsewhere
        command = f"studies.replay.replay({given})  # DATA: dataset {dataset!r}"
    return f"Train it again from its record and compare every metric:\n\n    {command}"


def interruption(error: BaseException) -> tuple[str, str]:
    """Return the status of a run that an exception ends, and the reason in words."""
    if isinstance(error, SystemExit):
        return "KILLED", f"its process ended with exit code {error.code}"
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", str(error) or "stopped by Ctrl-C"
    return "FAILED", without_password(repr(error))


def parameters(config: RunConfig, data: Dataset) -> dict[str, object]:
    """Return the parameters of a run: its settings, what follows from them, and its dataset."""
    params = config.named() | {"beta": objectives.beta(config, data.pixels)}
    params |= {"dataset": data.name, "dataset_digest": data.digest}
    variance, names = objectives.decoder_variance(config, data.pixels), json.dumps(data.class_names)
    if not math.isnan(variance):
        params["decoder_variance"] = variance
    if data.class_names and len(names) < 6_000:  # MLflow refuses longer parameters
        params["class_names"] = names
    return params


def _best(config: RunConfig, history: Sequence[Metrics], objective: str) -> Metrics:
    by = f"val/{config.selection}" if config.keep == "best" else objective
    epoch = best_epoch([metrics.get(by, math.inf) for metrics in history])
    best = history[epoch - 1].get(objective, math.inf)
    return {"best/epoch": float(epoch), f"best/{objective}": best} if math.isfinite(best) else {}


def divergence(record: EpochRecord, row: int) -> str | None:
    """Return why a run has diverged in an epoch, None if it has not.

    It has where a value is no number, where its squared error is above 1, more than any constant
    image has (of a table, whose columns have variance 1: above 10,000), or its rate is above 10,000
    nats a latent although the loss counts it: posterior means lie 141 standard deviations of the
    prior from 0. So it has where Adam's second moment of a weight is infinite: it stands still.
    """
    config = record.configs[row]
    limits = {"loss": math.inf, "mse": 1.0 if record.columns is None else 1e4}
    if config.kl_weight > 0:
        limits["rate"] = 1e4 * config.latent_size
    for part, metrics in (("training", record.train), ("validation", record.val)):
        for name, limit in limits.items():
            value = float(metrics[name][row]) if name in metrics else 0.0
            if not abs(value) < math.inf:
                return f"{part} {name} is {value}"
            if value > limit:
                return f"{part} {name} is {value:.3g}, above {limit:,.0f}"
    still = "a gradient's square is too large for Adam, whose weight stands still"
    return still if row in record.still else None


def _trained(record: EpochRecord, rows: Sequence[int]) -> list[Trained]:
    return [Trained(record.configs[row], record.model(row)) for row in rows]


def picture_epochs(epochs: int) -> set[int]:
    """Return the epochs after which there is a picture: the first, a fifth of the way, the last."""
    return {1, max(1, epochs // 5), epochs}


def _log_pictures(
    logs: Collection[RunLog], runs: Sequence[Trained], data: Dataset, epoch: int
) -> None:
    measured = evaluate.as_measured(runs, data) if runs else {}
    for log, (config, model) in zip(logs, runs, strict=True):
        val = measured[config.drawing].val
        with one_thread():
            picture = pictures.reconstructions([model], val)
        log.picture("reconstructions", picture, epoch)
