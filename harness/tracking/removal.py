"""Removal of a study's runs for good, as `mlflow gc` does it to what is marked as deleted."""

import shlex
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlflow.entities import ViewType

from harness.tracking import addresses, artifacts, page
from harness.tracking.runs import Run
from harness.tracking.store import NAME, Store


def runs_of(store: Store, study: str) -> dict[str, list[Run]]:
    """Return experiment -> runs of a study there, in a database those deleted in MLflow too."""
    every, deleted = store.call(store.client.search_experiments), store.spool is None
    runs = {one.name: store.runs(one.name, deleted=deleted, study=study) for one in every}
    return {name: of for name, of in runs.items() if of}


def folder(store: Store, place: str, identity: str) -> Path | None:
    """Return the folder of a run or a logged model, by the place of its artifacts.

    None if there is none beside the database, as of a server; another store's are not touched.
    """
    moved = artifacts.moved(place, store.home)
    path = (moved[1] if moved else Path(url2pathname(urlsplit(place).path))).parent
    is_ours = store.spool is None and path.resolve().is_relative_to(store.home.resolve())
    return path if is_ours and path.name == identity and path.exists() else None


def remove(store: Store, study: str, found: Mapping[str, Sequence[Run]]) -> str:
    """Remove runs, their artifacts and logged models, and the view of their study.

    It may be repeated after an interruption. An experiment that is then empty goes too. A server
    marks runs as deleted; returned is what its administrator has to do, "" of a database.
    """
    client, tag = store.client, f"{page.TAG}{study}"
    database: Any = None if store.spool else client._tracking_client.store

    def remove_one(kind: str, identity: str, place: str) -> None:
        if here := folder(store, place, identity):
            shutil.rmtree(here)
        of, method = (database, "_hard_delete") if database else (client, "delete")
        store.call(getattr(of, f"{method}_{kind}"), identity)

    for name, runs in found.items():
        experiment = store.find(name)
        assert experiment is not None
        number = experiment.experiment_id
        if tag in experiment.tags:
            store.call(client.delete_experiment_tag, number, tag)
        for run in runs:
            of_run = f"source_run_id = '{run.run_id}'"
            for model in store.call(client.search_logged_models, [number], of_run):
                remove_one("logged_model", model.model_id, model.artifact_location)
            remove_one("run", run.run_id, run.artifacts)
        is_left = store.call(client.search_runs, [number], "", ViewType.ALL, 1)
        if database and NAME in experiment.tags and not is_left:
            store.call(client.delete_experiment, number)
            store.call(database._hard_delete_experiment, number)
            for part in ("models", ""):
                with suppress(OSError):  # there is none, or it is not empty
                    (store.home / "mlruns" / experiment.tags[NAME] / part).rmdir()
    if file := addresses.sqlite_file(store.uri):
        with suppress(sqlite3.Error), closing(sqlite3.connect(file, timeout=1)) as connection:
            connection.execute("vacuum")  # smaller, unless another process writes
        return ""
    ids = ",".join(run.run_id for runs in found.values() for run in runs)
    return (
        "They are marked as deleted. The server's administrator removes them for good, with all "
        f"else that is marked so, by: MLFLOW_TRACKING_URI={shlex.quote(store.uri)} mlflow gc "
        f"--backend-store-uri DATABASE --run-ids {ids}"
    )
