"""Output of a command: messages, progress, a table that fits, addresses; or JSON."""

import json
import logging
import re
import socket
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from harness import RunConfig, tracking
from harness.tracking import page
from studies.runner import terminal
from studies.runner.summary import Outcome
from studies.runner.terminal import Terminal

library, pages = logging.getLogger("harness.metrics.quality"), logging.getLogger("studies.search")

WIDE = {
    "weight": ["calibrated weight"],
    "latent_size": [10],
    **{name: [0.012345] for name in ("val/neg_elbo", "neg_elbo", "mse", "rate")},
    **{name: [0.012345] for name in ("best/epoch", "pca_floor", "calibration_ratio")},
    **{f"{name}±": [0.0012345] for name in ("val/neg_elbo", "mse", "pca_floor")},
    "seeds": [3],
}


def log(out: StringIO, width: int = 100) -> Terminal:
    """Return a log file."""
    shown = Terminal()
    shown.out.file, shown.out.width = out, width
    return shown


def count(what: str, done: int, of: int) -> None:
    library.info("%s: %d of %d", what, done, of, extra={"progress": True})


# --- messages -----------------------------------------------------------------------------------


def test_messages_are_lines_while_they_are_shown():
    out = StringIO()
    pages.info("before")
    with log(out).shown():
        pages.info("drawing [figures]")
        count("measuring", 3, 15)
    pages.info("after")
    assert out.getvalue() == "       drawing [figures]\n"


def test_a_log_has_a_line_now_and_then_though_nothing_begins(monkeypatch):
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    out = StringIO()
    shown = log(out)
    on_epoch = shown.progress(1000, 1000)
    with shown.shown():
        on_epoch.advance(1, "epoch 1")  # too early for an estimate
        on_epoch.advance(19, "epoch 20")
        count("measuring", 1, 2)
    start, first, second = out.getvalue().splitlines()
    assert start == "  0 %  epoch 1"
    assert re.fullmatch(r"  2 %  epoch 20, .* left", first)
    assert second == "       measuring: 1 of 2"


def test_a_log_has_no_control_characters():
    out = StringIO()
    shown = log(out)
    with shown.shown():
        shown.line("Why?")
        shown.progress(1, 1).advance(1, "epoch 1")
        shown.outcome(outcome(), None)
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()


def test_showing_leaves_the_loggers_as_they_were():
    loggers = [logging.getLogger(name) for name in terminal.LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    with log(StringIO()).shown():
        assert not any(logger.propagate for logger in loggers)
    assert before == [(logger.handlers, logger.level, logger.propagate) for logger in loggers]


def test_messages_are_shown_once_where_the_root_has_a_handler(caplog):
    # MLflow gives the root one when it makes a database.
    out = StringIO()
    with caplog.at_level(logging.INFO), log(out).shown():
        pages.info("drawing figures")
    assert (out.getvalue(), caplog.messages) == ("       drawing figures\n", [])


def test_a_warning_goes_where_it_goes_otherwise(caplog):
    out = StringIO()
    with log(out).shown():
        library.warning("runs are trained one by one")
    assert (out.getvalue(), caplog.messages) == ("", ["runs are trained one by one"])


WITHOUT = """
import logging
from studies.runner.terminal import Terminal
library = logging.getLogger("harness.metrics.quality")
library.info("measuring")
library.warning("before")
with Terminal().shown():
    library.warning("meanwhile")
"""


def test_a_program_that_sets_up_no_logging_sees_warnings_alone():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "before\nmeanwhile\n")


# --- progress -----------------------------------------------------------------------------------


def test_a_log_has_a_line_for_every_message_the_first_epoch_and_every_tenth():
    out = StringIO()
    shown = log(out)
    on_epoch = shown.progress(20, 20)
    with shown.shown():
        for epoch in range(1, 21):
            on_epoch.advance(1, f"epoch {epoch}")
        pages.info("measuring")
        count("measuring", 1, 2)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["  5 %  epoch 1, 0 s left", " 10 %  epoch 2, 0 s left"]
    assert lines[-2:] == ["100 %  epoch 20", "       measuring"]
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("left", "line"),
    [
        (6, ""),
        (4, "2 runs are finished; 4 are left.\n"),
        (5, "1 run is finished; 5 are left.\n"),
        (1, "5 runs are finished; 1 is left.\n"),
        (0, "6 runs are finished; 0 are left.\n"),
    ],
)
def test_finished_runs_are_counted_before_training(left, line):
    out = StringIO()
    log(out).progress(6, left)
    assert out.getvalue() == line


@pytest.mark.parametrize(
    ("runs", "threads", "line"),
    [
        (2, 1, "2 of 8 cores are used: 2 runs; --threads-per-run 4 uses all"),
        (1, 1, "1 of 8 cores is used: 1 run; --threads-per-run 8 uses all"),
        (3, 1, "3 of 8 cores are used: 3 runs; --threads-per-run 2 uses 6"),
        (2, 3, "6 of 8 cores are used: 2 runs; --threads-per-run 4 uses all"),
        (5, 1, ""),  # no more threads fit
        (2, 4, ""),
        (9, 1, ""),
    ],
)
def test_cores_that_more_threads_would_use_are_named(runs, threads, line):
    out = StringIO()
    log(out).cores(runs, threads, 8)
    assert out.getvalue() == (f"{line}, for large networks\n" if line else "")


def test_runs_that_other_processes_finish_count_once():
    out = StringIO()
    on_epoch = log(out).progress(4, 4)
    for runs in (0, 1, 1, 3, 2, 4):
        on_epoch.elsewhere(runs)
    on_epoch.elsewhere(3, "3 left")
    left = ", 0 s left"
    texts = [f" 25 %  other processes go on{left}", f" 75 %  other processes go on{left}"]
    assert out.getvalue().splitlines() == [*texts, "100 %  other processes go on"]


# --- the outcome --------------------------------------------------------------------------------


FOUND = {
    **{"study": "x", "experiment_id": "7", "tracking_uri": "sqlite:///m.db", "report": "r.html"},
    **{"verdict": ["b is best.", "3 seeds.", "Next: more."], "best_row": 1, "answer": "So."},
    **{"warnings": ["No latent is active.", "One [seed]."], "model_run_id": "0f"},
}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_verdict_is_first_then_the_table_warnings_and_the_answer(is_terminal):
    out, shown = StringIO(), Terminal()
    of_kind = {"force_terminal": is_terminal, "color_system": "standard" if is_terminal else None}
    shown.out = terminal._Screen(file=out, width=80, highlight=False, markup=False, **of_kind)
    shown.show(FOUND | {"table": [{"name": "a", "mse": 0.2}, {"name": "b", "mse": 0.1}]})
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines[:3] == FOUND["verdict"]
    rows = [line.split() for line in lines[3:7]]
    assert [row[0] for row in rows[:1] + rows[2:]] == ["name", "a", "b"]
    assert rows[2:] == [["a", "0.2"], ["b", "*", "0.1"]]
    warnings = [f"Warning: {text}" for text in FOUND["warnings"]]
    after = ["So.", "Report: r.html", "Model: load_run('0f')"]
    assert lines[7:12] == [*warnings, *after]
    assert ("\x1b[1mb is best." in out.getvalue()) == is_terminal


def test_a_table_is_shown_without_intervals_that_it_lacks():
    table = pd.DataFrame(WIDE | {"neg_elbo±": [float("nan")], "hidden": ["6,4"]})
    out = StringIO()
    log(out).show(FOUND | {"best_row": 0, "table": terminal.records(table)})
    assert "calibrated weight *" in out.getvalue()
    assert "6,4" in out.getvalue()
    assert "nan" not in out.getvalue()


def planned(name: str) -> SimpleNamespace:
    """Return what is shown of a plan."""
    source = SimpleNamespace(name="digits")
    return SimpleNamespace(name=name, source=source, sentence="3 runs", command=f"python {name}")


def outcome() -> Outcome:
    return Outcome(planned("x"), pd.DataFrame(WIDE), "It is so.", Path("reports/x"), "7")


def screen(width: int, tracking_uri: str | None = None) -> str:
    out = StringIO()
    log(out, width).outcome(outcome(), tracking_uri)
    return out.getvalue()


@pytest.mark.parametrize("width", [100, 80, 70])
def test_a_table_that_is_too_wide_loses_columns_and_no_digits(width):
    printed = screen(width)
    assert "…" not in printed
    assert "calibrated weight" in printed
    table, missing = printed.split("\nColumns not shown: ")
    left_out = missing.partition("; the report has them.\n")[0].split(", ")
    assert ("pca_floor" in left_out) == ("pca_" not in table) == (width <= 80)
    assert {"neg_elbo", "val/neg_elbo"} & {*left_out} == {"neg_elbo"}
    assert max(map(len, table.splitlines())) <= width


def test_columns_that_no_width_has_room_for_are_named_and_a_long_name_is_whole():
    names = [f"metric_{'x' * i}" for i in range(12)]
    table = pd.DataFrame({"condition": ["Q" * 90], **{name: [0.125] for name in names}})
    out = StringIO()
    log(out, 80).show(FOUND | {"best_row": 0, "table": terminal.records(table)})
    printed = out.getvalue()
    assert printed.count("Q") == 90
    assert "…" not in printed
    missing = printed.split("Columns not shown: ")[1].partition("; the report")[0].split(", ")
    assert names[1:] == missing
    assert "0.125" in printed


@pytest.mark.parametrize("named", ["option", "environment"])
def test_the_link_is_to_the_store_that_was_written(named, monkeypatch, tmp_path):
    uri = f"sqlite:///{tmp_path}/m.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if named == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    printed = screen(100, uri if named == "option" else None)
    assert f"mlflow ui --workers 1 --backend-store-uri {uri}, then http://127.0.0.1:5000" in printed
    assert f"/#/experiments/7{page.link(outcome().plan.name)}" in printed
    assert sys.executable in printed


def test_no_link_shows_a_password():
    assert f"Every run: https://host/#/experiments/7{page.link(outcome().plan.name)}" in screen(
        100, "https://host/"
    )
    printed = screen(100, "sqlite:///m.db?password=secret")
    assert "sqlite:///m.db, then " in printed
    assert "secret" not in printed


def test_the_stores_of_a_dry_run_are_named_without_passwords(capsys):
    stores = "sqlite:///m.db?password=secret", "postgresql+psycopg://me:secret@host/o"
    Terminal().dry_run(stores, 1, 2, {"disk": "about 2 MB", "estimate": "duration: not known"})
    shown = "sqlite:///m.db", "postgresql+psycopg://host/o"
    assert capsys.readouterr().out.splitlines() == [
        f"Tracking: {shown[0]}",
        f"Storage: {shown[1]}",
        "Runs: 1 is finished, 2 are missing; nothing is refused.",
        "Disk: about 2 MB",
        "duration: not known",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0 kB"), (9_940, "9.9 kB"), (9_960, "10 kB"), (2.5e6, "2.5 MB"), (7e12, "7000 GB")],
)
def test_a_size_is_written_in_round_numbers(number, text):
    assert terminal.in_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 s"), (42.4, "42 s"), (91, "2 min"), (3600, "60 min"), (9000, "2.5 h")],
)
def test_a_duration_is_written_in_round_numbers(seconds, text):
    assert terminal.duration(seconds) == text


def test_a_duration_is_estimated_from_finished_runs_of_the_experiment(tracking_uri, tmp_path):
    config = RunConfig(epochs=20)
    plan = SimpleNamespace(experiment="x-digits", configs=[config] * 4)
    unknown = "duration: not known (no finished run like these here). Nothing was trained."
    client = tracking.connect(tracking_uri).client
    nothing = {"disk": unknown[10:-22], "estimate": unknown}
    assert terminal.expected(plan, 4, "cpu", tracking_uri) == nothing
    experiment = client.create_experiment("x-digits")
    params = {name: str(getattr(config, name)) for name in terminal.ALIKE}
    for changed in ({}, {}, {"device": "cuda"}, {"hidden": "(9,)"}):
        run = client.create_run(experiment, 1000, {"host": socket.gethostname()}).info.run_id
        given = {**params, "device": "cpu", "epochs": "10", "stack_width": "3", **changed}
        for name, value in given.items():
            client.log_param(run, name, value)
        client.log_text(run, "x" * 3_000_000, "model.txt")
        client.set_terminated(run, end_time=181_000)  # 60 s of each of three runs
    found = terminal.expected(plan, 4, "cpu", tracking_uri)
    assert found["estimate"].startswith("duration: about 8 min (from 2 finished runs here)")
    left = terminal.expected(plan, 1, "cpu", tracking_uri)
    assert left["estimate"].startswith("duration: about 2 min (from 2 finished runs here)")
    of_epochs = 20 * tracking.connect(tracking_uri).bytes_of_an_epoch()
    for missing, each in ((4, found), (1, left)):
        about = terminal.in_bytes(missing * (3_000_000 + of_epochs))
        assert each["disk"].startswith(f"about {about} (from 2 finished runs and the database")
    assert "no run is missing" in terminal.expected(plan, 0, "cpu", tracking_uri)["disk"]
    for uri in (f"sqlite:///{tmp_path}/none.db", "http://127.0.0.1:9"):
        assert terminal.expected(plan, 4, "cpu", uri) == nothing
    assert not (tmp_path / "none.db").exists()


def test_json_is_one_object_with_every_digit_and_all_else_is_on_standard_error(capsys):
    table = pd.DataFrame({"kl_weight": [0.1, 1 / 3], "mse": [float("nan"), 2.0], "seeds": [3, 3]})
    found = Outcome(planned("x-2"), table, "It is so.", Path("/reports/x"), "7")
    shown = Terminal(json=True)
    with shown.shown():
        shown.line("Why?")
        shown.plan(planned("x"), 64)
        pages.info("drawing figures")
        print("printed by a library")
        shown.progress(1, 1).elsewhere(1)
    shown.outcome(found, "sqlite:///m.db?password=secret")
    shown.finish(0)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "study": "x-2",
        "dataset": "digits",
        "command": "python x",
        "status": "finished",
        "table": [
            {"kl_weight": 0.1, "mse": None, "seeds": 3},
            {"kl_weight": 1 / 3, "mse": 2.0, "seeds": 3},
        ],
        **terminal.ANSWERED,
        "experiment_id": "7",
        "answer": "It is so.",
        "report": "/reports/x/report.html",
        "tracking_uri": "sqlite:///m.db",
        "exit_code": 0,
    }
    for text in ("Why?", "3 runs", "drawing figures", "printed by a library", "100 %"):
        assert text in printed.err
    assert "It is so." not in printed.err


def test_json_goes_to_standard_output_alone(capsys):
    shown = Terminal(json=True)
    with shown.shown():
        pages.info("drawing figures")
        print("printed by a library")
    shown.finish(0)
    assert capsys.readouterr().out == '{"exit_code": 0}\n'


def test_the_json_of_several_studies_is_one_object_too(capsys):
    shown = Terminal(json=True)
    for name in ("x", "y"):
        shown.plan(planned(name), 64)
    shown.finish(2, "error: y cannot be used")
    assert json.loads(capsys.readouterr().out) == {
        "studies": [
            {"study": x, "dataset": "digits", "command": f"python {x}", "status": "unfinished"}
            for x in ("x", "y")
        ],
        "error": "y cannot be used",
        "exit_code": 2,
    }
