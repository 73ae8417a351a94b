"""Tracking stores: a database file, or a server with a spool for what it cannot take now."""

import json
import logging
import os
import re
import shlex
import sqlite3
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow.artifacts
import requests
import sqlalchemy
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from harness import registry
from harness.config import RunConfig
from harness.errors import UserError, printable, reading
from harness.tracking import addresses, artifacts, runs, schema
from harness.tracking.runs import (
    KEY,
    NOTE,
    PROVENANCE,
    Epoch,
    Logged,
    Record,
    Run,
    RunLog,
    part_file,
)
from harness.tracking.spool import PATIENCE, REFUSALS, Spool, refused, root_reason, status

# SQLAlchemy's 2.1 about MLflow 3.17, an error with `python -W error`.
warnings.filterwarnings("ignore", "The ``noload`` loader strategy is deprecated")
for library in ("mlflow", "alembic"):
    logging.getLogger(library).setLevel(logging.ERROR)
logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # it raises what it logs


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def _write_little(connection: Any, record: object) -> None:  # noqa: ANN401 - of any driver
    """Let SQLite write a database with a log seldom: a run changes a page for each of its metrics.

    What is committed is in the log and survives this process. A machine that loses its power may
    lose the last runs, which the same command trains again.
    """
    if isinstance(connection, sqlite3.Connection):
        file = connection.execute("pragma database_list").fetchone()[2]
        is_ours = os.path.realpath(file) in _written
        if is_ours and connection.execute("pragma journal_mode").fetchone() == ("wal",):
            connection.execute("pragma synchronous=NORMAL")
            connection.execute(f"pragma wal_autocheckpoint={LOG_PAGES}")


_written = set[str]()  # databases that this process writes

log = logging.getLogger(__name__)
_warn = cache(log.warning)  # once a text

NAME = "made_as"  # tag of an experiment with the name that it was made with
CONFIG = "model/config.json"  # artifact of a finished run
PAGE, LOG_PAGES = 1024, 2**14  # bytes of a page of a new database; pages of its log, 16 MiB
START = ["attributes.start_time ASC"]


@dataclass(frozen=True)
class Store:
    """A tracking store.

    Reports are written to `home`: the database's folder, or the repository for a server. `spool`
    holds the runs that a server does not have yet; it is None for a database.
    """

    client: MlflowClient
    uri: str = field(repr=False)
    home: Path
    spool: Spool | None = field(default=None, repr=False)

    def check_home(self) -> None:
        """Refuse a store beside which nothing can be written, before hours of training."""
        for name in ("reports", "cache") if self.spool else ("reports", "cache", "mlruns"):
            try:
                addresses.try_folder(self.home / name)
            except OSError as error:
                raise UserError(
                    f"{self.home / name} cannot be written ({addresses.reason(error)}), where "
                    "results go; make room or rights there, or name a --tracking-uri in another "
                    "folder"
                ) from error

    def experiment(self, name: str, description: str) -> str:
        """Return the id of an experiment, creating it with its description if need be."""
        # A server has a default location; a database would take the current directory.
        location = None if addresses.is_server(self.uri) else (self.home / "mlruns" / name).as_uri()
        # Of this kind, MLflow's page opens with runs and charts instead of its GenAI view.
        tags = {NOTE: description, "mlflow.experimentKind": "custom_model_development", NAME: name}
        if self.find(name) is None:
            try:
                self.call(self.client.create_experiment, name, location, tags)
            except UserError:  # another process was first, or the answer was lost
                if self.find(name) is None:
                    raise
        found = self.find(name)
        assert found is not None
        if found.name != name:
            log.warning("Experiment %r is called %r in MLflow, where runs go.", name, found.name)
        elif NAME not in found.tags:  # of an earlier version: so that it can be renamed
            self.call(self.client.set_experiment_tag, found.experiment_id, NAME, name)
        if self.spool is not None:
            _check_artifacts(self.uri, found.artifact_location)
        elif rebased := artifacts.rebase(self.uri, name):
            _warn(rebased)
        return found.experiment_id

    def find(self, name: str) -> Experiment | None:
        """Return an experiment by the name that it was made with; None if there is none."""
        found = self.call(self.client.get_experiment_by_name, name)
        if found is None:
            named, every = f"tags.`{NAME}` = '{name}'", ViewType.ALL
            renamed = self.call(self.client.search_experiments, every, filter_string=named)
            found = min(renamed, key=lambda one: one.lifecycle_stage, default=None)  # active first
        if found is not None:
            self._check_active(found)
        return found

    def _check_active(self, experiment: Experiment) -> None:
        if experiment.lifecycle_stage == "deleted":
            address, number = shlex.quote(self.uri), experiment.experiment_id
            tool = f"MLFLOW_TRACKING_URI={address} {shlex.quote(sys.executable)} -m mlflow"
            way = f"{tool} experiments restore -x {number}"
            gone = f"{tool} gc --backend-store-uri {address} --experiment-ids {number}"
            other = "" if self.spool else f", or remove it by `{gone}` and begin again with --fresh"
            named = f"experiment {experiment.name!r}"
            raise UserError(f"{named} was deleted in MLflow; restore it by `{way}`{other}")

    def start(
        self,
        experiment_id: str,
        key: str,
        name: str,
        tags: dict[str, str],
        params: dict[str, object],
    ) -> RunLog:
        """Start a run."""
        create = {
            "experiment": experiment_id,
            "name": name,
            "tags": {**runs.origin(), **tags},
            "params": {name: str(value) for name, value in params.items()},
        }
        if self.spool is not None:
            return RunLog(self.spool.put, key, create)  # every epoch at once: live curves
        return RunLog(self.writer(experiment_id, name), key, create, runs.BATCH)

    def writer(self, experiment_id: str, name: str) -> Callable[[str, runs.Write], None]:
        """Return a function that performs the writes of a run, until the run is deleted."""
        run_id, deleted = "", False

        def put(key: str, write: runs.Write) -> None:
            nonlocal run_id, deleted
            try:
                if write["kind"] == "create":
                    run_id = self.call(runs.create, self.client, key, write)
                if not deleted:
                    self.call(runs.perform, self.client, run_id, write)
            except UserError:
                self._check_active(self.call(self.client.get_experiment, experiment_id))
                if not run_id or not (deleted := runs.is_deleted(self.client, run_id)):
                    raise
                log.warning("Run %s was deleted in MLflow; its further records are dropped", name)

        return put

    def runs(self, experiment: str, *, deleted: bool = False, **tags: str) -> list[Run]:
        """Deliver what waits, and return the runs with some tags, in the order of the plan.

        With `deleted`, those that were deleted in MLflow too.
        Runs without a place in the plan, and those with the same one, come in the order of start.
        """
        self.deliver()
        among = self.find(experiment)
        terms = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        if among is None:
            return []
        view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
        search = partial(self.call, self.client.search_runs, [among.experiment_id], terms, view)
        page = search(order_by=START)
        found = [*map(_run, page)]
        while page.token:
            page = search(order_by=START, page_token=page.token)
            found += map(_run, page)
        return sorted(found, key=lambda run: run.tags.get("place", "").rjust(9))

    def close(
        self, experiment: str, keys: Iterable[str], reason: str, status: str = "KILLED"
    ) -> None:
        """End the runs with these keys that are RUNNING or FINISHED, with the reason as a tag.

        It may be repeated; keys of which no run was made are passed over.
        """
        closing = set(keys)
        for run in self.runs(experiment) if closing else ():
            if run.key in closing and run.status in ("RUNNING", "FINISHED"):
                self.tag(run.run_id, "reason", reason)
                self.call(self.client.set_terminated, run.run_id, status)

    def tag(self, run_id: str, name: str, value: str) -> None:
        """Set a tag of a run."""
        self.call(self.client.set_tag, run_id, name, value)

    def undelivered(self) -> set[str]:
        """Return the keys of runs on this disk that the server does not have whole."""
        return set() if self.spool is None else self.spool.undelivered()

    def complete(self) -> set[str]:
        """Return the keys of runs whose end is on this disk."""
        return set() if self.spool is None else self.spool.complete()

    def deliver(
        self, keys: Iterable[str] | None = None, *, wait_while_answering: bool = False
    ) -> None:
        """Wait until the server has all that was written of some runs, None for this process's.

        A server that does not answer for PATIENCE seconds, or refuses a run, is an error. With
        `wait_while_answering` this returns at once where the server is away.
        """
        if self.spool is not None:
            wanted = None if keys is None else set(keys)
            self.spool.deliver(wanted, wait_while_answering=wait_while_answering)

    def run(self, run: str) -> Run:
        """Return a run by its id or key."""
        try:
            return _run(self.call(self.client.get_run, run))
        except UserError as error:
            if status(error.__cause__) not in (400, 404):
                raise
            ids = [each.experiment_id for each in self.call(self.client.search_experiments)]
            if found := self.call(self.client.search_runs, ids, f"tags.{KEY} = '{run}'"):
                return _run(found[0])
            raise UserError(
                f"run {run!r} is not in {addresses.without_secrets(self.uri)}; its page in MLflow "
                "shows the id, and --tracking-uri names another store"
            ) from error

    def fetch(self, run_id: str, path: str, folder: str) -> Path:
        """Download a file or folder of a run's artifacts, and return where it is.

        Repeated if the run lists it: MLflow 3.17.2 calls it missing if the server goes away.
        """
        end = time.monotonic() + PATIENCE
        above = path.rpartition("/")[0] or None
        while True:
            try:
                return Path(self._artifacts(run_id)(path, folder))
            except Exception as error:  # the file system's, a server's, MLflow's
                names = self.call(self.client.list_artifacts, run_id, above) if self.spool else []
                if path not in [file.path for file in names] or time.monotonic() > end:
                    raise UserError(
                        f"{path} of run {run_id} cannot be read ({addresses.reason(error)})"
                    ) from error
            time.sleep(1)

    def _artifacts(self, run_id: str) -> Callable[[str, str], str]:
        info = None if self.spool else self.client.get_run(run_id).info
        moved = artifacts.moved(info.artifact_uri, self.home) if info else None
        if moved is None:
            return partial(self.client.download_artifacts, run_id)
        uri = json.dumps(self.uri, ensure_ascii=False)
        command = f"from harness.tracking.artifacts import rebase; print(rebase({uri}))"
        _warn(
            f"{self.home} was moved or copied from {moved[0]}; its artifacts are read here, and "
            f"`mlflow ui` shows them after: python -c {shlex.quote(command)}"
        )
        return LocalArtifactRepository(moved[1].as_uri()).download_artifacts

    def history(self, run_id: str) -> list[Logged]:
        """Return every logged value of a run, metric by metric."""
        metrics = self.call(self.client.get_run, run_id).data.metrics
        return [
            Logged(metric, entry.step, _number(run_id, metric, entry.value))
            for metric in sorted(metrics)
            for entry in self.call(self.client.get_metric_history, run_id, metric)
        ]

    def histories(self, run_ids: Sequence[str], metric: str) -> list[Epoch]:
        """Return one metric of some runs, run by run and epoch by epoch; [] where none has it.

        Of kept weights (`keep="best"`) the value at the end follows, a step after the last epoch.
        """
        one = partial(self.call, self.client.get_metric_history, key=metric)
        with ThreadPoolExecutor(8) as pool:
            found = [{entry.step: entry.value for entry in each} for each in pool.map(one, run_ids)]
        return [
            Epoch(run_id, step, _number(run_id, metric, values[step]))
            for run_id, values in zip(run_ids, found, strict=True)
            for step in sorted(values)
        ]

    def record(self, run: str, *, trust: bool | None = None) -> Record:
        """Return all that is needed to train a finished run again, by its id or key.

        Its own networks, terms and metrics are registered from their stored source, if `trust`
        allows it (`registry.restore`).
        """
        found = self.run(run)
        role = found.tags.get("role")
        if role != "run":
            kind = f"a {role}" if role else "no run of this harness"
            raise UserError(f"run {run} is {kind}; give a run of a configuration and a seed")
        if found.status != "FINISHED":
            raise UserError(f"run {run} is {found.status}; only a FINISHED run can be compared")
        with tempfile.TemporaryDirectory() as folder:
            saved, file = (self.fetch(found.run_id, f, folder) for f in (CONFIG, PROVENANCE))
            with reading(f"{PROVENANCE} of run {run}"):
                made = json.loads(file.read_text("utf-8"))
                for field, of in runs.FIELDS.items():
                    if not isinstance(value := reduce(getitem, field.split(), made), of):
                        raise UserError(f"{field} is {value!r}, no {of.__name__}")
                parts = {part: part.partition(" ")[::2] for part in made.get("parts", {})}
                known = {part: pair for part, pair in parts.items() if pair[0] in registry.TAKEN}
            for part, (kind, name) in known.items():
                file = self.fetch(found.run_id, part_file(part), folder)
                text = file.read_text("utf-8", errors="replace")
                registry.restore(kind, name, text, trusting(trust=trust))
            with reading(f"{CONFIG} of run {run}"):
                config = RunConfig.from_json(saved.read_text("utf-8"))
            threads = int(found.params.get("threads_per_run", 1))
        return Record(found.run_id, found.name, config, made, self.history(found.run_id), threads)

    def bytes_of_an_epoch(self) -> float:
        """Return by how much each epoch that was trained has made the database longer."""
        file = addresses.sqlite_file(self.uri)
        assert file is not None  # a server has none here
        query = "select count(*) from metrics where key = 'progress/epoch_seconds'"
        engine = sqlalchemy.create_engine(schema.read_only(file), poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            epochs = connection.exec_driver_sql(query).scalar_one()
        return max(0, file.stat().st_size - len(_empty_database())) / max(1, epochs)

    def call(self, call: Callable[..., Any], *values: object, **named: object) -> Any:  # noqa: ANN401
        """Make a call of MLflow that can be repeated, for PATIENCE seconds if a server is away."""
        return _call(self.uri, PATIENCE, partial(call, *values, **named), call.__name__)


def trusting(*, trust: bool | None) -> Callable[[str], bool]:
    """Return what decides whether stored code is executed; for None the answer on a terminal."""

    def decide(code: str) -> bool:
        if trust is None and sys.stdin is not None and sys.stdin.isatty():
            print(f"{printable(code)} Execute it? [y/N] ", end="", file=sys.stderr, flush=True)
            return sys.stdin.readline().strip().lower() in ("y", "yes")
        return bool(trust)

    return decide


def _call(uri: str, patience: float, call: Callable[[], Any], name: str) -> Any:  # noqa: ANN401
    server, begun = addresses.is_server(uri), time.monotonic()
    failures = (MlflowException, requests.RequestException if server else OSError)
    while True:
        try:
            return call()
        except failures as error:
            waited = time.monotonic() - begun
            if not server and addresses.trouble(error):
                if not addresses.is_locked(error) or waited >= addresses.DATABASE_PATIENCE:
                    raise addresses.unusable(uri, "--tracking-uri", error) from error
            elif not server or status(error) in REFUSALS:
                raise refused(uri, name, error) from error
            elif waited >= patience:
                raise UserError(
                    f"--tracking-uri {uri} does not answer ({root_reason(error)}); the same "
                    "command goes on once its MLflow server is back"
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
    metrics = {name: _number(info.run_id, name, value) for name, value in data.metrics.items()}
    named = info.run_id, info.run_name, info.status
    return Run(*named, data.params, metrics, data.tags, info.artifact_uri)


def _number(run_id: str, metric: str, value: float) -> float:
    with reading(f"metric {metric!r} of run {run_id}"):
        return float(value)  # SQLite keeps a text, too


_servers: dict[tuple[int, str], Store] = {}  # by process and address: one spool each


def connect(
    uri: str | None = None, *, write: bool = True, deliver: bool = True, patience: float = 0
) -> Store:
    """Open a tracking store, creating a database that does not exist.

    No URI means MLFLOW_TRACKING_URI or `mlflow.db` in the repository. Without `write` a database
    must exist; no file is made and no permission to write needed. Without `deliver` a server gets
    no records of ended processes, and no log of a run either. A server that does not answer is
    waited for as many seconds as `patience`.
    """
    uri = addresses.tracking_address(uri)
    if addresses.is_server(uri):
        if (os.getpid(), uri) not in _servers:
            client, root = MlflowClient(uri), addresses.project_root()
            _call(uri, patience, client.search_experiments, "a request")
            if not deliver:
                return Store(client, uri, root)
            folder = root / "cache" / "spool" / re.sub(r"[^\w.-]+", "_", uri)
            store = Store(client, uri, root, Spool(folder, uri, client))
            _servers.setdefault((os.getpid(), uri), store)
        return _servers[os.getpid(), uri]
    schema.check_database(uri, "--tracking-uri", write=write)
    database = addresses.sqlite_file(uri)
    try:
        assert database is not None  # as `tracking_address` has checked
        if not write:
            return Store(_reader(database), uri, database.parent)
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{database}.lock"):  # creating the tables twice breaks them
            if addresses.is_new(uri):
                new = database.with_name(f".{database.name}.{os.getpid()}.new")
                new.write_bytes(_empty_database())
                new.replace(database)  # whole or not at all, even after a kill
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("pragma journal_mode=WAL")  # halves the cost of a write
            _written.add(os.path.realpath(database))
            return Store(_client(uri), uri, database.parent)
    except Exception as error:  # any driver's: SQLAlchemy's, MLflow's
        raise addresses.unusable(uri, "--tracking-uri", error) from error


@cache
def _empty_database() -> bytes:
    """Return an empty database of MLflow, made in memory: 300 commits to a disk take seconds."""
    address = f"file:{os.urandom(8).hex()}?mode=memory&cache=shared"
    with closing(sqlite3.connect(address, uri=True)) as connection, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLAlchemy's about the pool of such an address
        connection.execute(f"pragma page_size={PAGE}")
        _client(f"sqlite:///{address}&uri=true")
        return connection.serialize()


def _client(uri: str) -> MlflowClient:
    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def _reader(database: Path) -> MlflowClient:
    # One connection a call: if one that reads stays open, a writer that ends leaves its log behind.
    pool = "MLFLOW_SQLALCHEMYSTORE_POOLCLASS"
    before, os.environ[pool] = os.environ.get(pool, ""), "NullPool"
    try:
        return _client(schema.read_only(database))
    finally:
        os.environ[pool] = before
