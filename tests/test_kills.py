"""A study that is killed, wherever it is, is finished by the same command, and nothing is lost."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from kills import begun, in_child
from studies.plan import Plan, make_plan
from studies.study import run

from benchmarks import audit, children
from harness import RunConfig, places, processes, tracking
from harness.data.dataset import Dataset
from studies import kl_weight
from studies.runner import cli, terminal
from studies.runner.options import Options

STUDY = replace(kl_weight.STUDY, figures={})
"""Without figures: they are drawn anew at every start and take most of its time."""


@dataclass(frozen=True)
class Place:
    """A folder with a study's databases, opened by children of this process only.

    Attributes:
        folder: where the databases are.
        notes: where the children write what they do.
        data: what the study is about.
        every: epochs between checkpoints.
        base: settings of the runs.
    """

    folder: Path
    notes: Path
    data: Dataset
    every: int = 0
    base: RunConfig = RunConfig(hidden=(16,), latent_size=2)

    @property
    def options(self) -> Options[Any]:
        """What the study's user asks for."""
        return Options(
            values=(0.02, 1.0),
            seeds=2,
            epochs=2,
            batch_size=16,
            storage=f"sqlite:///{self.folder}/optuna.db",
            tracking_uri=f"sqlite:///{self.folder}/mlflow.db",
            checkpoint_every=self.every,
        )

    @property
    def plan(self) -> Plan:
        """What that means."""
        return make_plan(replace(STUDY, base=self.base), self.options)

    def start(self) -> pd.DataFrame:
        """Run what is left of the study, as its command does; return the table."""
        torch.set_num_threads(1)  # threads that another test has started do not survive a fork
        processes.available = lambda: 2  # so that runs have workers
        with cli.clear_errors([]) as shown:
            return run(self.plan, self.data, self.options, shown).table

    def check(self) -> tuple[list[str], Any]:
        """Return the faults of the ledger, and the results."""
        where = self.options
        return (
            audit.faults(self.plan, where.tracking_uri, where.storage),
            audit.results(self.plan, where.tracking_uri),
        )


@dataclass(frozen=True)
class Alone:
    """What a study that nobody kills gives."""

    steps: list[str]
    table: pd.DataFrame
    results: Any


@pytest.fixture
def place(empty_database: Path, tmp_path: Path, tiny: Dataset) -> Place:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return Place(tmp_path, tmp_path, tiny)


@pytest.fixture(scope="module")
def alone(empty_database: Path, tmp_path_factory: pytest.TempPathFactory, tiny: Dataset) -> Alone:
    children.import_all()
    folder = tmp_path_factory.mktemp("alone")
    place = Place(folder, folder, tiny)
    shutil.copy(empty_database, place.folder / "mlflow.db")
    ended = in_child(place.notes, place.start)
    assert ended.code == ended.signal == 0, ended.said
    steps = begun(place.notes)
    faults, results = in_child(place.notes, place.check).value
    assert faults == []
    assert len(results) == 4
    return Alone(steps, ended.value, results)


def finish(place: Place, alone: Alone) -> None:
    """Start the study once more; assert that it ends, complete and the same to the last bit."""
    ended = in_child(place.notes, place.start)
    assert ended.code == ended.signal == 0, ended.said
    faults, results = in_child(place.notes, place.check).value
    assert faults == []
    assert results == alone.results
    pd.testing.assert_frame_equal(ended.value, alone.table, check_exact=True)


def killed_at(place: Place, step: int, by: int = signal.SIGKILL, among: str = "") -> bool:
    """Start the study and kill it at a step (`in_child`); say whether it was so killed."""
    ended = in_child(place.notes, place.start, step, by, among)
    if ended.code == ended.signal == 0:
        return False
    assert (ended.signal, ended.code) in {(by, 0), (0, 128 + by)}, ended.said
    return True


# --- killed, again and again --------------------------------------------------------------------


@pytest.mark.parametrize("stride", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_a_study_that_is_killed_again_and_again_gets_done(place, alone, stride):
    kills = next(n for n in count() if not killed_at(place, stride * (n + 1)))
    assert kills * stride > len(alone.steps) / 2
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
    middle = alone.steps.index("set_tag")  # of the first picture
    for by in (signal.SIGINT, signal.SIGTERM):
        ended = in_child(place.notes, place.start, middle, by)
        assert ended.code == 128 + by
        assert ended.said.endswith(f"{cli.STOPPED}\n")
    states = in_child(place.notes, lambda: reasons(place)).value
    assert states == {("KILLED", "stopped by SIGINT"): 4, ("KILLED", "stopped by SIGTERM"): 4}
    finish(place, alone)


def reasons(place: Place) -> dict[tuple[str, str | None], int]:
    """Count the runs of a study by status and reason."""
    store = tracking.connect(place.options.tracking_uri)
    runs = tracking.read_runs(store, place.plan.experiment, "tags.role = 'run'")
    ends = [(run["status"], run["tags"].get("reason")) for run in runs]
    return {end: ends.count(end) for end in ends}


@pytest.mark.slow
def test_a_study_that_is_killed_at_any_step_gets_done(place, alone, empty_database):
    steps = []
    for step in count(1):
        for file in ("mlflow.db", "optuna.db"):
            for left in place.folder.glob(f"{file}*"):
                left.unlink()
        shutil.copy(empty_database, place.folder / "mlflow.db")
        if not killed_at(place, step):
            break
        steps = begun(place.notes)
        finish(place, alone)
    names = {"create_new_study", "_create_new_trial", "set_trial_state_values", "create_run"}
    assert names | {"log_batch", "log_artifacts", "set_terminated", "write_summary"} <= set(steps)


@pytest.mark.slow
def test_runs_that_ended_before_a_kill_count_once_though_clearing_up_was_killed_too(place, alone):
    # All runs have ended, no trial is told; then two of four runs are closed.
    assert killed_at(place, 3, among="set_trial_state_values")
    assert killed_at(place, 3, among="set_tag")
    finish(place, alone)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["set_trial_state_values", "log_outputs"])
def test_a_study_that_is_killed_while_it_clears_up_gets_done(place, alone, empty_database, first):
    # The first kill falls between the runs' ends and the last tell, or into the summary; the
    # second at any step until the next run begins.
    last = len(alone.steps) - alone.steps[::-1].index(first)
    for step in count(1):
        for file in ("mlflow.db", "optuna.db"):
            for left in place.folder.glob(f"{file}*"):
                left.unlink()
        shutil.copy(empty_database, place.folder / "mlflow.db")
        assert killed_at(place, last)
        killed = killed_at(place, step)
        finish(place, alone)
        if not killed or begun(place.notes)[-1] == "log_inputs":
            break


# --- checkpoints --------------------------------------------------------------------------------


def test_a_killed_study_goes_on_from_its_checkpoints(place, alone):
    place = replace(place, every=1)
    # Two of the four runs have their first epoch on disk.
    assert in_child(place.notes, place.start, 3, among="save").signal == signal.SIGKILL
    folder = place.folder / "cache" / "checkpoints"
    assert len(list(folder.glob("*/*.checkpoint"))) == 2
    finish(place, alone)
    assert not list(folder.glob("*"))
    assert in_child(place.notes, lambda: resumptions(place)).value == {None: 2, "1": 2}


def resumptions(place: Place) -> dict[str | None, int]:
    """Count the finished runs of a study by the epoch that they went on from."""
    store = tracking.connect(place.options.tracking_uri)
    done = "tags.role = 'run' and attributes.status = 'FINISHED'"
    runs = tracking.read_runs(store, place.plan.experiment, done)
    return Counter(run["tags"].get("resumed_from_epoch") for run in runs)


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
    shown = ("%", "left", terminal.INDENT)  # of a log of progress
    (line,) = [line for line in ended.said.splitlines() if not any(part in line for part in shown)]
    assert line.startswith("error: the disk is full (")
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
    assert ended.code == 2, ended.said
    (line,) = [line for line in ended.said.splitlines() if terminal.INDENT not in line]
    assert line.startswith("error: there is too little memory (")


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), "disk"),
        (MemoryError(), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
        (RuntimeError("a worker process was killed; was there too little memory?"), "memory"),
        (OSError(errno.ENOENT, "No such file"), None),
        (ValueError("anything else"), None),
    ],
    ids=str,
)
def test_a_shortage_is_told_from_other_errors_also_where_it_is_the_cause(error, lacking):
    wrapped = ValueError("while logging")
    wrapped.__cause__ = error
    assert places.shortage(error) == places.shortage(wrapped) == lacking
