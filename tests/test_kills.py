"""A study that is killed at any step is finished by the same command, and nothing is lost."""

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from kills import STEPS, begun, count_steps, in_child

from benchmarks import audit, children
from harness import RunConfig, processes, tracking
from harness.data.dataset import Dataset
from harness.tracking import addresses
from harness.tracking.runs import Run
from studies import kl_weight
from studies.runner import cli, database, stopping
from studies.runner.options import Options
from studies.runner.queue import REASSIGNED
from studies.runner.run import run
from studies.runner.study import Plan, make_plan

STUDY = replace(kl_weight.STUDY, figures={})
"""Without figures: they are drawn anew at every start and take most of its time."""

PARTS = 3
"""Parts of the tests of every step, for the processes that test."""


@dataclass(frozen=True)
class Place:
    """A folder with a study's databases, opened by children of this process only.

    Attributes:
        folder: folder of the databases.
        notes: folder of the children's output.
        every: epochs between checkpoints.
        base: settings of the runs.
        storage: URL of Optuna's database, "" for one in the folder.
        server: address of the MLflow server, "" for a database in the folder.
    """

    folder: Path
    notes: Path
    data: Dataset
    every: int = 0
    base: RunConfig = RunConfig(hidden=(16,), latent_size=2)
    name: str | None = None
    storage: str = ""
    server: str = ""

    @property
    def options(self) -> Options:
        """Options of the command line."""
        return Options(
            values=(0.02, 1.0),
            seeds=1,
            settings={"epochs": 2, "batch_size": 16},
            study_name=self.name,
            storage=self.storage or f"sqlite:///{self.folder}/optuna.db",
            tracking_uri=self.server or f"sqlite:///{self.folder}/mlflow.db",
            checkpoint_every=self.every,
        )

    @property
    def plan(self) -> Plan:
        """Plan of the study."""
        return make_plan(replace(STUDY, base=self.base), self.options)

    def start(self) -> pd.DataFrame | None:
        """Run the rest of the study, as its command does; return the table if it has one."""
        torch.set_num_threads(1)  # threads that another test has started do not survive a fork
        os.environ.setdefault(database.BEAT, "1000")  # else slow ones have more steps
        processes.available = lambda: 1  # cheap children; `benchmarks.soak` kills workers
        addresses.project_root = lambda: self.folder
        with cli.clear_errors([]) as shown:
            outcome = run(self.plan, self.data, self.options, shown)
        return None if outcome is None else outcome.table

    def check(self) -> tuple[list[str], Any]:
        """Return the faults of the ledger, and the results."""
        addresses.project_root = lambda: self.folder
        where = self.options
        assert where.tracking_uri is not None
        assert where.storage is not None
        return (
            audit.faults(self.plan, where.tracking_uri, where.storage, [self.folder]),
            audit.results(self.plan, where.tracking_uri),
        )

    def runs(self, **tags: str) -> list[Run]:
        """Return the study's runs."""
        found = tracking.connect(self.options.tracking_uri)
        return found.runs(self.plan.experiment, **tags)

    def empty(self, database: Path) -> None:
        """Remove the study, with an empty database for the next."""
        for file in ("mlflow.db", "optuna.db"):
            for left in self.folder.glob(f"{file}*"):
                left.unlink()
        shutil.copy(database, self.folder / "mlflow.db")


@dataclass(frozen=True)
class Alone:
    """Steps and results of a study that is not killed."""

    steps: list[str]
    table: pd.DataFrame
    results: Any


@pytest.fixture
def place(empty_database: Path, tmp_path: Path, tiny: Dataset) -> Place:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return Place(tmp_path, tmp_path, tiny)


@pytest.fixture(scope="module")
def alone(empty_database: Path, tmp_path_factory: pytest.TempPathFactory, tiny: Dataset) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    place = Place(folder, folder, tiny)
    children.import_all()
    shutil.copy(empty_database, place.folder / "mlflow.db")
    ended = in_child(place.notes, place.start)
    assert ended.code == ended.signal == 0, ended.printed
    steps = begun(place.notes)
    faults, results = in_child(place.notes, place.check).value
    assert faults == []
    assert len(results) == 2
    return Alone(steps, ended.value, results)


def finish(place: Place, alone: Alone) -> None:
    """Start the study once more; assert that it ends, complete and the same to the last bit."""
    ended = in_child(place.notes, place.start)
    assert ended.code == ended.signal == 0, ended.printed
    assert not re.search(r"^(?!Next: ).*--fresh", ended.printed, re.MULTILINE)
    faults, results = in_child(place.notes, place.check).value
    assert faults == [], begun(place.notes)
    assert results == alone.results
    pd.testing.assert_frame_equal(ended.value, alone.table, check_exact=True)


def killed_at(place: Place, step: int, by: int = signal.SIGKILL, among: str = "") -> bool:
    """Start the study and kill it at a step (`in_child`); return whether it was so killed."""
    ended = in_child(place.notes, place.start, step, by, among)
    if ended.code == ended.signal == 0:
        return False
    code = stopping.CODES.get(signal.Signals(by))
    assert (ended.signal, ended.code) in {(by, 0), (0, code)}, ended.printed
    return True


# --- killed, again and again --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stride", [40, 1])
def test_a_study_that_is_killed_again_and_again_gets_done(place, alone, stride):
    kills = next(n for n in count() if not killed_at(place, stride * (n + 1)))
    assert kills * stride > len(alone.steps) / 3
    finish(place, alone)


def test_a_study_that_is_killed_at_random_moments_gets_done(place, alone):
    chance = random.Random(0)
    for _ in range(3):
        child = children.start(place.start, place.notes)
        time.sleep(3 * chance.random())
        child.send(chance.choice((signal.SIGKILL, signal.SIGTERM)))
        child.wait()
        assert not child.left_behind()
    finish(place, alone)


def test_stopped_by_its_user_and_by_a_scheduler_it_gets_done(place, alone):
    # Before the first epoch; in the last or later it would be too late to stop anything.
    middle = alone.steps.index("log_artifacts")  # of the first picture
    for by, code in stopping.CODES.items():
        ended = in_child(place.notes, place.start, middle, by)
        assert ended.code == code
        assert ended.printed.endswith(f"{cli.STOPPED}\n")
    states = in_child(place.notes, lambda: reasons(place)).value
    assert states == {("KILLED", "stopped by SIGINT"): 2, ("KILLED", "stopped by SIGTERM"): 2}
    finish(place, alone)


@pytest.mark.slow
def test_stopped_after_its_last_epoch_it_keeps_its_runs(place, alone):
    noted = alone.steps.index("set_trial_state_values")  # before it, a result is noted
    assert killed_at(place, noted, signal.SIGTERM)
    finished = in_child(place.notes, lambda: finished_runs(place)).value
    assert len(finished) == 2
    finish(place, alone)
    assert in_child(place.notes, lambda: finished_runs(place)).value == finished


def finished_runs(place: Place) -> set[str]:
    """Return the ids of the finished runs of a study."""
    return {run.run_id for run in place.runs(role="run") if run.status == "FINISHED"}


def reasons(place: Place, role: str = "run") -> dict[tuple[str, str | None], int]:
    """Count the runs of a study by status and reason."""
    return Counter((run.status, run.tags.get("reason")) for run in place.runs(role=role))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_study_that_is_killed_at_any_step_gets_done(place, alone, empty_database, part):
    names = {"create_new_study", "_create_new_trial", "set_trial_state_values", "create_run"}
    names |= {"log_batch", "log_artifacts", "set_terminated", "build", "set_trial_user_attr"}
    assert names <= {*alone.steps}
    for step in range(1 + part, len(alone.steps) + 1, PARTS):
        place.empty(empty_database)
        assert killed_at(place, step)
        finish(place, alone)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_the_same_on_postgres(place, alone, empty_database, postgres, part):
    # At the steps of the database, and after each: the others are the same as before.
    (ours,) = (names for owner, names in STEPS if owner is optuna.storages.RDBStorage)
    steps = alone.steps
    chosen = [n for n in range(1, len(steps) + 1) if {*steps[max(0, n - 2) : n]}.intersection(ours)]
    storage = postgres.create(f"kills_{part}")
    for step in chosen[part::PARTS]:
        place.empty(empty_database)
        one = replace(place, storage=storage, name=f"killed-{step}")
        assert killed_at(one, step)
        finish(one, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_append", "_synchronise", "_begin", "rmtree", "log_batch", ""])
def test_the_same_with_an_mlflow_server(place, alone, server, name):
    # The spool's thread runs beside: the n-th step is not the same one every time.
    whole = replace(place, server=server.uri, name="alone")
    finish(whole, alone)
    last = sum(name in ("", step) for step in begun(whole.notes))
    chance = random.Random(name)
    for step in sorted(chance.sample(range(1, last + 1), min(last, 4))):
        one = replace(whole, name=f"killed-{name}-{step}")
        killed_at(one, step, among=name)
        finish(one, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "nth"),
    [("set_trial_state_values", 2), ("set_experiment_tag", 1)],
    ids=["finish", "summary"],
)
def test_a_study_that_is_killed_while_it_clears_up_gets_done(
    place, alone, empty_database, first, nth
):
    # The first kill falls between the ends of two trials, or into the summary; the second at any
    # step until the next run begins.
    for step in count(1):
        place.empty(empty_database)
        assert killed_at(place, nth, among=first)
        killed = killed_at(place, step)
        following = begun(place.notes)[-1]
        finish(place, alone)
        if not killed or following == "log_inputs":
            break


@dataclass(frozen=True)
class Two:
    """Two processes of a study, the first of which has stopped at a step."""

    place: Place
    first: children.Child
    second: children.Child

    def printed(self, text: str) -> None:
        """Wait until the second one has printed a text."""
        while text not in children.printed_in(self.second.folder):
            assert not self.second.ended()
            time.sleep(0.05)

    def finish(self, alone: Alone) -> None:
        """Let both end, which they do well, and check the study."""
        self.first.send(signal.SIGCONT)
        for child in (self.first, self.second):
            ended = child.wait()
            assert ended.code == 0, ended.printed
            assert ended.signal in (0, signal.SIGKILL)
        faults, results = in_child(self.place.notes, self.place.check).value
        assert faults == []
        assert results == alone.results


def two(place: Place, stopped_at: str) -> Two:
    """Start two processes, the second when the first has stopped as a step begins."""
    first, second = place.folder / "first", place.folder / "second"
    for folder in (first, second):
        folder.mkdir()
    stopping = children.start(stopping_at(place, first, stopped_at), first)
    while stopped_at not in begun(first):
        time.sleep(0.05)
    return Two(place, stopping, children.start(place.start, second))


@pytest.mark.slow
def test_a_summary_whose_process_dies_is_written_by_the_one_that_waits_for_it(place, alone):
    pair = two(place, "log_summary")
    pair.printed("waiting for")
    pair.first.send(signal.SIGKILL)
    pair.finish(alone)


@pytest.mark.slow
def test_a_summary_that_is_late_is_discarded(place, alone, monkeypatch):
    monkeypatch.setenv(database.BEAT, "1")
    pair = two(place, "log_summary")
    while not pair.second.ended():
        time.sleep(0.05)
    pair.finish(alone)
    ends = in_child(place.notes, lambda: reasons(place, "summary")).value
    assert ends == {("FINISHED", None): 1, ("KILLED", REASSIGNED): 1}, " ".join(
        begun(pair.first.folder)[-40:]
    )


@pytest.mark.slow
def test_reports_of_one_folder_are_written_one_after_the_other(place, alone):
    in_child(place.notes, place.start)  # the others write the report once more
    pair = two(place, "build")
    pair.printed("reading the runs back from MLflow")
    time.sleep(1)
    assert "drawing" not in children.printed_in(pair.second.folder)
    pair.finish(alone)


def stopping_at(place: Place, folder: Path, step: str) -> Callable[[], pd.DataFrame | None]:
    """Return a start of the study that stops as a step begins."""

    def start() -> pd.DataFrame | None:
        count_steps(folder / "child.steps", 1, signal.SIGSTOP, step)
        return place.start()

    return start


# --- checkpoints --------------------------------------------------------------------------------


def test_a_killed_study_goes_on_from_its_checkpoints(place, alone):
    place = replace(place, every=1)
    # One of the two runs has its first epoch on disk.
    assert in_child(place.notes, place.start, 2, among="save").signal == signal.SIGKILL
    folder = place.folder / "cache" / "checkpoints"
    assert len(list(folder.glob("*/*.checkpoint"))) == 1
    finish(place, alone)
    assert not list(folder.glob("*"))
    assert in_child(place.notes, lambda: resumptions(place)).value == {None: 1, "1": 1}


def resumptions(place: Place) -> dict[str | None, int]:
    """Count the finished runs of a study by the epoch that they went on from."""
    runs = [run for run in place.runs(role="run") if run.status == "FINISHED"]
    return Counter(run.tags.get("resumed_from_epoch") for run in runs)


# --- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of a few megabytes, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def error_in(printed: str) -> str:
    """Return a command's error, its last line."""
    assert "Traceback" not in printed
    assert printed.count("error: ") == 1
    return printed.splitlines()[-1]


# In kilobytes: too few for a run, and for a summary.
@pytest.mark.parametrize("room", [pytest.param(40, marks=pytest.mark.slow), 300])
def test_a_full_disk_is_one_line_and_the_study_gets_done_when_there_is_room(
    small_disk, alone, empty_database, tiny, tmp_path, room
):
    place = Place(small_disk, tmp_path, tiny, every=1)
    shutil.copy(empty_database, small_disk / "mlflow.db")
    assert killed_at(place, 9)  # the study is on its way
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        file.write(bytes(max(0, free - room * 1024)))
    ended = in_child(place.notes, place.start)
    assert ended.code == 2
    assert error_in(ended.printed).startswith("error: the disk is full (")
    assert in_child(place.notes, place.check).code == 0  # there is no room, but it can be read
    ballast.unlink()
    finish(place, alone)


# --- too little memory --------------------------------------------------------------------------


def test_too_little_memory_is_one_line(place):
    wide = replace(place, base=RunConfig(hidden=(6000, 6000), latent_size=2))

    def start():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + 200_000_000
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        wide.start()

    ended = in_child(place.notes, start)
    assert ended.code == 2, ended.printed
    assert error_in(ended.printed).startswith("error: there is too little memory (")


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), "disk is full"),
        (MemoryError(), "little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "little memory"),
        (RuntimeError("a worker process was killed; was there a lack?"), "little memory"),
        (OSError(errno.ENOENT, "No such file"), None),
        (ValueError("anything else"), None),
    ],
    ids=str,
)
def test_a_shortage_is_found_also_where_it_is_the_cause_of_an_error(error, lacking):
    wrapped = ValueError("while logging")
    wrapped.__cause__ = error
    line = addresses.trouble(error)
    assert line == addresses.trouble(wrapped)
    assert line is None if lacking is None else lacking in line
