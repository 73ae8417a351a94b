"""Which studies does a store hold, what did they find, and which command comes next?

`list` names the studies, `best STUDY` shows what one found, `next STUDY` prints the command that
would tell more or, of a study that is not finished, the one that continues it. Nothing is trained.
`remove STUDY` removes one for good, with all that it wrote, after a question.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from analysis import frames
from harness.config import UserError, checked_name
from harness.tracking.addresses import without_secrets
from studies.runner import stopping
from studies.runner.cli import clear_errors, read
from studies.runner.terminal import ANSWERED, Terminal, counted, reports, size, stored

if TYPE_CHECKING:
    from harness.tracking.runs import Run
    from harness.tracking.store import Store

log = logging.getLogger(__name__)

LISTED = ("study", "dataset", "finished_runs", "status", "best", "date", "report")


@dataclass(frozen=True)
class RunsOptions:
    """Options of all commands.

    Attributes:
        command: list, best, next or remove.
        study: name of a study, as list shows it.
        tracking_uri: where the studies are (MLFLOW_TRACKING_URI, or mlflow.db in the repository).
        storage: where Optuna has their trials (optuna.db in the repository).
        yes: remove without a question.
        json: print one JSON object, and all else on standard error.
    """

    command: Annotated[Literal["list", "best", "next", "remove"], tyro.conf.Positional]
    study: Annotated[str | None, tyro.conf.Positional] = None
    tracking_uri: str | None = None
    storage: str | None = None
    yes: bool = False
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
        if name is not None and options.command == "remove":
            remove(store, checked_name(name, "STUDY"), options, terminal)
            return
        found = studies(store, name and checked_name(name, "STUDY"))
        if name and not found:
            frames.load_study(name, tracking_uri=store.uri)  # raises, and names those there are
        for study in found:
            if study["next_command"].startswith("python "):
                study["next_command"] = _here(study["next_command"], options)
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
        found["next_command"] = newest.data.tags.get("command", "")
    began = datetime.fromtimestamp(newest.info.start_time / 1000, UTC)
    return found | {
        **{"study": name, "dataset": newest.data.params.get("dataset", "")},
        **{"status": "unfinished" if is_left else "finished", "finished_runs": len(finished)},
        "date": began.isoformat(" ", "minutes"),
    }


def _here(command: str, options: RunsOptions) -> str:
    # On the given stores, which may have moved.
    given = {"--tracking-uri": options.tracking_uri, "--storage": options.storage}
    for option, value in given.items():
        if value:
            words = [*shlex.split(command), option]
            place = words.index(option)
            command = shlex.join([*words[: place + 1], value, *words[place + 2 : -1]])
    return command


def remove(store: Store, name: str, options: RunsOptions, terminal: Terminal) -> None:
    """Remove a study for good, after a question: from MLflow, Optuna and the disk."""
    from harness.tracking import connect, removal  # they load MLflow
    from studies.runner import queue  # Optuna

    trials = queue.Stored(options.storage, name)
    found = removal.runs_of(store, name)
    runs = [run for of in found.values() for run in of]
    if not runs and not trials.names:
        frames.load_study(name, tracking_uri=store.uri)  # raises, and names those there are
    trials.check_ended()
    for run in runs:  # if the trials are elsewhere
        here = run.tags.get("host") == socket.gethostname()
        is_gone = here and not Path(f"/proc/{run.tags.get('process')}").exists()
        if run.status == "RUNNING" and not trials.names and not is_gone:
            way = f"end it, or give its --storage ({trials.where} does not have the study)"
            raise UserError(f"run {run.run_id} of study {name!r} is RUNNING; {way}")
    ids, known = {run.run_id for run in runs}, reports(store.home, name)
    written = [removal.folder(store, run.artifacts, run.run_id) for run in runs]
    folders = [folder for folder, of in known.items() if not ids.isdisjoint(of)]
    caches = (store.home / "cache" / part / name for part in ("checkpoints", "workers"))
    folders += [folder for folder in caches if folder.exists()]
    artifacts = f" with {size(*written)} of artifacts" * (store.spool is None)
    shown = [f"{counted(len(runs), 'run')}{artifacts} in {without_secrets(store.uri)}"]
    shown += [f"trials in {trials.where}"] * bool(trials.names)
    shown += [f"{folder} ({size(folder)})" for folder in folders]
    terminal.line(f"Study {name!r}: {', '.join(shown)}")
    if not options.yes:
        terminal.out.print("Remove all of it for good? [y/N] ", end="")
        answer = sys.stdin.readline().strip() if sys.stdin else ""
        stopping.check()
        if answer != "y":
            raise UserError(f"nothing was removed: the answer is {answer!r}, not 'y'")
    trials.delete()
    for folder in folders:
        # Last the file by which the same command, repeated after a kill, finds the folder.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "summary.json"):
            (shutil.rmtree if path.is_dir() else Path.unlink)(path)
        folder.rmdir()
    (store.home / "reports" / f"{name}.lock").unlink(missing_ok=True)
    way = removal.remove(connect(store.uri), name, found)
    terminal.line(way or "Removed.")
    dataset = next((run.params["dataset"] for run in runs if "dataset" in run.params), "")
    terminal.studies = [{"study": name, "dataset": dataset, "status": "removed"}]


if __name__ == "__main__":
    main()
