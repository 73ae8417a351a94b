"""Statuses of MLflow runs: what is overwritten when a trial is repeated, and what never is."""

import pytest

from harness import ledger, tracking
from harness.runlog import RunLog
from studies.place import Place
from studies.stack import _end_all

EXPERIMENT = "statuses"


def begun(store, name: str, end: str = "", reason: str = "") -> RunLog:
    """Begin a run of trial 1, and end it if a status is given."""
    experiment = tracking.open_experiment(store, EXPERIMENT, "Why?")
    log = RunLog(store, experiment, name, {"study": "mine", "trial": "1"}, {})
    if reason:
        log.tag("reason", reason)
    if end:
        log.end(end)
    return log


def ends(store) -> dict[str, tuple[str, str | None]]:
    runs = tracking.read_runs(store, EXPERIMENT)
    return {run["name"]: (run["status"], run["tags"].get("reason")) for run in runs}


def test_what_failed_for_a_reason_of_its_own_keeps_it_when_its_trial_is_repeated(tracking_uri):
    store = tracking.connect(tracking_uri)
    begun(store, "open")
    begun(store, "finished", "FINISHED")
    begun(store, "diverged", "FAILED", "diverged in epoch 2: training mse is nan")
    begun(store, "failed", "FAILED", "RuntimeError('CUDA error')")
    begun(store, "stopped", "KILLED", "stopped by SIGINT")
    ledger.bury_runs(store, EXPERIMENT, "mine", [1])
    gone = ("KILLED", "its process is gone")
    assert ends(store) == {
        **dict.fromkeys(("open", "finished", "diverged"), gone),
        "failed": ("FAILED", "RuntimeError('CUDA error')"),
        "stopped": ("KILLED", "stopped by SIGINT"),
    }


def test_a_log_that_cannot_be_sent_leaves_no_other_run_open(tracking_uri, tiny):
    store = tracking.connect(tracking_uri)
    logs = [begun(store, "refused"), begun(store, "sent")]
    for log in logs:
        log.metrics({"mse": 0.5}, 1)
    store.client.delete_run(logs[0].run_id)  # MLflow refuses to write to it
    experiment = tracking.open_experiment(store, EXPERIMENT, "Why?")
    place = Place(None, tiny, "cpu", store, experiment, lambda record: None)
    _end_all(logs, place, KeyboardInterrupt("stopped by SIGTERM"))
    assert ends(store) == {"sent": ("KILLED", "stopped by SIGTERM")}
    assert store.client.get_run(logs[1].run_id).data.metrics == {"mse": 0.5}


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (KeyboardInterrupt("stopped by SIGTERM"), ("KILLED", "stopped by SIGTERM")),
        (KeyboardInterrupt(), ("KILLED", "stopped by Ctrl-C")),
        (SystemExit(1), ("KILLED", "its process ended with exit code 1")),
        (ValueError("3"), ("FAILED", "ValueError('3')")),
    ],
)
def test_every_end_has_a_reason_in_words(error, end):
    assert ledger.interruption(error) == end


@pytest.mark.parametrize(
    ("script", "named"),
    [("/home/x/studies/kl_weight.py", "studies/kl_weight.py"), ("/home/x/mine.py", "mine.py")],
)
def test_a_run_says_which_script_made_it_and_not_where_it_is(
    tracking_uri, script, named, monkeypatch
):
    monkeypatch.setattr("sys.argv", [script])
    store = tracking.connect(tracking_uri)
    begun(store, "one", "FINISHED")
    (run,) = tracking.read_runs(store, EXPERIMENT)
    assert run["tags"]["mlflow.source.type"] == "LOCAL"
    assert run["tags"]["mlflow.source.name"] == named
