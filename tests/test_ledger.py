"""Statuses of MLflow runs: what is overwritten when a trial is repeated, and what never is."""

from harness import ledger, tracking
from harness.runlog import RunLog
from studies.stack import Place, _end_all

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
