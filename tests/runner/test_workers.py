"""`--workers` and several processes on one study: logs, counts, and the result of one process."""

import multiprocessing
import signal
import sys
from dataclasses import replace

import pytest

from benchmarks import audit
from harness import UserError, processes, tracking
from harness.metrics import frechet
from harness.training.engine import STACK_WIDTH
from studies import kl_weight
from studies.runner import cli, stopping, workers
from studies.runner.options import Options, arguments, start_words
from studies.runner.study import make_plan

NAME = "kl_weight-digits"


def part(arguments, file, start):
    """Run the study's command, with its output in a file."""
    sys.stdout = sys.stderr = file.open("w", buffering=1)
    start.wait()
    cli.main(kl_weight.STUDY, arguments)


@pytest.mark.slow
def test_processes_on_postgres_share_a_study_and_its_result_is_that_of_one(
    postgres, finished, tracking_uri, tmp_path, monkeypatch, data, features
):
    monkeypatch.setitem(STACK_WIDTH, "cpu", 2)  # one point at a time
    frechet.classifier(
        data, features
    )  # kept; a fork cannot use autograd if this process has done so
    storage = postgres.create("shared_study")
    arguments = [*finished.arguments, "--tracking-uri", tracking_uri, "--storage", storage]
    files = [tmp_path / f"printed-{i}" for i in range(2)]
    context = multiprocessing.get_context("fork")  # imports take long
    start = context.Barrier(2)
    team = [context.Process(target=part, args=(arguments, file, start)) for file in files]
    for process in team:
        process.start()
    for process in team:
        process.join()
    printed = [file.read_text() for file in files]
    assert [process.exitcode for process in team] == [0, 0], printed
    plan = make_plan(kl_weight.STUDY, cli.parse(kl_weight.STUDY, arguments))
    assert audit.faults(plan, tracking_uri, storage) == []
    assert audit.results(plan, tracking_uri) == audit.results(plan, finished.tracking_uri)
    runs = tracking.connect(tracking_uri).runs(NAME)
    assert len({run.tags["process"] for run in runs}) == 2
    assert all("Best: kl_weight = " in text for text in printed)
    assert sum("Another process wrote the summary" in text for text in printed) == 1
    assert not any("secret" in text for text in printed)


def test_arguments_give_what_options_give():
    words = ["--values", "0.1", "1e-7", "--epochs", "3", "--workers", "4", "--sigma", "learned"]
    options = cli.parse(kl_weight.STUDY, words)
    given = arguments(options, ("workers", "json", "leave"))
    assert "--workers" not in given
    again = cli.parse(kl_weight.STUDY, given)
    assert arguments(again) == given
    assert again == replace(options, workers=1)
    assert arguments(Options(fresh=True)) == ["--fresh"]


def test_a_study_named_as_a_module_that_is_no_page_is_started_as_its_script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["mine.py"])
    assert start_words("kl_weight") == ["-m", "studies.kl_weight"]
    for name in ("plan", "mine"):  # no name of a study has a slash
        assert start_words(name) == ["mine.py"]


# --- the processes of --workers -----------------------------------------------------------------


@pytest.fixture
def team(monkeypatch, tmp_path):
    """Return a function that trains by two workers which run the given code."""
    monkeypatch.setattr(workers, "INTERVAL", 0.05)

    def train(code, counts=lambda: (6, 0), show=lambda runs, text: None):
        workers.train(Options(workers=2), ["-c", code], "mine", tmp_path, counts, show)

    return train


def logs(tmp_path):
    return [(tmp_path / "workers" / "mine" / f"{number}.log").read_text() for number in (1, 2)]


PRINT = """
import os, sys
from studies.runner import workers
print("options", *sys.argv[1:])
print("of", workers.started(), "threads", os.environ["OMP_NUM_THREADS"])
"""


def test_each_worker_writes_a_log_and_the_parent_counts_finished_runs(
    team, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(processes, "available", lambda: 5)
    shown = []

    def counts():
        finished = sum("threads" in file.read_text() for file in tmp_path.rglob("*.log"))
        return 2 + 2 * finished, 4 - 2 * finished

    show = lambda runs, text: shown.append((runs, text))  # noqa: E731
    assert workers.started() == 0
    team(PRINT, counts, show)
    options = "options --study-name mine\n"
    assert logs(tmp_path) == [f"{options}of 2 threads {threads}\n" for threads in (3, 2)]
    assert [runs for runs, _ in shown] == sorted(runs for runs, _ in shown)
    folder = tmp_path / "workers" / "mine"
    assert shown[-1] == (4, f"runs left: 0; 0 workers write logs in {folder}")
    assert capfd.readouterr() == ("", "")


FAIL = """
import os, sys
print("so\\nerror: no room\\n")
sys.exit({code} if os.environ[{variable!r}] == "2/2" else 0)
"""


@pytest.mark.parametrize("code", [1, 3, 9])
def test_a_worker_that_fails_is_named_with_its_log(code, team, tmp_path, capfd):
    team(FAIL.format(code=code, variable=workers.NUMBER))
    log = tmp_path / "workers" / "mine" / "2.log"
    assert capfd.readouterr().err == f"worker 2 ended with code {code}: {log}\n"


def test_runs_that_are_left_when_all_workers_have_ended_are_an_error(team):
    with pytest.raises(UserError, match=r"'mine': no worker is left alive .*runs left: 3"):
        team("import os; os.kill(os.getpid(), 9)", lambda: (3, 3))


WAIT = """
import signal, sys, time
def stop(number, frame):
    print("stopped by", signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_all_workers_have_ended_afterwards(number, team, tmp_path):
    def counts():
        folder = tmp_path / "workers" / "mine"
        ready = [file for file in folder.glob("*.log") if "ready" in file.read_text()]
        if len(ready) == 2:
            signal.raise_signal(number)
        return 0, 6

    with stopping.handled(), pytest.raises(KeyboardInterrupt):
        team(WAIT, counts)
    assert logs(tmp_path) == ["ready\nstopped by SIGTERM\n"] * 2


def test_a_dead_team_is_one_clear_error(capsys, tracking_uri, tmp_path, monkeypatch):
    # A worker that ends at once stands for one that is killed.
    end = ["-c", "import sys; print('so'); sys.exit(9)"]
    monkeypatch.setattr("studies.runner.study.start_words", lambda page: end)
    places = ["--tracking-uri", tracking_uri, "--storage", f"sqlite:///{tmp_path}/optuna.db"]
    with pytest.raises(SystemExit) as stop:
        cli.main(kl_weight.STUDY, ["--values", "0.1", "--workers", "2", *places])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "worker 2 ended with code 9: " in printed
    assert "no worker is left alive (runs left: 3; logs: " in printed
    assert tracking.connect(tracking_uri).runs(NAME) == []
