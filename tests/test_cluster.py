"""A study on PostgreSQL and an MLflow server, whose workers die, stop and lose their database."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import pytest
from studies.grid import open_grid
from studies.plan import make_plan
from studies.storage import open_storage

from harness import tracking
from studies import kl_weight, worker
from studies.runner.cli import parse
from tests.real_servers import free_port
from tests.runner.test_workers import NAME, assert_exact, results

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
VALUES = [str(0.01 * 2**i) for i in range(6)]
STUDY = ["--values", *VALUES, "--seeds", "5", "--epochs", "2"]
WORKERS, KILLS = 4, 3
ENVIRONMENT = {**os.environ, worker.BEAT: "3", "OMP_NUM_THREADS": "2"}
"""18 seconds of grace; two threads, so that workers fork while heartbeats go on."""

PATIENCE = 1800
"""Seconds within which everything happens, or the test fails."""


def eventually(condition):
    """Wait until something is so."""
    until = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < until, "it never was so"
        time.sleep(0.1)
    return found


@contextmanager
def mlflow_server(backend, folder):
    """Start `mlflow server` on a database and wait until it answers."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", backend]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "mlflow.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def answers():
        assert server.poll() is None, (folder / "mlflow.log").read_text()
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return True

    try:
        eventually(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


class Team:
    """Workers that were started with the same command."""

    def __init__(self, arguments, folder):
        self.arguments, self.folder, self.all = arguments, folder, []

    def start(self):
        """Start another worker."""
        command = [sys.executable, "-m", "studies.kl_weight", *self.arguments]
        with (self.folder / f"worker-{len(self.all)}").open("w") as said:
            self.all.append(
                subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=said, stderr=said)
            )

    def living(self):
        """Return who has not ended."""
        return [process for process in self.all if process.poll() is None]

    def end(self):
        """Leave nobody behind."""
        for process in self.living():
            process.kill()
            process.wait()

    def said(self):
        """Return what each worker wrote."""
        return [file.read_text() for file in sorted(self.folder.glob("worker-*"))]


@contextmanager
def team_of(arguments, folder):
    """Start workers, and leave none behind."""
    team = Team(arguments, folder)
    try:
        for _ in range(WORKERS):
            team.start()
        yield team
    finally:
        team.end()


def test_nothing_is_lost_and_nothing_twice(postgres, empty_database, tmp_path, monkeypatch):
    alone = f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    command = [sys.executable, "-m", "studies.kl_weight", *STUDY, "--tracking-uri", alone]
    command += ["--storage", f"sqlite:///{tmp_path}/optuna.db"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    storage, chance = postgres.create("cluster_optuna"), random.Random(0)
    with mlflow_server(postgres.create("cluster_mlflow"), tmp_path) as uri:
        arguments = [*STUDY, "--storage", storage, "--tracking-uri", uri]
        monkeypatch.setenv(worker.BEAT, "3")
        with team_of(arguments, tmp_path) as team:
            plan = make_plan(kl_weight.STUDY, parse("kl_weight", "", float, arguments))
            grid = open_grid(plan, open_storage(storage))

            def holders():
                owners = {t.user_attrs.get("process") for t in grid.trials("RUNNING")} - {None}
                numbers = {worker.process_of(owner) for owner in owners}
                return [process for process in team.living() if process.pid in numbers]

            # Stopped past its grace period, and continued: its late results do not count.
            stopped = eventually(holders)[0]
            stopped.send_signal(signal.SIGSTOP)
            eventually(lambda: stopped not in holders())  # its trials are taken from it
            stopped.send_signal(signal.SIGCONT)
            for _ in range(KILLS):
                victim = chance.choice(eventually(holders))
                victim.kill()
                victim.wait()
                team.start()
                time.sleep(chance.random() * 3)
            postgres.control("-m", "fast", "restart")
            eventually(lambda: not team.living())
            printed = "\n".join(team.said())
            codes = [process.returncode for process in team.all]
            assert sorted(set(codes)) == [-signal.SIGKILL, 0], printed
            assert codes.count(-signal.SIGKILL) == KILLS
            assert "secret" not in printed
        grid.desk.storage.engine.dispose()
        assert_exact(uri, storage, arguments)
        pd.testing.assert_frame_equal(results(uri), results(alone), check_exact=True)
        runs = tracking.read_runs(tracking.connect(uri), NAME)
        assert all("reason" in run["tags"] for run in runs if run["status"] == "KILLED")


def test_workers_on_one_machine_share_a_study_and_one_speaks(empty_database, finished, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri, storage = f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/optuna.db"
    arguments = [*finished.arguments, "--tracking-uri", uri, "--storage", storage]
    command = [sys.executable, "-m", "studies.kl_weight", *arguments, "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    logs = list((tmp_path / "cache" / "workers").glob("*/*.log"))
    assert sorted(log.name for log in logs) == ["1.log", "2.log"]
    assert any("epoch 3/3" in log.read_text() for log in logs)
    assert_exact(uri, storage, arguments)
    pd.testing.assert_frame_equal(results(uri), results(finished.tracking_uri), check_exact=True)
    answer = finished.printed.split("kl_weight = ")[-1].split("Report:")[0]
    assert done.stdout.split("kl_weight = ")[-1].startswith(answer)
    assert "2 workers, " in done.stdout


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_team_stops_with_its_parent_and_goes_on(stop, empty_database, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri, storage = f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/optuna.db"
    arguments = ["--values", "0.01", "0.02", "0.03", "--seeds", "2", "--epochs", "20"]
    arguments += ["--tracking-uri", uri, "--storage", storage]
    command = [sys.executable, "-m", "studies.kl_weight", *arguments, "--workers", "2"]
    parent = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    eventually(lambda: tracking.read_runs(tracking.connect(uri), NAME))
    parent.send_signal(stop)
    said = parent.communicate()[1]
    assert parent.returncode == (130 if stop == signal.SIGINT else 75), said
    statuses = {run["status"] for run in tracking.read_runs(tracking.connect(uri), NAME)}
    assert "RUNNING" not in statuses
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert_exact(uri, storage, arguments)
