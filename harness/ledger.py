"""True statuses: close the runs that an interrupted or dead process has left open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from harness.config import UserError
from harness.places import alive, own_process
from harness.stores import Store, answering
from harness.tracking import close_run, read_runs

GONE = "its process is gone"
SILENT = "its process was silent too long while it wrote it"


def interruption(error: BaseException) -> tuple[str, str]:
    """Return the status of a run that an exception ends, and the reason in words."""
    if isinstance(error, SystemExit):
        return "KILLED", f"its process ended with exit code {error.code}"
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", str(error) or "stopped by Ctrl-C"
    return "FAILED", repr(error)


def end_own_runs(store: Store, experiment_id: str, status: str, reason: str) -> None:
    """Close every run that this process has left open in an experiment, with the reason as a tag.

    They are looked up, since an interruption can fall between a run's creation and its return. On
    a server that does not answer the next start ends what is not in the outbox.
    """
    if not store.writer.end_open(status, reason):
        return
    own = " and ".join(f"tags.{name} = '{value}'" for name, value in own_process().items())
    with contextlib.suppress(UserError), answering(store):
        for run in store.client.search_runs([experiment_id], f"{own} and status = 'RUNNING'"):
            close_run(store, run.info.run_id, status, reason)


def has_ended(run: Mapping[str, Any]) -> bool:
    """Say whether a run of `read_runs` has said what it can: it finished, or it diverged."""
    return run["status"] == "FINISHED" or has_diverged(run)


def has_diverged(run: Mapping[str, Any]) -> bool:
    """Say whether a run of `read_runs` diverged."""
    return run["status"] == "FAILED" and run["tags"].get("reason", "").startswith("diverged")


def bury_runs(
    store: Store,
    experiment: str,
    study: str,
    trials: Iterable[object],
    reason: str = GONE,
) -> None:
    """Close every run of trials that are repeated, as KILLED even where it has ended.

    What failed for a reason of its own, or was killed, counts for nothing and keeps that reason.
    """
    dead = {str(number) for number in trials}
    for run in read_runs(store, experiment, f"tags.study = '{study}'"):
        if run["tags"].get("trial") in dead and (run["status"] == "RUNNING" or has_ended(run)):
            close_run(store, run["run_id"], "KILLED", reason)


def bury_summaries(store: Store, experiment: str, study: str, *, own: bool) -> list[dict[str, Any]]:
    """Close the summaries that a dead process has left open, and this one's own if they are void.

    Returns:
        The finished ones that are left, oldest first.
    """
    mine = own_process().items()
    finished = []
    for run in read_runs(store, experiment, f"tags.study = '{study}' and tags.role = 'summary'"):
        if run["status"] == "RUNNING":
            close_run(store, run["run_id"], "KILLED", GONE)
        elif run["status"] == "FINISHED":
            if own and mine <= run["tags"].items():
                close_run(store, run["run_id"], "KILLED", SILENT)
            else:
                finished.append(run)
    return finished


def bury_open_runs(store: Store, experiment: str, study: str) -> None:
    """Close every run of a study that a dead process has left open.

    Raises:
        UserError: a living process of this machine is writing some of them.
    """
    mine = f"tags.study = '{study}' and attributes.status = 'RUNNING'"
    left_open = read_runs(store, experiment, mine)
    for run in left_open:
        tags = run["tags"]
        if tags["host"] == own_process()["host"] and alive(int(tags["process"])):
            raise UserError(
                f"study {study!r} is being run by process {tags['process']} on this machine; "
                "wait for it, stop it, or start another with --study-name"
            )
    for run in left_open:
        close_run(store, run["run_id"], "KILLED", GONE)
