"""Tracking stores: a database file, or a server with a spool for what it cannot take now."""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow.artifacts
import requests
import sqlalchemy
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from harness.config import RunConfig
from harness.errors import UserError
from harness.tracking import addresses
from harness.tracking.runs import KEY, NOTE, PROVENANCE, Direct, Logged, Record, Run, RunLog, origin
from harness.tracking.spool import PATIENCE, REFUSALS, Spool, refused, shortly, status

for library in ("mlflow", "alembic"):
    logging.getLogger(library).setLevel(logging.ERROR)
logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # it raises what it logs

logger = logging.getLogger(__name__)

# MLflow sends a request once, with a limit in seconds; repeating it is done here.
ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}


@dataclass(frozen=True)
class Store:
    """A tracking store.

    Attributes:
        client: MLflow's client of it.
        uri: its address.
        home: folder of the database, or the repository for a server: reports are written here.
        spool: what its server does not have yet; None for a database.
    """

    client: MlflowClient
    uri: str = field(repr=False)
    home: Path
    spool: Spool | None = field(default=None, repr=False)

    def check_home(self) -> None:
        """Refuse a store beside which nothing can be written, before hours of training."""
        for name in ("reports", "cache"):
            addresses.check_folder(self.home / name)

    def experiment(self, name: str, description: str) -> str:
        """Return the id of an experiment, creating it with its description if need be."""
        # A server knows its own place; a database would take the current directory.
        location = None if addresses.is_server(self.uri) else (self.home / "mlruns" / name).as_uri()
        # Of this kind, MLflow's page opens with runs and charts instead of its GenAI view.
        tags = {NOTE: description, "mlflow.experimentKind": "custom_model_development"}
        found = self.ask(self.client.get_experiment_by_name, name)
        if found is None:
            try:
                self.ask(self.client.create_experiment, name, location, tags)
            except UserError:  # another process was first, or the answer was lost
                if self.ask(self.client.get_experiment_by_name, name) is None:
                    raise
            found = self.ask(self.client.get_experiment_by_name, name)
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"experiment {name!r} was deleted in MLflow; restore it there, or delete it for "
                "good with `mlflow gc`"
            )
        if self.spool is not None:
            _check_artifacts(self.uri, found.artifact_location)
        return found.experiment_id

    def start(
        self,
        experiment_id: str,
        key: str,
        name: str,
        tags: dict[str, str],
        params: dict[str, object],
        description: str = "",
    ) -> RunLog:
        """Start a run; in its description, the key stands for the run's id."""
        create = {
            "experiment": experiment_id,
            "name": name,
            "tags": {**origin(), **tags},
            "params": {name: str(value) for name, value in params.items()},
            "description": description,
        }
        return RunLog(self.spool or Direct(self.client), key, create)

    def runs(self, experiment: str, **tags: str) -> list[Run]:
        """Deliver what waits, and return the runs with some tags, in the order of the plan."""
        self.deliver()
        terms = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        found = self._search(experiment, " and ".join(terms))
        return sorted(found, key=lambda run: int(run.tags.get("place", -1)))

    def _search(self, experiment: str | None, terms: str) -> list[Run]:
        """Return runs by start; of all experiments if None is given."""
        if experiment is None:
            among = self.ask(self.client.search_experiments)
        else:
            among = [self.ask(self.client.get_experiment_by_name, experiment)]
        ids = [found.experiment_id for found in among if found is not None]
        runs: list[Run] = []
        order = ["attributes.start_time ASC"]
        token: str | None = ""
        while ids and token is not None:
            page = self.ask(
                self.client.search_runs, ids, terms, order_by=order, page_token=token or None
            )
            runs += map(_run, page)
            token = page.token or None
        return runs

    def close(
        self, experiment: str, keys: Iterable[str], reason: str, status: str = "KILLED"
    ) -> None:
        """End the runs with these keys that are RUNNING or FINISHED, with the reason as a tag.

        It may be repeated; keys of which no run was made are passed over.
        """
        if not (closing := set(keys)):
            return
        if self.spool is not None:  # not those of a process that lives, but may be stopped
            self.deliver(closing & self.spool.keys())
        for run in self._search(experiment, "attributes.status != 'KILLED'"):
            if run.key in closing and run.status in ("RUNNING", "FINISHED"):
                self.ask(self.client.set_tag, run.run_id, "reason", reason)
                self.ask(self.client.set_terminated, run.run_id, status)

    def tag(self, run_id: str, name: str, value: str) -> None:
        """Set a tag of a run."""
        self.ask(self.client.set_tag, run_id, name, value)

    def undelivered(self) -> set[str]:
        """Return the keys of runs on this disk that the server does not have whole."""
        return set() if self.spool is None else self.spool.undelivered()

    def complete(self) -> set[str]:
        """Return the keys of runs whose end is on this disk."""
        return set() if self.spool is None else self.spool.complete()

    def deliver(
        self,
        keys: Iterable[str] | None = None,
        patience: float = PATIENCE,
        *,
        wait_while_answering: bool = False,
    ) -> bool:
        """Wait until the server has all that was written of some runs, None for this process's.

        A server that does not answer for `patience` seconds, or refuses a run, is an error. With
        `wait_while_answering` this returns False at once where the server is away.
        """
        wanted = None if keys is None else set(keys)
        return self.spool is None or self.spool.deliver(
            wanted, patience, wait_while_answering=wait_while_answering
        )

    def run(self, run: str) -> Run:
        """Return a run by its id or key."""
        try:
            return _run(self.ask(self.client.get_run, run))
        except UserError as error:
            if status(error.__cause__) not in (400, 404):
                raise
            if found := self._search(None, f"tags.{KEY} = '{run}'"):
                return found[0]
            raise UserError(
                f"run {run!r} is not in {addresses.without_password(self.uri)}; its page in MLflow "
                "shows the id, and --tracking-uri names another store"
            ) from error

    def fetch(self, run_id: str, path: str, folder: str) -> None:
        """Download a folder of a run's artifacts.

        MLflow 3.17.2 calls it missing where the server goes away meanwhile, so that one which is
        there is asked for again.
        """
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.ask(self.client.download_artifacts, run_id, path, folder)
                return
            except UserError:
                there = self.spool and self.ask(self.client.list_artifacts, run_id, path)
                if not there or time.monotonic() > end:
                    raise
            time.sleep(1)

    def text(self, run_id: str, file: str) -> str:
        """Return an artifact of a run as text."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = self.client.download_artifacts(run_id, file, folder)
                return Path(path).read_text(encoding="utf-8")
            except Exception as error:  # the file system's, a server's, MLflow's
                raise UserError(
                    f"{file} of run {run_id} cannot be read ({addresses.reason(error)})"
                ) from error

    def json(self, run_id: str, file: str) -> dict[str, Any]:
        """Return an artifact of a run that holds a JSON object."""
        try:
            found = json.loads(self.text(run_id, file))
        except (json.JSONDecodeError, RecursionError) as error:  # also brackets without end
            raise UserError(f"{file} of run {run_id} is not JSON ({error})") from None
        if not isinstance(found, dict):
            raise UserError(f"{file} of run {run_id} is no JSON object")
        return found

    def history(self, run_id: str) -> list[Logged]:
        """Return every logged value of a run, metric by metric."""
        metrics = self.ask(self.client.get_run, run_id).data.metrics
        return [
            Logged(metric, entry.step, entry.value)
            for metric in sorted(metrics)
            for entry in self.ask(self.client.get_metric_history, run_id, metric)
        ]

    def record(self, run: str) -> Record:
        """Return all that is needed to train a finished run again, by its id or key."""
        found = self.run(run)
        role = found.tags.get("role")
        if role != "run":
            kind = f"a {role}" if role else "no run of this harness"
            raise UserError(f"run {run} is {kind}; give a run of a configuration and a seed")
        if found.status != "FINISHED":
            raise UserError(f"run {run} is {found.status}; only a FINISHED run can be compared")
        config = RunConfig.from_json(self.text(found.run_id, "model/config.json"))
        made_with = self.json(found.run_id, PROVENANCE)
        return Record(found.run_id, found.name, config, made_with, self.history(found.run_id))

    def ask(self, call: Callable[..., Any], *values: object, **named: object) -> Any:  # noqa: ANN401
        """Call MLflow for what can be repeated; ask a server that is away for PATIENCE seconds."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return call(*values, **named)
            except (MlflowException, requests.RequestException) as error:
                if self.spool is None or status(error) in REFUSALS:
                    raise refused(self.uri, call.__name__, error) from error
                if time.monotonic() > end:
                    raise UserError(
                        f"the MLflow server at {self.uri} does not answer ({shortly(error)}); the "
                        "same command goes on once it is back"
                    ) from error
            time.sleep(1)


def _check_artifacts(uri: str, location: str) -> None:
    """Refuse a server that leaves artifacts to its clients where they cannot be written."""
    place = urlsplit(location)
    try:
        if place.scheme in ("", "file"):
            folder = Path(url2pathname(place.path))
            if not folder.parents[1].is_dir():  # as on the machine of the server
                raise OSError(f"there is no {folder.parents[1]}")
            addresses.try_folder(folder)
        elif place.scheme not in ("mlflow-artifacts", "http", "https"):
            mlflow.artifacts.list_artifacts(artifact_uri=location)
    except Exception as error:  # any cloud library's
        raise UserError(
            f"the MLflow server at {uri} leaves artifacts to its clients, and {location} cannot be "
            f"written from here ({addresses.reason(error)}); start it with --serve-artifacts, or "
            "give this machine access to that place"
        ) from error


def _run(found: mlflow.entities.Run) -> Run:
    info, data = found.info, found.data
    return Run(info.run_id, info.run_name, info.status, data.params, data.metrics, data.tags)


def connect(uri: str | None = None, *, patience: float = 0) -> Store:
    """Open a tracking store, creating the database if it is not there yet.

    No URI means MLFLOW_TRACKING_URI or `mlflow.db` in the repository. A server that does not answer
    is waited for as many seconds as `patience`.
    """
    uri = addresses.tracking_address(uri)
    if addresses.is_server(uri):
        return _server(uri, patience)
    addresses.check_database(uri, "--tracking-uri")
    database = addresses.sqlite_file(uri)
    try:
        if database is None:  # a database server, through SQLAlchemy
            _reach(uri)
            return Store(_client(uri), uri, addresses.project_root())
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{database}.lock"):  # creating the tables twice breaks them
            if not database.exists():
                new = database.with_name(f".{database.name}.{os.getpid()}.new")
                new.write_bytes(_empty_database())
                new.replace(database)  # whole or not at all, even after a kill
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("pragma journal_mode=WAL")  # halves the cost of a write
            return Store(_client(uri), uri, database.parent)
    except Exception as error:  # any driver's: SQLAlchemy's, MLflow's
        raise addresses.unusable(uri, "--tracking-uri", error) from error


@cache
def _empty_database() -> bytes:
    """Return an empty database of MLflow, made in memory: 300 commits to a disk take seconds."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        database = Path(folder) / "mlflow.db"
        _client(f"sqlite:///{database}")
        return database.read_bytes()


def _client(uri: str) -> MlflowClient:
    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def _reach(uri: str) -> None:
    """Connect to a database server once, where MLflow would try for minutes."""
    url = sqlalchemy.make_url(uri)
    hurry = {"connect_timeout": 4} if url.get_backend_name() == "postgresql" else {}
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=hurry)
    engine.connect().close()


_servers: dict[tuple[int, str], Store] = {}  # by process and address: one spool each


def _server(uri: str, patience: float) -> Store:
    if known := _servers.get((os.getpid(), uri)):
        return known
    for name, value in ONCE.items():
        os.environ.setdefault(name, value)
    end = time.monotonic() + patience
    while True:
        try:
            client = _client(uri)
            break
        except (MlflowException, requests.RequestException) as error:
            if status(error) in REFUSALS:
                raise refused(uri, "a request", error) from error
            away = ConnectionError(shortly(error))
            if time.monotonic() >= end:
                raise addresses.unusable(uri, "--tracking-uri", away) from error
            logger.warning("Waiting for the MLflow server at %s (%s).", uri, away)
        time.sleep(5)
    root = addresses.project_root()
    folder = root / "cache" / "spool" / re.sub(r"[^\w.-]+", "_", uri)
    store = Store(client, uri, root, Spool(folder, uri, client))
    return _servers.setdefault((os.getpid(), uri), store)
