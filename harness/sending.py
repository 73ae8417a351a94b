"""Single writes to MLflow: which call each kind is, and whether a failure may pass.

Every write may be delivered twice without a trace: a run is found again by its key, MLflow keeps
one of two equal metric values, parameters, tags and inputs, files have names of their own, and a
run that ends twice has ended.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from harness.config import UserError
from harness.journal import Write
from harness.outbox import Unavailable
from harness.places import environment, reason, without_password

KEY = "run_key"
"""Tag of the runs on a server by which one is found whose creation was not answered."""

AT_ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""How MLflow asks while a training waits: once, and for seconds."""

PATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
"""How it asks for what cannot be done later, where its own way takes minutes."""

STATED = re.compile(r"failed with error code (\d{3})")
"""An answer's code in the text of an error of which MLflow makes an internal error."""


ANSWERED = re.compile(r"too many (\d{3}) error responses")
"""The same where MLflow asks again for some codes."""


def unless_set(values: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that the user has not set."""
    return {name: value for name, value in values.items() if name not in os.environ}


def may_pass(error: Exception) -> bool:
    """Say whether a server's error may pass: no answer, 408, 429 or 5xx, but no other 4xx."""
    stated = STATED.search(str(error))
    if isinstance(error, requests.HTTPError) and error.response is not None:
        code = error.response.status_code
    elif isinstance(error, MlflowException):
        code = int(stated[1]) if stated else error.get_http_status_code()
    else:
        return isinstance(error, requests.RequestException)
    return code >= 500 or code in (408, 429)


def shortly(error: BaseException) -> str:
    """Say why a server did not answer: the code it sent, or what lies behind all wrappings."""
    answer = ANSWERED.search(str(error))
    if answer:
        return f"error {answer[1]}"
    while inner := _inside(error):
        error = inner
    said = error.strerror if isinstance(error, OSError) else None
    return said.lower() if said else reason(error)


def _inside(error: BaseException) -> BaseException | None:
    held = (*error.args, getattr(error, "reason", None), error.__cause__, error.__context__)
    return next((inner for inner in held if isinstance(inner, BaseException)), None)


class Direct:
    """Writes to a store in a file, where nothing ever waits."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._run_ids: dict[str, str] = {}

    def put(self, write: Write) -> None:
        """Write at once."""
        known = self._run_ids.get(write.run)
        self._run_ids[write.run] = perform(self._client, write, known)

    def run_id(self, key: str) -> str:
        """Return the id of a run."""
        return self._run_ids[key]

    known = run_id

    def end_open(self, status: str, reason: str) -> bool:
        """Leave open runs to who looks them up; says that nothing waits."""
        return True

    def settle(self) -> None:
        """Return, since nothing waits."""


class ServerSender:
    """Delivers single writes to a server: `outbox.Sender`."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client, self._uri = client, uri

    def send(self, write: Write, run_id: str | None, *, again: bool) -> str:
        """Deliver a write and return the run's id."""
        return self._asked(lambda: self._send(write, run_id, again=again), write.run)

    def _send(self, write: Write, run_id: str | None, *, again: bool) -> str:
        if run_id is None and again:
            run_id = min(self._same(write.experiment, write.run), default=None)
        if write.kind != "create":
            return perform(self._client, write, run_id)
        if run_id is not None:
            return run_id
        tags = {**write.values["tags"], KEY: write.run}
        return create(self._client, write.experiment, {**write.values, "tags": tags})

    def remove_others(self, experiment: str, key: str, run_id: str) -> None:
        """Delete the runs with a key but the one with the given id."""

        def remove() -> None:
            for other in self._same(experiment, key):
                if other != run_id:
                    self._client.delete_run(other)

        self._asked(remove, key)

    def _same(self, experiment: str, key: str) -> list[str]:
        runs = self._client.search_runs([experiment], f"tags.{KEY} = '{key}'")
        return [run.info.run_id for run in runs]

    def _asked(self, call: Callable[[], Any], key: str) -> Any:  # noqa: ANN401 - the call's result
        try:
            with environment(unless_set(AT_ONCE)):
                return call()
        except (MlflowException, requests.RequestException) as error:
            if may_pass(error):
                raise Unavailable(shortly(error)) from error
            raise refused(self._uri, f"to write run {key}", error) from error


def refused(uri: str, what: str, error: Exception) -> UserError:
    """Return what a user is told of a server that says no."""
    return UserError(
        f"the MLflow server at {without_password(uri)} refuses {what} ({reason(error)}); look "
        "whether the run, its experiment and your rights are still there"
    )


def perform(client: MlflowClient, write: Write, run_id: str | None) -> str:
    """Make the call of a write and return the run's id; a key in its tags becomes that id."""
    if write.kind == "create":
        return create(client, write.experiment, write.values)
    if run_id is None:
        raise UserError(f"run {write.run} is no longer in MLflow; its records have no place")
    values = write.values
    if write.kind == "batch":
        client.log_batch(
            run_id,
            metrics=[Metric(*metric) for metric in values["metrics"]],
            params=[Param(name, value) for name, value in values["params"].items()],
            tags=[RunTag(k, v.replace(write.run, run_id)) for k, v in values["tags"].items()],
        )
    elif write.kind == "tag":
        client.set_tag(run_id, values["name"], values["value"])
    elif write.kind == "input":
        entity = DatasetEntity(**values)
        context = InputTag("mlflow.data.context", "training")
        client.log_inputs(run_id, datasets=[DatasetInput(entity, [context])])
    elif write.kind == "files":
        client.log_artifacts(run_id, str(write.folder), values["path"])
    else:
        client.set_terminated(run_id, values["status"], values["time"])
    return run_id


def create(client: MlflowClient, experiment: str, values: Mapping[str, Any]) -> str:
    """Create a run from its name, tags and time and return its id."""
    run = client.create_run(experiment, values["time"], values["tags"], values["name"])
    return run.info.run_id
