"""Whole studies on a real MLflow server that is stopped, killed and started under them."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
import torch

from harness import load_run, tracking
from tests.real_servers import Proxy, free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
VALUES, SEEDS = ("0.02", "1"), 2
EXPERIMENT = "kl_weight-digits"
MEASURED = ("progress/epoch_seconds", "progress/images_per_second")


@dataclass(frozen=True)
class Studies:
    """A copy of the project, so that spool and reports lie in a folder of the tests."""

    root: Path

    def start(self, folder: Path, uri: str) -> subprocess.Popen[str]:
        """Start a small study that is tracked at an address and stored in a folder."""
        command = [sys.executable, "-m", "studies.kl_weight", "--values", *VALUES]
        command += ["--seeds", str(SEEDS), "--epochs", "12", "--tracking-uri", uri]
        command += ["--storage", f"sqlite:///{folder}/optuna.db"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.root, stdout=pipe, stderr=pipe, text=True)

    def run(self, folder: Path, uri: str) -> tuple[int, str]:
        """Run it to its end; returns exit code and standard error."""
        return ended(self.start(folder, uri))

    def waiting(self) -> list[Path]:
        """Return the runs that wait for a server."""
        return list((self.root / "cache" / "spool").glob("*/*/*/writes.jsonl"))


def ended(study: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = study.communicate()
    return study.returncode, errors


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    for package in ("harness", "studies", "analysis"):
        shutil.copytree(
            ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", root)
    return Studies(root)


@pytest.fixture(scope="module")
def reference(studies, empty_database, tmp_path_factory):
    """The study as a database file holds it: name of a run -> contents and model."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copy(empty_database, folder / "mlflow.db")
    code, errors = studies.run(folder, f"sqlite:///{folder}/mlflow.db")
    assert (code, errors) == (0, "")
    return recorded(f"sqlite:///{folder}/mlflow.db")


def contents(store, run) -> dict:
    """Return all that a store has of a run but times, ids and what depends on its process."""
    client, run_id = store.client, run.info.run_id
    history = {k: client.get_metric_history(run_id, k) for k in run.data.metrics}
    own = {"mlflow.note.content", "mlflow.user", "run_key", "host", "process", "trial", "command"}
    inputs = [entry.dataset for entry in client.get_run(run_id).inputs.dataset_inputs]
    note = run.data.tags["mlflow.note.content"].replace(run.data.tags["run_key"], "KEY")
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "ended": run.info.end_time >= run.info.start_time,
        "params": {k: v for k, v in run.data.params.items() if k != "stack_width"},
        "tags": {k: v for k, v in run.data.tags.items() if k not in own},
        "note": note.split(" --tracking-uri")[0],
        "metrics": {k: [(m.step, repr(m.value)) for m in ms] for k, ms in history.items()},
        "inputs": [(d.name, d.digest, json.loads(d.profile)) for d in inputs],
        "files": files(client, run_id),
    }


def files(client, run_id: str, path: str | None = None) -> list[str]:
    """Return the names of a run's artifacts, pictures without their time and number."""
    found = []
    for entry in client.list_artifacts(run_id, path):
        if entry.is_dir:
            found += files(client, run_id, entry.path)
        else:
            found.append(re.sub(r"timestamp\+\d+\+[0-9a-f-]{36}", "WHEN", entry.path))
    return sorted(found)


def recorded(uri: str) -> dict:
    """Read the finished runs of the study, and check the status of all others."""
    store = tracking.connect(uri)
    experiment = store.client.get_experiment_by_name(EXPERIMENT)
    runs = store.client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    finished = [run for run in runs if run.info.status == "FINISHED"]
    names = [run.info.run_name for run in finished]
    assert len(names) == len(set(names)) == len(VALUES) * SEEDS + 1, "one each, and the summary"
    found = {}
    for run in finished:
        if run.info.run_name == "summary":
            continue
        held = contents(store, run)
        assert "reason" not in held["tags"]
        for name in MEASURED:
            assert len(held["metrics"].pop(name)) == 12
        weights = load_run(run.info.run_id, uri).model.state_dict()
        found[run.info.run_name] = held, weights
    return found


def check(uri: str, reference: dict, studies: Studies, folder: Path) -> list[str]:
    """Check that the server holds what the file holds, and nothing waits; return trials' states."""
    found = recorded(uri)
    assert found.keys() == reference.keys()
    for name, (held, weights) in reference.items():
        assert found[name][0] == held
        assert weights.keys() == found[name][1].keys()
        assert all(torch.equal(weights[k], found[name][1][k]) for k in weights)
    assert studies.waiting() == []
    study = optuna.load_study(study_name=EXPERIMENT, storage=f"sqlite:///{folder}/optuna.db")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == len(VALUES) * SEEDS
    assert set(states) <= {"COMPLETE", "FAIL"}
    return states


def until(condition: Callable[[], object], study: subprocess.Popen[str]) -> None:
    """Wait for something to happen while a study runs."""
    while not condition():
        assert study.poll() is None, ended(study)
        time.sleep(0.02)


def created(proxy: Proxy) -> int:
    return sum("runs/create" in line for line in proxy.seen)


def test_down_at_the_start(studies, tmp_path):
    code, errors = studies.run(tmp_path, f"http://127.0.0.1:{free_port()}")
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert "connection refused" in errors.lower()
    assert list(tmp_path.iterdir()) == []


def test_not_answering_at_the_start(studies, server, proxy, tmp_path):
    server.send(signal.SIGSTOP)
    before = sorted(tmp_path.iterdir())
    code, errors = studies.run(tmp_path, server.uri)
    server.send(signal.SIGCONT)
    assert code == 2
    assert "timed out" in errors
    assert sorted(tmp_path.iterdir()) == before


def test_killed_and_started_again_in_the_middle(studies, server, proxy, reference, tmp_path):
    study = studies.start(tmp_path, proxy.uri)
    until(lambda: created(proxy) >= 2, study)
    server.kill()
    server.start()
    code, errors = ended(study)
    assert (code, "does not answer" in errors) == (0, True), errors
    check(server.uri, reference, studies, tmp_path)


def test_down_at_the_end_and_delivered_at_the_next_start(
    studies, server, proxy, reference, tmp_path
):
    study = studies.start(tmp_path, proxy.uri)
    until(lambda: created(proxy) >= 3, study)
    server.kill()
    code, errors = ended(study)
    assert code == 2
    last = errors.splitlines()[-1]
    assert re.search(r"records of [1-4] runs? wait in .*, and the same command delivers them", last)
    assert studies.waiting()
    server.start()
    code, errors = studies.run(tmp_path, proxy.uri)
    assert code == 0, errors
    states = check(server.uri, reference, studies, tmp_path)
    assert set(states) == {"COMPLETE"}, "no run is trained again"


def test_stopped_for_a_while(studies, server, proxy, reference, tmp_path):
    study = studies.start(tmp_path, proxy.uri)
    until(lambda: created(proxy) >= 2, study)
    server.send(signal.SIGSTOP)
    until(studies.waiting, study)
    server.send(signal.SIGCONT)
    code, errors = ended(study)
    assert code == 0, errors
    check(server.uri, reference, studies, tmp_path)


def test_killed_with_records_waiting(studies, server, proxy, reference, tmp_path):
    study = studies.start(tmp_path, proxy.uri)
    until(lambda: created(proxy) >= 2, study)
    proxy.down = True
    until(studies.waiting, study)
    study.send_signal(signal.SIGKILL)
    study.communicate()
    assert studies.waiting()
    proxy.down = False
    code, errors = studies.run(tmp_path, proxy.uri)
    assert code == 0, errors
    check(server.uri, reference, studies, tmp_path)


def test_answers_of_every_kind_are_lost(studies, server, proxy, reference, tmp_path):
    proxy.lose = {"runs/create": 2, "runs/log-batch": 2, "PUT ": 2, "runs/update": 2}
    proxy.lose |= {"experiments/create": 1, "runs/log-inputs": 1, "runs/set-tag": 1}
    code, errors = studies.run(tmp_path, proxy.uri)
    assert code == 0, errors
    assert set(proxy.lose.values()) == {0}
    check(server.uri, reference, studies, tmp_path)
