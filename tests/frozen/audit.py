"""Is the store of a finished study complete? Read with MLflow's client and JSON alone.

Every configuration and seed has one finished run with all its epochs, settings, pictures and its
model; one summary is finished and holds its report; no run is open, and those that ended otherwise
give a reason.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

SETTINGS = (
    *("model", "hidden", "channels", "latent_size", "head", "latent", "kl_weight"),
    *("kl_normalization", "kl_warmup_epochs", "kl_cycles", "free_bits", "sigma", "likelihood"),
    *("binarization", "learning_rate", "batch_size", "epochs", "precision", "seed"),
)
"""Settings that a run has as parameters and in its configuration; more may come."""

DERIVED = ("beta", "decoder_variance", "dataset", "dataset_digest")
"""Parameters that follow from settings and data, of a run with a KL weight."""

FINAL = ("mse", "neg_elbo", "rate", "distortion", "neg_log_likelihood", "frechet", "probe_accuracy")
"""Metrics of the test split that a run of classified images is measured by at its end."""


def faults(
    uri: str, experiment: str, axis: str, values: Iterable[object], seeds: int, epochs: int
) -> list[str]:
    """Return what is wrong with a store that holds one study, one sentence each.

    Args:
        uri: tracking URI.
        experiment: name of the study's experiment.
        axis: the setting that the study varies.
        values: its values, as parameters are written.
        seeds: repetitions of every value.
        epochs: length of every run.
    """
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return [f"there is no experiment {experiment!r}"]
    runs = list(client.search_runs([found.experiment_id], max_results=10_000))
    done = [run for run in runs if run.info.status == "FINISHED"]
    trained = [run for run in done if "seed" in run.data.params]
    summaries = [run for run in done if "seed" not in run.data.params]
    wanted = Counter(product(map(str, values), map(str, range(seeds))))
    made = Counter((run.data.params[axis], run.data.params["seed"]) for run in trained)
    said = [f"{cell} has {made[cell]} finished runs" for cell in wanted | made if
            made[cell] != wanted[cell]]  # fmt: skip
    for run in runs:
        if run.info.status not in ("FINISHED", "KILLED", "FAILED"):
            said.append(f"run {run.info.run_id} is {run.info.status}")
        elif run.info.status != "FINISHED" and "reason" not in run.data.tags:
            said.append(f"run {run.info.run_id} is {run.info.status} for no reason")
    if len(summaries) != 1:
        said.append(f"{len(summaries)} summaries are finished")
    for run in summaries:
        if "report.html" not in files(client, run):
            said.append(f"the summary {run.info.run_id} has no report")
    for run in trained:
        faults_of_run = (*_metrics(client, run, epochs), *_artifacts(client, run))
        said += [f"run {run.info.run_id} {fault}" for fault in faults_of_run]
    return said


def files(client: MlflowClient, run: Run, folder: str | None = None) -> list[str]:
    """Return the names of a run's artifacts in one of their folders."""
    return [file.path for file in client.list_artifacts(run.info.run_id, folder)]


def _metrics(client: MlflowClient, run: Run, epochs: int) -> Iterator[str]:
    for name in FINAL:
        if f"test/{name}" not in run.data.metrics:
            yield f"has no test/{name}"
    for split in ("train", "val"):
        if f"{split}/neg_elbo" not in run.data.metrics:
            yield f"has no {split}/neg_elbo"
    for name in run.data.metrics:
        steps = [entry.step for entry in client.get_metric_history(run.info.run_id, name)]
        if name.startswith(("train/", "val/")) and steps != [*range(1, epochs + 1)]:
            yield f"has {name} of epochs {steps}"
        if name.startswith("test/") and len(steps) != 1:
            yield f"has {len(steps)} values of {name}"


def _artifacts(client: MlflowClient, run: Run) -> Iterator[str]:
    model = files(client, run, "model")
    if not {"model/config.json", "model/weights.safetensors"} <= {*model}:
        yield f"has the model files {model}"
        return
    path = client.download_artifacts(run.info.run_id, "model/config.json")
    config, params = json.loads(Path(path).read_text()), run.data.params
    for name in SETTINGS:
        value = config.get(name)
        written = str(tuple(value) if isinstance(value, list) else value)
        if name not in config or params.get(name) != written:
            yield f"has {name}={params.get(name)} as a parameter, {written} in its configuration"
    for name in DERIVED:
        if name not in params:
            yield f"has no parameter {name}"
    pictures = [name for name in files(client, run, "images") if name.endswith(".png")]
    for key in ("reconstructions", "prior_samples"):
        if not any(Path(name).name.startswith(key) for name in pictures):
            yield f"has no picture of {key}"
