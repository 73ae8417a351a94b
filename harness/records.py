"""A finished run read back whole: its configuration, its provenance, every value it logged."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness.config import RunConfig, UserError
from harness.places import reason, sqlite_file, tracking_address, without_password
from harness.stores import answering
from harness.tracking import Store, connect

PROVENANCE, DIFF = "provenance.json", "provenance/diff.patch"
"""Artifacts of every run: what it was made with, and the changed files of a dirty tree."""

NEEDED: Mapping[str, tuple[type, ...]] = {
    "study": (str, type(None)),
    "device.kind": (str,),
    "threads.blas": (int,),
    "code.commit": (str,),
    "code.dirty": (bool, type(None)),
    "code.sources": (str,),
    "code.untracked": (list,),
    "versions": (dict,),
    "platform": (str,),
    "dataset.name": (str,),
    "dataset.digest": (str,),
    "dataset.images.train": (int,),
    "dataset.image_shape": (list,),
}
"""What a provenance must hold so that its run can be repeated."""


class Logged(NamedTuple):
    """A value as it stands in MLflow; `step` is the epoch."""

    metric: str
    step: int
    value: float


@dataclass(frozen=True)
class Record:
    """All that is known of a finished run.

    Attributes:
        run_id: its id.
        name: as the run table shows it.
        config: its settings.
        made_with: its `harness.provenance`, and the page of its study.
        values: every logged value of every metric.
    """

    run_id: str
    name: str
    config: RunConfig
    made_with: dict[str, Any] = field(repr=False)
    values: list[Logged] = field(repr=False)


def open_existing(uri: str | None = None) -> Store:
    """Open a tracking store that is there already.

    Raises:
        UserError: it is not there, or cannot be opened.
    """
    uri = tracking_address(uri)
    database = sqlite_file(uri)
    if database is not None and not database.exists():
        raise UserError(
            f"{without_password(uri)} does not exist; name the store of the run with --tracking-uri"
        )
    return connect(uri)


def read_record(store: Store, run_id: str) -> Record:
    """Read the record of a finished run.

    Raises:
        UserError: there is no such run, it is a summary or did not finish, or it lacks its
            provenance or its configuration, or has two configurations.
    """
    try:
        with answering(store):
            run = store.client.get_run(run_id)
    except Exception as error:  # any store's: MLflow's, a server's, a driver's
        if not _is_unknown(error):
            if isinstance(error, UserError):
                raise
            where = without_password(store.uri)
            raise UserError(f"{where} cannot be read ({reason(error)})") from error
        raise UserError(
            f"run {run_id!r} is not in {without_password(store.uri)}; its page in MLflow shows the "
            "id, and --tracking-uri names another store"
        ) from error
    role, status = run.data.tags.get("role"), run.info.status
    if role != "run":
        kind = f"a {role}" if role else "no run of this harness"
        raise UserError(f"run {run_id} is {kind}; give a run of a configuration and a seed")
    if status != "FINISHED":
        raise UserError(f"run {run_id} is {status}; only a FINISHED run can be compared")
    made_with = read_json(store, run_id, PROVENANCE)
    _check_provenance(made_with, run_id)
    config = RunConfig.from_json(read_text(store, run_id, "model/config.json"))
    for name, value in asdict(config).items():
        logged = run.data.params.get(name, str(value))  # a run of an earlier version may lack it
        if logged != str(value):
            raise UserError(
                f"run {run_id} contradicts itself: {name} is {logged} among its parameters and "
                f"{value} in its model"
            )
    with answering(store):
        values = [
            Logged(metric, entry.step, entry.value)
            for metric in sorted(run.data.metrics)
            for entry in store.client.get_metric_history(run_id, metric)
        ]
    return Record(run_id, run.info.run_name, config, made_with, values)


def _is_unknown(error: BaseException) -> bool:
    """Say whether MLflow, or a server behind a `UserError`, answered that there is no such run."""
    answered = error.__cause__ if isinstance(error, UserError) else error
    code = getattr(answered, "error_code", "")
    return code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _check_provenance(made_with: dict[str, Any], run_id: str) -> None:
    for path, kinds in NEEDED.items():
        found: Any = made_with
        for name in path.split("."):
            found = found.get(name, ...) if isinstance(found, dict) else ...
        if not isinstance(found, kinds):
            raise UserError(f"{PROVENANCE} of run {run_id} lacks {path}; it cannot be repeated")


def read_json(store: Store, run_id: str, file: str) -> dict[str, Any]:
    """Read an artifact of a run that holds a JSON object.

    Raises:
        UserError: as `read_text`, or it is not JSON.
    """
    try:
        found = json.loads(read_text(store, run_id, file))
    except (ValueError, RecursionError) as error:  # also brackets without end
        raise UserError(f"{file} of run {run_id} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} of run {run_id} is no JSON object; it cannot be repeated")
    return found


def read_text(store: Store, run_id: str, file: str) -> str:
    """Read an artifact of a run as text.

    Raises:
        UserError: the run has no such artifact, or it cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = store.client.download_artifacts(run_id, file, folder)
            return Path(path).read_text(encoding="utf-8")
        except Exception as error:  # any store's: the file system's, a server's, MLflow's
            raise UserError(
                f"run {run_id} has no record to repeat it from: {file} cannot be read "
                f"({reason(error)}); older versions of the harness wrote none"
            ) from error
