"""True statuses: close the runs that an interrupted or dead process has left open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness.config import UserError
from harness.places import alive, own_process
from harness.tracking import Store, read_runs


def end_own_runs(store: Store, experiment_id: str, status: str, reason: str) -> None:
    """Close every run that this process has left open in an experiment, with the reason as a tag.

    They are looked up, since an interruption can fall between a run's creation and its return.
    """
    own = " and ".join(f"tags.{name} = '{value}'" for name, value in own_process().items())
    for run in store.client.search_runs([experiment_id], f"{own} and status = 'RUNNING'"):
        store.client.set_tag(run.info.run_id, "reason", reason)
        store.client.set_terminated(run.info.run_id, status)


def bury_runs(
    store: Store,
    experiment: str,
    study: str,
    trials: Iterable[object],
    reason: str = "its process is gone",
) -> None:
    """Close every run of trials that are repeated, as KILLED even where it was finished."""
    dead = {str(number) for number in trials}
    for run in read_runs(store, experiment, f"tags.study = '{study}'"):
        if run["tags"].get("trial") in dead and run["status"] != "KILLED":
            _bury(store, run["run_id"], reason)


def bury_summaries(store: Store, experiment: str, study: str, *, own: bool) -> list[dict[str, Any]]:
    """Close the summaries that a dead process has left open, and this one's own if they are void.

    Returns:
        The finished ones that are left, oldest first.
    """
    mine = own_process().items()
    finished = []
    for run in read_runs(store, experiment, f"tags.study = '{study}' and tags.role = 'summary'"):
        if run["status"] == "RUNNING":
            _bury(store, run["run_id"], "its process is gone")
        elif run["status"] == "FINISHED":
            if own and mine <= run["tags"].items():
                _bury(store, run["run_id"], "its process was silent too long while it wrote it")
            else:
                finished.append(run)
    return finished


def _bury(store: Store, run_id: str, reason: str) -> None:
    store.client.set_tag(run_id, "reason", reason)
    store.client.set_terminated(run_id, "KILLED")


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
        _bury(store, run["run_id"], "its process is gone")
