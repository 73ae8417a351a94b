"""Removal of a study's runs for good, as `mlflow gc` does it to what is marked as deleted."""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlflow.entities import ViewType
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from harness.tracking import artifacts, page
from harness.tracking.runs import Run
from harness.tracking.store import NAME, Store


def runs_of(store: Store, study: str) -> dict[str, list[Run]]:
    """Return experiment -> runs of a study there, in a database those deleted in MLflow too."""
    every = [found.name for found in store.call(store.client.search_experiments)]
    is_database = store.spool is None
    runs = {name: store.runs(name, deleted=is_database, study=study) for name in every}
    return {name: of for name, of in runs.items() if of}


def folder(store: Store, place: str, identity: str) -> Path | None:
    """Return the folder of a run or a logged model, by the place of its artifacts.

    None if it is not beside the database: on a server, or of the store that this one is a copy of.
    """
    moved = None if store.spool else artifacts.moved(place, store.home)
    path = (moved[1] if moved else Path(url2pathname(urlsplit(place).path))).parent
    is_beside = path.resolve().is_relative_to(store.home.resolve())
    is_ours = store.spool is None and urlsplit(place).scheme in ("", "file") and is_beside
    return path if is_ours and path.name == identity else None


def remove(store: Store, study: str, found: Mapping[str, Sequence[Run]]) -> str:
    """Remove runs, their artifacts and logged models, and the view of their study.

    It may be repeated after an interruption. An experiment that is then empty goes too. A server
    marks runs as deleted; returned is what its administrator has to do, "" of a database.
    """
    client, tag = store.client, f"{page.TAG}{study}"
    sql: Any = None if store.spool else client._tracking_client.store
    for name, runs in found.items():
        experiment = store.find(name)
        assert experiment is not None
        number = experiment.experiment_id
        if tag in experiment.tags:
            store.call(client.delete_experiment_tag, number, tag)
        for run in runs:
            made = f"source_run_id = '{run.run_id}'"
            for model in store.call(client.search_logged_models, [number], made):
                if sql is None:
                    store.call(client.delete_logged_model, model.model_id)
                else:
                    _remove_artifacts(store, model.artifact_location, model.model_id)
                    store.call(sql._hard_delete_logged_model, model.model_id)
            if sql is None:
                store.call(client.delete_run, run.run_id)
            else:
                _remove_artifacts(store, run.artifacts, run.run_id)
                store.call(sql._hard_delete_run, run.run_id)
        if sql is None or NAME not in experiment.tags:
            continue
        is_empty = not client.search_runs([number], "", ViewType.ALL, 1)
        if is_empty and not client.search_logged_models([number], max_results=1):
            store.call(client.delete_experiment, number)
            store.call(sql._hard_delete_experiment, number)
            for left in ("models", ""):
                with suppress(OSError):  # there is none, or it is not empty
                    (store.home / "mlruns" / experiment.tags[NAME] / left).rmdir()
    if sql is not None:
        return ""
    ids = ",".join(run.run_id for runs in found.values() for run in runs)
    return (
        "They are marked as deleted. The server's administrator removes them for good, with all "
        f"else that is marked so, by: MLFLOW_TRACKING_URI={shlex.quote(store.uri)} mlflow gc "
        f"--backend-store-uri DATABASE --run-ids {ids}"
    )


def _remove_artifacts(store: Store, place: str, identity: str) -> None:
    if urlsplit(place).scheme not in ("", "file"):
        get_artifact_repository(place).delete_artifacts()
    elif (here := folder(store, place, identity)) and here.exists():
        shutil.rmtree(here)
