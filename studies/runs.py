"""Which studies does a store hold, what did they find, and which command comes next?

`list` names the studies, `best STUDY` shows what one found, `next STUDY` prints the command that
would tell more or, of a study that is not finished, the one that continues it. Nothing is trained.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from analysis import frames
from harness.config import UserError, checked_name
from studies.runner.cli import clear_errors, read
from studies.runner.terminal import ANSWERED, counted, stored

if TYPE_CHECKING:
    from harness.tracking.runs import Run
    from harness.tracking.store import Store

log = logging.getLogger(__name__)

UNKNOWN = "the command that started it"  # of runs of an earlier version, which do not have it
LISTED = ("study", "dataset", "finished_runs", "status", "best", "date", "report")


@dataclass(frozen=True)
class RunsOptions:
    """Options of all commands.

    Attributes:
        command: list, best or next.
        study: name of a study, as list shows it.
        tracking_uri: where the studies are (MLFLOW_TRACKING_URI, or mlflow.db in the repository).
        json: print one JSON object, and all else on standard error.
    """

    command: Annotated[Literal["list", "best", "next"], tyro.conf.Positional]
    study: Annotated[str | None, tyro.conf.Positional] = None
    tracking_uri: str | None = None
    json: bool = False


def main(args: Sequence[str] | None = None) -> None:
    """Answer from a store; exit code 0, or 2 for bad input and a study without an answer."""
    with clear_errors(args, "Stopped.") as terminal:
        options = read(RunsOptions, "runs", __doc__ or "", args)
        name = options.study
        if (options.command == "list") != (name is None):
            raise UserError(f"{options.command}: {'leave STUDY out' if name else 'name a STUDY'}")
        from harness.tracking import connect  # it loads MLflow, which --help does not need

        store = connect(options.tracking_uri, write=False)
        found = studies(store, name and checked_name(name, "STUDY"))
        if name and not found:
            frames.load_study(name, tracking_uri=store.uri)  # raises, and names those there are
        for study in found:
            if options.tracking_uri and study["next_command"].startswith("python "):
                study["next_command"] = _here(study["next_command"], options.tracking_uri)
        terminal.studies, terminal.several = found, name is None
        if name is None:
            terminal.studies = [{field: study[field] for field in LISTED} for study in found]
            for study in found:
                runs = counted(study["finished_runs"], "finished run")
                best = f"best {json.dumps(study['best'])}, {study['date'][:16]}"
                terminal.line(f"{study['study']}: {study['status']}, {best}")
                terminal.line(f"  {study['dataset']}, {runs}, {study['report'] or 'no report'}")
        elif options.command == "next":
            terminal.line(found[0]["next_command"] or "No further command is suggested.")
        else:
            not_finished = f"study {name!r} is not finished: {found[0]['next_command']}"
            if found[0]["summary_run_id"] is None:
                raise UserError(not_finished)
            if found[0]["status"] == "unfinished":  # it has grown
                log.warning("%s", not_finished)
            terminal.show(found[0])


def studies(store: Store, name: str | None = None) -> list[dict[str, Any]]:
    """Return one or all studies of a store, each as `stored` returns it, finished or not."""
    tags: dict[str, Any] = {"study": name} if name else {}
    found: dict[str, tuple[str, list[Run]]] = {}
    for experiment in store.call(store.client.search_experiments):
        for run in store.runs(experiment.name, **tags):
            if "study" in run.tags and "role" in run.tags:
                found.setdefault(run.tags["study"], (experiment.experiment_id, []))[1].append(run)
    trained = [s for s, (_, runs) in found.items() if any(r.tags["role"] == "run" for r in runs)]
    return [_study(store, each, *found[each]) for each in sorted(trained)]


def _study(store: Store, name: str, experiment_id: str, runs: Sequence[Run]) -> dict[str, Any]:
    ended = [run for run in runs if run.status == "FINISHED"]
    finished = {run.run_id for run in ended if run.tags["role"] == "run"}
    summaries = [run.run_id for run in ended if run.tags["role"] == "summary"]
    found: dict[str, Any] = {**ANSWERED, "summary_run_id": None, "report": None, "table": []}
    if summaries:
        try:
            found = stored(store, summaries[-1])
        except UserError as error:  # its artifacts were removed
            log.warning("Study %s: %s", name, error)
    is_left = any(run.status == "RUNNING" for run in runs) or not summaries
    is_left |= not finished <= {*(found["run_ids"] or finished)}
    of_study, order = f"tags.study = '{name}' and tags.role = 'run'", ["attributes.start_time DESC"]
    newest = store.call(store.client.search_runs, [experiment_id], of_study, 1, 1, order)[0]
    if is_left:
        found["next_command"] = newest.data.tags.get("command") or UNKNOWN
    began = datetime.fromtimestamp(newest.info.start_time / 1000, UTC)
    return found | {
        **{"study": name, "dataset": newest.data.params.get("dataset", "")},
        **{"status": "unfinished" if is_left else "finished", "finished_runs": len(finished)},
        "date": began.isoformat(" ", "minutes"),
    }


def _here(command: str, tracking_uri: str) -> str:
    # On the given store, which may have moved.
    words = [*shlex.split(command), "--tracking-uri"]
    place = words.index("--tracking-uri")
    return shlex.join([*words[: place + 1], tracking_uri, *words[place + 2 : -1]])


if __name__ == "__main__":
    main()
