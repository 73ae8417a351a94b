"""Studies shared by processes, some of which are killed, on PostgreSQL and an MLflow server."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest

from benchmarks import audit, children
from harness import tracking
from studies import kl_weight
from studies.runner import cli, database
from studies.runner.proposers import keys
from studies.runner.queue import OWNER, RESULT
from studies.runner.study import make_plan

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
NAME = "kl_weight-digits"
STUDY = ["--values", "0.01", "0.02", "0.04", "1", "--seeds", "3", "--epochs", "2"]
RUNS = 12
SMALL = ["--values", "0.02", "1", "--seeds", "2", "--epochs", "2"]
WORKERS, KILLS = 4, 3
PAGE = """
from dataclasses import replace

import harness
from studies import kl_weight
from studies.runner import cli

load = harness.load_dataset


def few(name, root):
    data = load(name, root)
    cut = {"train": data.train.head(96), "val": data.val.head(40), "test": data.test.head(50)}
    return replace(data, **cut)


if __name__ == "__main__":
    harness.load_dataset = few
    cli.main(replace(kl_weight.STUDY, figures={}))
"""
"""The study on few images and without its figures, which take most of the time."""

BEAT = {database.BEAT: "3"}
"""Environment in which a process may be silent for 18 seconds."""

HELD = 30
"""Seconds for which a server does not answer."""

PATIENCE = 1800
"""Seconds after which `eventually` fails."""


def eventually(condition):
    """Wait until a condition holds; return its value."""
    until = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < until, "the condition never held"
        time.sleep(0.1)
    return found


class Team:
    """Processes that were started with the same command.

    Args:
        arguments: arguments of the command.
        folder: folder for their output.
        home: copy of the project that they are started in.
    """

    def __init__(self, arguments, folder, home):
        self.arguments, self.folder, self.home, self.all = arguments, folder, home, []

    def start(self, home=None, **environment):
        """Start another process."""
        page = (home or self.home) / "few.py"
        page.write_text(PAGE)
        with (self.folder / f"process-{len(self.all)}").open("w") as out:
            started = subprocess.Popen(
                [sys.executable, str(page), *self.arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=out,
                stderr=out,
            )
        self.all.append(started)
        return started

    def living(self):
        """Return the processes that have not ended."""
        return [process for process in self.all if process.poll() is None]

    def end(self):
        """Kill those that have not ended."""
        for process in self.living():
            process.kill()
            process.wait()

    def printed(self):
        """Return the output of all."""
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("process-*")))

    def finish(self):
        """Wait until all have ended; return codes and output, in which nothing is alarming."""
        eventually(lambda: not self.living())
        printed = self.printed()
        assert not re.search(r"^(?!Next: ).*--fresh", printed, re.MULTILINE)
        assert "broken" not in printed
        assert "secret" not in printed
        assert "Traceback" not in printed, printed
        return [process.returncode for process in self.all], printed


@contextmanager
def team_of(arguments, folder, home):
    """Yield a team, whose processes are killed at the end."""
    team = Team(arguments, folder, home)
    try:
        yield team
    finally:
        team.end()


@pytest.fixture
def home(tmp_path):
    """Return a copy of the project, which has another spool."""
    return children.copy_project(tmp_path / "clone")


@pytest.fixture(scope="module")
def alone(empty_database, tmp_path_factory):
    """Return the results of studies in one process, by command line."""
    found = {}
    home = children.copy_project(tmp_path_factory.mktemp("clone") / "alone")
    for words in (STUDY, SMALL):
        folder = tmp_path_factory.mktemp("alone")
        shutil.copy(empty_database, folder / "mlflow.db")
        uri = f"sqlite:///{folder}/mlflow.db"
        arguments = [*words, "--tracking-uri", uri, "--storage", f"sqlite:///{folder}/optuna.db"]
        with team_of(arguments, folder, home) as team:
            team.start()
            codes, printed = team.finish()
        assert codes == [0], printed
        found[tuple(words)] = results(arguments, uri)
    return found


def hold(server):
    """Stop a server for a while."""
    server.send(signal.SIGSTOP)
    time.sleep(HELD)
    server.send(signal.SIGCONT)


def plan_of(arguments):
    return make_plan(kl_weight.STUDY, cli.parse(kl_weight.STUDY, arguments))


def results(arguments, uri):
    return audit.results(plan_of(arguments), uri)


def check(words, uri, storage, alone, *homes):
    """Assert that nothing was lost and nothing is there twice."""
    assert audit.faults(plan_of(words), uri, storage, homes) == []
    assert results(words, uri) == alone[tuple(words)]
    runs = tracking.connect(uri).runs(NAME)
    assert {run.status for run in runs} <= {"FINISHED", "KILLED"}  # FAILED: it was an error


class Trials:
    """The trials of the study in a storage."""

    def __init__(self, storage):
        self.storage = database.open_storage(storage)

    def __call__(self, *states):
        """Return the trials in some states."""
        if NAME not in optuna.get_all_study_names(self.storage):
            return []
        trials = optuna.load_study(study_name=NAME, storage=self.storage).trials
        return [trial for trial in trials if trial.state.name in states]

    def holders(self, team):
        """Return the processes of a team that hold trials."""
        owners = {trial.user_attrs.get(OWNER) for trial in self("RUNNING")} - {None, ""}
        numbers = {int(owner.rsplit(":", 2)[1]) for owner in owners}
        return [process for process in team.living() if process.pid in numbers]

    def trained(self):
        """Return how many trials are trained, and how many of them complete, too."""
        complete = len(self("COMPLETE"))
        noted = sum(RESULT in trial.user_attrs for trial in self("RUNNING"))
        return noted + complete, complete


def test_nothing_is_lost_and_nothing_twice(postgres, server, alone, home, tmp_path):
    storage, chance = postgres.create("cluster_optuna"), random.Random(0)
    arguments = [*STUDY, "--storage", storage, "--tracking-uri", server.uri]
    trials = Trials(storage)
    with team_of(arguments, tmp_path, home) as team:
        for _ in range(WORKERS):
            team.start(**BEAT)
        # Stopped past its grace period, and continued: its late results do not count.
        stopped = eventually(lambda: trials.holders(team))[0]
        stopped.send_signal(signal.SIGSTOP)
        eventually(lambda: stopped not in trials.holders(team))  # its trials are taken from it
        stopped.send_signal(signal.SIGCONT)
        for _ in range(KILLS):
            victim = chance.choice(eventually(lambda: trials.holders(team)))
            victim.kill()
            victim.wait()
            team.start(**BEAT)
            time.sleep(chance.random() * 3)
        postgres.control("-m", "fast", "restart")
        eventually(lambda: trials.trained()[0] == RUNS)
        hold(server)
        codes, printed = team.finish()
    assert sorted(set(codes)) == [-signal.SIGKILL, 0], printed
    assert codes.count(-signal.SIGKILL) == KILLS
    trials.storage.engine.dispose()
    check(STUDY, server.uri, storage, alone, home)


def test_a_server_that_is_held_at_the_end_delays_all_and_nothing_else(
    server, alone, home, tmp_path
):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    arguments = [*SMALL, "--storage", storage, "--tracking-uri", server.uri]
    trials = Trials(storage)
    with team_of(arguments, tmp_path, home) as team:
        team.start()
        team.start()
        eventually(lambda: trials.trained()[0] == 4)
        hold(server)
        codes, printed = team.finish()
    assert codes == [0, 0], printed
    check(SMALL, server.uri, storage, alone, home)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same clone", "other clone"])
def test_a_process_that_is_killed_while_it_delivers(server, alone, home, tmp_path, elsewhere):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    arguments = [*SMALL, "--storage", storage, "--tracking-uri", server.uri]
    other = children.copy_project(tmp_path / "other")
    trials = Trials(storage)
    with team_of(arguments, tmp_path, home) as team:
        deliverer = team.start()
        eventually(lambda: trials("RUNNING"))
        server.kill()
        eventually(lambda: trials.trained() == (4, 0))
        deliverer.kill()
        deliverer.wait()
        noted = {key for trial in trials("RUNNING") for key in keys(trial)}
        assert {folder.name for folder in audit.spooled(home)} == noted
        server.start()
        team.start(other if elsewhere else home)
        codes, printed = team.finish()
        assert codes == [-signal.SIGKILL, 0], printed
        finished = {key for trial in trials("COMPLETE") for key in keys(trial)}
        assert finished.isdisjoint(noted) if elsewhere else finished == noted
        if elsewhere:  # what waits in the first clone is delivered there, and closed
            team.start(home)
            codes, printed = team.finish()
            assert codes[2] == 0, printed
    trials.storage.engine.dispose()
    check(SMALL, server.uri, storage, alone, home, other)


def test_two_clones_share_a_database(server, alone, home, tmp_path):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    arguments = [*SMALL, "--storage", storage, "--tracking-uri", server.uri]
    other = children.copy_project(tmp_path / "other")
    with team_of(arguments, tmp_path, home) as team:
        team.start()
        team.start(other)
        codes, printed = team.finish()
    assert codes == [0, 0], printed
    check(SMALL, server.uri, storage, alone, home, other)


def test_a_process_that_is_stopped_past_its_grace_period(postgres, server, alone, home, tmp_path):
    storage = postgres.create("stopped")
    arguments = [*SMALL, "--storage", storage, "--tracking-uri", server.uri]
    trials = Trials(storage)
    with team_of(arguments, tmp_path, home) as team:
        stopped = team.start(**BEAT)
        eventually(lambda: trials.holders(team))
        stopped.send_signal(signal.SIGSTOP)
        held = {trial.number for trial in trials("RUNNING")}
        team.start(**BEAT)
        eventually(lambda: held.issubset(trial.number for trial in trials("FAIL")))
        stopped.send_signal(signal.SIGCONT)
        codes, printed = team.finish()
    assert codes == [0, 0], printed
    trials.storage.engine.dispose()
    check(SMALL, server.uri, storage, alone, home)


# --- processes of one machine -------------------------------------------------------------------


def run_page(arguments, folder):
    """Start a study's command; return the process."""
    command = [sys.executable, "-m", "studies.kl_weight", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    with (folder / "printed").open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def test_workers_on_one_machine_share_a_study_and_one_answers(empty_database, finished, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri, storage = f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/optuna.db"
    arguments = [*finished.arguments, "--tracking-uri", uri, "--storage", storage]
    assert run_page([*arguments, "--workers", "2"], tmp_path).wait() == 0
    printed = (tmp_path / "printed").read_text()
    assert printed.count("Report:") == 1
    assert audit.faults(plan_of(arguments), uri, storage) == []
    assert results(arguments, uri) == results(arguments, finished.tracking_uri)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_workers_stop_with_their_parent_and_go_on(stop, empty_database, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri, storage = f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/optuna.db"
    words = ["--values", "0.01", "0.02", "0.03", "--seeds", "2", "--epochs", "20"]
    arguments = [*words, "--tracking-uri", uri, "--storage", storage, "--workers", "2"]
    store = tracking.connect(uri)
    parent = run_page(arguments, tmp_path)
    eventually(lambda: store.runs(NAME))
    parent.send_signal(stop)
    assert parent.wait() == (130 if stop == signal.SIGINT else 75)
    assert "RUNNING" not in {run.status for run in store.runs(NAME)}
    assert run_page(arguments, tmp_path).wait() == 0
    assert audit.faults(plan_of(words), uri, storage) == []
