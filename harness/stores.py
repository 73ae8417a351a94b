"""Tracking stores: a database file, or a server with an outbox for what it cannot take now."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from harness.config import UserError
from harness.login import signed_in
from harness.outbox import Outbox
from harness.places import (
    asked_once,
    check_database,
    check_folder,
    creation_lock,
    environment,
    is_server,
    memory_folder,
    project_root,
    sqlite_file,
    tracking_address,
    unusable,
    use_write_ahead_log,
    without_password,
)
from harness.sending import PATIENT, Direct, ServerSender, may_pass, refused, shortly, unless_set

for library in ("mlflow", "alembic"):
    logging.getLogger(library).setLevel(logging.ERROR)
logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # it raises what it logs


@dataclass(frozen=True)
class Store:
    """A tracking store.

    Attributes:
        client: MLflow's client of it.
        uri: its address; of a server without user and password, which MLflow knows by then.
        home: folder of the database, or the repository for a server: reports are written here.
        local: whether it is a database file, with artifacts in `mlruns` beside it.
        writer: takes all writes of runs; those that a server cannot take wait in an outbox.
    """

    client: MlflowClient
    uri: str = field(repr=False)
    home: Path
    local: bool
    writer: Direct | Outbox = field(repr=False)

    def check_home(self) -> None:
        """Refuse a store beside which nothing can be written, before hours of training.

        Raises:
            UserError: reports or unfinished runs cannot be kept there.
        """
        for name in ("reports", "cache"):
            check_folder(self.home / name)


def connect(uri: str | None = None) -> Store:
    """Open a tracking store, creating the database if it is not there yet.

    Args:
        uri: MLflow tracking URI; None means MLFLOW_TRACKING_URI or `mlflow.db` in the repository.

    Raises:
        UserError: the store cannot be opened or created.
    """
    uri = signed_in(tracking_address(uri))
    if (os.getpid(), uri) in _servers:
        return _servers[os.getpid(), uri]
    check_database(uri, "--tracking-uri")
    database = sqlite_file(uri)
    try:
        if database is None:
            return _server(uri)
        database.parent.mkdir(parents=True, exist_ok=True)
        with creation_lock(uri):
            if not database.exists():
                from harness.models.files import put  # loads torch

                put(database, _empty_database())
            use_write_ahead_log(database)
            client = _client(uri)
            return Store(client, uri, database.parent, local=True, writer=Direct(client))
    except Exception as error:  # any driver's: SQLAlchemy's, requests', MLflow's
        raise unusable(uri, "--tracking-uri", error) from error


@cache
def _empty_database() -> bytes:
    """Return an empty database of MLflow, made in memory: 300 commits to a disk take seconds."""
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        database = Path(folder) / "mlflow.db"
        _client(f"sqlite:///{database}")
        return database.read_bytes()


_servers: dict[tuple[int, str], Store] = {}
"""Servers that a process writes to: what waits for one must be known wherever it is read."""


def _server(uri: str) -> Store:
    if not is_server(uri):  # a database server, through SQLAlchemy
        _reach(uri)
        client = _client(uri)
        return Store(client, uri, project_root(), local=False, writer=Direct(client))
    try:
        with asked_once():
            client = _client(uri)
    except (MlflowException, requests.RequestException) as error:
        raise ConnectionError(shortly(error)) from error
    folder = project_root() / "cache" / "outbox" / re.sub(r"[^\w.-]+", "_", uri)
    outbox = Outbox(folder, uri, ServerSender(client, uri))
    store = Store(client, uri, project_root(), local=False, writer=outbox)
    return _servers.setdefault((os.getpid(), uri), store)


def _reach(uri: str) -> None:
    """Connect to a database server once, where MLflow would try for minutes.

    Raises:
        SQLAlchemyError: it is not there, or refuses.
    """
    url = sqlalchemy.make_url(uri)
    hurry = {"connect_timeout": 4} if url.get_backend_name() == "postgresql" else {}
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=hurry)
    engine.connect().close()


def _client(uri: str) -> MlflowClient:
    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def patient(store: Store) -> AbstractContextManager[None]:
    """Let a server take longer to answer than a training would wait."""
    return environment({} if store.local else unless_set(PATIENT))


@contextmanager
def answering(store: Store) -> Iterator[None]:
    """Ask a server for what cannot be done later: with patience, but not for minutes.

    Raises:
        UserError: it does not answer, or refuses.
    """
    if store.local:
        yield
        return
    try:
        with patient(store):
            yield
    except (MlflowException, requests.RequestException) as error:
        if not may_pass(error):
            raise refused(store.uri, "a request", error) from error
        where = without_password(store.uri)
        raise UserError(
            f"the MLflow server at {where} does not answer ({shortly(error)}); the same command "
            "goes on once it is back"
        ) from error
