"""A user's study tried in seconds before it trains: one step, metrics, then answer and figures."""

import contextlib
import io
import logging
import math
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from harness import objective, registry, streams
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split
from harness.errors import UserError, line_of
from harness.linear.vae import linear_metrics
from harness.metrics import evaluate, likelihood
from harness.models.stack import stack_key
from harness.models.vae import build
from harness.tracking import record as recording
from harness.tracking.runs import Run
from harness.training import engine
from studies.runner import workers
from studies.runner.proposers import Listed
from studies.runner.study import Plan

log = logging.getLogger(__name__)

IMAGES = 100  # of each split, or a batch to train on; and one of each class
RATE = 1e-6  # learning rate at which no step diverges: it may be what the study sweeps
MADE_UP = 0.5  # value of a metric that is not measured here


def is_needed(plan: Plan) -> bool:
    """Return whether a study has code of a user that no process has tried for this one."""
    own = any(registry.sources(config) for config in plan.configs)
    return not workers.started() and (own or "-m" not in plan.start[:1])


def try_out(plan: Plan, data: Dataset) -> None:
    """Raise UserError with the line of a user's code that fails; nothing is written.

    A run of each shape is trained for a step or a few on a few images, on the CPU, and measured by
    the registered metrics. Answer and figures get a row for each run of the plan: its parameters,
    and metrics that differ from those of the tried run by 1 %.
    """
    log.info("trying networks, terms, metrics, figures and answer on one step")
    measured = dict[object, dict[str, float]]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a user's code, which meets them again in the study
        for config in plan.configs:
            if (key := stack_key(config)) not in measured:
                measured[key] = _measured(config, data, plan.objective)
        if isinstance(plan.proposer, Listed):  # a search's answer and figures are built in
            _conclude(plan, [*_runs(plan.proposer, data, measured)], data)


@contextlib.contextmanager
def _refusing(part: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{part} fails on a run of one step: {line_of(error)}") from error


def _measured(config: RunConfig, data: Dataset, selection: str) -> dict[str, float]:
    """Train a run of one step, and return its metrics by the names under which they are logged."""
    one: dict[str, Any] = {"epochs": 1, "kl_warmup_epochs": 0, "lr_warmup_epochs": 0}
    one |= {"kl_cycles": 1, "patience": 0}
    config = config.replace(**one, learning_rate=RATE, precision="float32")
    train = data.train.head(max(config.batch_size, IMAGES))
    few = replace(data, train=train, val=_few(data.val), test=_few(data.test))
    what = f"network {config.model!r}"
    with _refusing(what):
        untrained = build(config, data.image_shape, data.train.largest, data.columns).eval()
        shown = few.drawn(config.drawing).train.head(config.batch_size)
        x = evaluate.pixels(untrained, shown, slice(None))
        noise = streams.noise(0, "noise", len(x), config.latent_size).to(untrained.dtype)
        batch = untrained.batch(x, noise, noise, len(data.train))
    for name, term in objective.terms_of(config).items():
        with _refusing(f"term {name!r}"):
            value = term(batch)
        if (shape := getattr(value, "shape", None)) != ():
            found = type(value).__name__ if shape is None else f"shape {tuple(shape)}"
            raise UserError(f"term {name!r} returns {found}: return a tensor of shape ()")
    with _refusing(" with ".join([what, *(f"term {name!r}" for name in config.terms)])):
        *_, last = engine.train([config], few, "cpu")
        model = evaluate.frozen(last.model(0)).requires_grad_(requires_grad=False)
        ends = evaluate.evaluate([(config, model)], few)[0] | linear_metrics(config, few)
    later = (*registry.QUALITY, *(f"neg_log_likelihood/k{k}" for k in likelihood.SAMPLES))
    values = {f"test/{name}": MADE_UP for name in later} | {"progress/kl_warmup": 1.0}
    values |= {k: v for k, v in ends.items() if k.startswith(("val/", "test/", "linear/"))}
    values |= dict.fromkeys(recording.WALL_CLOCK, 1.0) | engine.flat_record(last, 0)
    if not {"train/loss", "val/loss"} <= values.keys():
        terms = f" with terms {', '.join(config.terms)}" if config.terms else ""
        raise UserError(f"{what}{terms}: after one step its loss is no finite number")
    for name, metric in registry.METRICS.items():
        for part in ("val", "test"):
            with _refusing(f"metric {name!r}"):
                number = float(metric.function(model, getattr(few, part)))
            # Too few images or steps may be why it has no value yet.
            values[f"{part}/{name}"] = number if math.isfinite(number) else MADE_UP
    if selection not in values:
        raise UserError(f"objective={selection!r}: its runs have no such metric")
    return values | {"best/epoch": 1.0, f"best/{selection}": values[selection]}


def _few(split: Split) -> Split:
    classes = np.unique(split.labels.numpy(), return_index=True)[1]
    rows = np.union1d(np.arange(min(IMAGES, len(split))), classes)
    return split.rows(split.labels.new_tensor(rows.tolist()))


def _runs(
    proposer: Listed, data: Dataset, measured: Mapping[object, Mapping[str, float]]
) -> Iterator[Run]:
    """Yield a made-up run for each one of a list, as MLflow returns it."""
    for place, (_, config, label, more) in enumerate(proposer.cells):
        draw = random.Random(place)
        params = recording.parameters(config, data) | more | {"device": "cpu", "stack_width": 1}
        texts = {name: str(value) for name, value in params.items()}
        metrics = {
            name: value * draw.uniform(0.99, 1.01)
            for name, value in measured[stack_key(config)].items()
        }
        yield Run(str(place), f"{label} seed={config.seed}", "FINISHED", texts, metrics, {})


def _conclude(plan: Plan, runs: list[Run], data: Dataset) -> None:
    """Let a study draw its figures and answer its question from runs."""
    from studies.runner.summary import Ended  # PyTorch, MLflow and pandas

    nowhere = cast(Any, SimpleNamespace(histories=lambda ids, metric: []))  # nor in Optuna
    with _refusing("the table"):
        findings = plan.find(Ended(replace(plan, refit=0), data, nowhere, nowhere, [], runs))
    parts: dict[str, Any] = {"the answer": findings.answer}
    for name, (draw, _) in findings.figures.items():
        parts[f"figure {name!r}"] = lambda draw=draw: draw().savefig(io.BytesIO(), dpi=30)
    for part, function in parts.items():
        with _refusing(part):
            try:
                function()
            except UserError as error:  # it may load the runs
                log.info("%s cannot be tried: %s", part, error)
