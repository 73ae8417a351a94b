"""The runner's loop: a toy through the queue, warnings and sentences on runs made elsewhere."""

import logging
from functools import partial

import toy
from opened import queue_at

from harness import RunConfig
from harness.tracking import connect, record
from harness.tracking.record import log_in
from harness.tracking.runs import Run
from studies import kl_weight
from studies.runner import cli, run
from studies.runner.proposers import Cell, Listed
from studies.runner.study import KNOWN, Plan, make_plan
from studies.runner.summary import differing
from studies.runner.terminal import Terminal

RATES = (0.1, 0.5, 0.9)


def plan_of(rates) -> Plan:
    configs = [RunConfig(learning_rate=rate, epochs=3) for rate in rates]
    cells = [
        Cell({"rate": config.learning_rate}, config, f"rate={config.learning_rate}", {})
        for config in configs
    ]
    proposer = Listed(cells, {"toy": True}, ("val/mse",))
    return Plan("toy", "Which rate?", "toy", KNOWN["digits"], configs, proposer, print, "", "")


def site_of(plan, data, uri) -> run.Site:
    store = connect(uri)
    start = log_in(store, plan.experiment, plan.question)
    return run.Site(plan, data, "cpu", store, start, None)


def test_a_toy_is_trained_through_the_queue(tracking_uri, sqlite_url, tiny, monkeypatch):
    monkeypatch.setattr(record, "record", partial(record.record, **toy.PARTS))
    site = site_of(plan_of(RATES), tiny, tracking_uri)
    queue = queue_at(sqlite_url, site.plan.proposer, "toy", site.store.complete)
    run.work(queue, site, Terminal().progress(3, 3))
    runs = {item.key: item for item in site.store.runs("toy-digits", study="toy", role="run")}
    trials = queue.trials("COMPLETE")
    assert len(trials) == len(runs) == 3
    for trial in trials:
        (key,) = trial.user_attrs["keys"]
        assert trial.value == runs[key].metrics["val/mse"]
        assert trial.user_attrs["cell"]["rate"] == float(runs[key].params["learning_rate"])
    assert [item.tags["place"] for item in runs.values()] == ["0", "1", "2"]


def test_runs_of_other_code_are_named_at_the_start_and_in_the_answer(
    tracking_uri, sqlite_url, tiny, monkeypatch, caplog
):
    monkeypatch.setattr(record, "record", partial(record.record, **toy.PARTS))
    site = site_of(plan_of(RATES[:1]), tiny, tracking_uri)
    queue = queue_at(sqlite_url, site.plan.proposer, "toy", site.store.complete)
    run.work(queue, site, Terminal().progress(1, 1))
    with caplog.at_level(logging.WARNING):
        run._compare_making(site)
    assert caplog.messages == []
    (known,) = site.store.runs("toy-digits", role="run")
    site.store.tag(known.run_id, "sources", "0123456789ab")
    with caplog.at_level(logging.WARNING):
        run._compare_making(site)
    (message,) = caplog.messages
    assert "made with other code (0123456789ab; here " in message
    other = Run("", "", "FINISHED", known.params, {}, known.tags)
    assert differing([known, known]) == []
    changed = other._replace(tags={**known.tags, "sources": "0123456789ab"})
    (sentence,) = differing([known, known, changed])
    assert f"(2 with {known.tags['sources']}; 1 with 0123456789ab)" in sentence
    assert differing([known, other._replace(tags={})]) == []  # the first edition has no digest


def test_a_process_that_did_not_write_the_summary_prints_its_answer_and_address(
    finished, data, capsys
):
    plan = make_plan(kl_weight.STUDY, cli.parse(kl_weight.STUDY, finished.arguments))
    site = site_of(plan, data, finished.tracking_uri)
    queue = queue_at(finished.storage, plan.proposer, plan.name, site.store.complete)
    shown = Terminal()
    assert run.conclude(queue, site, shown, again=False) is None
    printed = capsys.readouterr().out
    assert "Another process wrote the summary" in printed
    assert "Best: kl_weight = 1. Its mean" in printed
    assert [row["kl_weight"] for row in shown.study["table"]] == [0, 0.02, 1]
    assert shown.study["best"] == shown.study["table"][shown.study["best_row"]]["kl_weight"]
