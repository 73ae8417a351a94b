"""`--workers` and several processes on one study: the same result as one process alone."""

import multiprocessing
import os
import sys

import pandas as pd
import pytest
from studies.grid import open_grid
from studies.plan import make_plan
from studies.storage import open_storage

from harness import UserError, tracking
from harness.metrics import frechet
from harness.training.engine import STACK_WIDTH
from studies import kl_weight, worker
from studies.runner import cli, workers
from studies.runner.options import Options
from studies.runner.workers import arguments, cores

NAME = "kl_weight-digits"
CLOCK = ("progress/epoch_seconds", "progress/images_per_second")


def results(uri):
    """Return the metrics of the finished runs of a study, configuration by configuration."""
    mine = f"tags.study = '{NAME}' and tags.role = 'run' and attributes.status = 'FINISHED'"
    runs = tracking.read_runs(tracking.connect(uri), NAME, mine)
    keys = ["kl_weight", "seed"]
    rows = [{k: float(run["params"][k]) for k in keys} | run["metrics"] for run in runs]
    frame = pd.DataFrame(rows).drop(columns=list(CLOCK), errors="ignore")
    return frame.sort_values(keys).reset_index(drop=True)[sorted(frame)]


def assert_exact(uri, storage, arguments):
    """Assert that the ledger of a study is exact: nothing missing, nothing twice, nothing open."""
    plan = make_plan(kl_weight.STUDY, cli.parse("kl_weight", "", float, arguments))
    found = open_storage(storage)
    grid = open_grid(plan, found)
    assert sorted(grid.finished()) == sorted(plan.configs)
    assert grid.trials("RUNNING", "WAITING") == []
    found.engine.dispose()
    runs = tracking.read_runs(tracking.connect(uri), NAME)
    done = [run["tags"] for run in runs if run["status"] == "FINISHED"]
    assert {run["status"] for run in runs} <= {"FINISHED", "KILLED"}
    assert [tags["role"] for tags in done].count("summary") == 1
    assert len(done) == len(plan.runs) + 1
    assert len(results(uri).drop_duplicates(["kl_weight", "seed"])) == len(plan.runs)


def part(arguments, said, start):
    """Be a process that was started with the study's command."""
    sys.stdout = sys.stderr = said.open("w", buffering=1)
    start.wait()
    cli.main(kl_weight.STUDY, arguments)


def test_processes_on_postgres_share_a_study_and_its_result_is_that_of_one(
    postgres, finished, tracking_uri, tmp_path, monkeypatch, data, features
):
    monkeypatch.setitem(STACK_WIDTH, "cpu", 2)  # one point at a time
    frechet.classifier(
        data, features
    )  # kept; a fork cannot use autograd if this process has done so
    storage = postgres.create("shared_study")
    arguments = [*finished.arguments, "--tracking-uri", tracking_uri, "--storage", storage]
    said = [tmp_path / f"said-{i}" for i in range(2)]
    context = multiprocessing.get_context("fork")  # imports are dear
    start = context.Barrier(2)
    team = [context.Process(target=part, args=(arguments, file, start)) for file in said]
    for process in team:
        process.start()
    for process in team:
        process.join()
    printed = [file.read_text() for file in said]
    assert [process.exitcode for process in team] == [0, 0], printed
    assert_exact(tracking_uri, storage, arguments)
    alone = results(finished.tracking_uri)
    pd.testing.assert_frame_equal(results(tracking_uri), alone, check_exact=True)
    runs = tracking.read_runs(tracking.connect(tracking_uri), NAME)
    assert len({run["tags"]["process"] for run in runs}) == 2
    assert sum("lowest validation neg_elbo" in text for text in printed) == 1
    assert sum("The summary was written by process" in text for text in printed) == 1
    assert not any("secret" in text for text in printed)


def test_arguments_say_what_options_say():
    options = cli.parse(
        "kl_weight",
        "",
        float,
        ["--values", "0.1", "1e-7", "--epochs", "3", "--workers", "4", "--sigma", "learned"],
    )
    said = arguments(options)
    assert "--workers" not in said
    assert arguments(cli.parse("kl_weight", "", float, said)) == said
    again = cli.parse("kl_weight", "", float, said)
    assert (again.values, again.epochs, again.sigma) == ((0.1, 1e-7), 3, "learned")
    assert arguments(Options(fresh=True)) == ["--fresh"]


@pytest.mark.parametrize(("workers", "available"), [(1, 2), (2, 2), (3, 8), (5, 2), (4, 6)])
def test_workers_share_the_cores_and_have_one_at_least(workers, available):
    shares = [cores(number, workers, available) for number in range(1, workers + 1)]
    assert sum(shares) == max(workers, available)
    assert max(shares) - min(shares) <= 1
    assert min(shares) >= 1


def test_a_dead_team_is_one_clear_error(capsys, tracking_uri, tmp_path, monkeypatch):
    # A worker that ends at once stands for one that is killed.
    end = ["-c", "import sys; print('so'); sys.exit(9)"]
    monkeypatch.setattr(workers, "start_words", lambda page: end)
    places = ["--tracking-uri", tracking_uri, "--storage", f"sqlite:///{tmp_path}/optuna.db"]
    with pytest.raises(SystemExit) as stop:
        cli.main(kl_weight.STUDY, ["--values", "0.1", "--workers", "2", *places])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "worker 1: so" in said
    assert "worker 2: ended with code 9" in said
    assert "is not finished (trials left: 1)" in said
    assert tracking.read_runs(tracking.connect(tracking_uri), NAME) == []


def test_a_worker_that_refuses_its_work_stops_no_study_that_the_others_finish():
    workers.check_done(0, "mine", refused=True)
    with pytest.raises(UserError, match="a worker refused its work"):
        workers.check_done(1, "mine", refused=True)


def test_a_study_named_as_a_module_that_is_no_page_is_started_as_its_script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["mine.py"])
    assert worker.start_words("kl_weight") == ["-m", "studies.kl_weight"]
    for name in ("grid", "live", "mine"):
        assert worker.start_words(name) == ["mine.py"]


def test_a_worker_knows_itself_and_its_crowd(monkeypatch):
    assert worker.crowd({}) is None
    assert worker.crowd({worker.NUMBER: "2/4"}) == (2, 4)
    assert worker.is_here(worker.name())
    assert worker.process_of(worker.name()) == os.getpid()
    assert not worker.is_gone(worker.name())
    assert worker.is_gone(worker.name(2**22 + 1))
    assert not worker.is_here(f"elsewhere:{os.getpid()}:0")
    assert not worker.is_gone(f"elsewhere:{2**22 + 1}:0")


@pytest.mark.parametrize("said", ["0", "-1", "1.5", "soon", ""])
def test_a_bad_heartbeat_is_refused(said):
    with pytest.raises(UserError, match="VAE_SWEEP_BEAT"):
        worker.beat({worker.BEAT: said})
