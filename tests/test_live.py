"""Messages of the library are shown by a command line, and by nobody else."""

import logging
import subprocess
import sys
from io import StringIO

import pytest
import rich.console
import torch

from harness.metrics.evaluate import on_all_cores
from studies import live

library, pages = logging.getLogger("harness.metrics.quality"), logging.getLogger("studies.summary")


def count(what: str, done: int, of: int) -> None:
    library.info("%s: %d of %d", what, done, of, extra={"progress": True})


def listener() -> tuple[list[tuple[str, bool]], live.Show]:
    shown: list[tuple[str, bool]] = []
    return shown, lambda what, further: shown.append((what, further))


def test_messages_are_shown_while_there_is_a_display():
    shown, show = listener()
    pages.info("before")
    with live.heard(show):
        pages.info("drawing figures")
        count("measuring", 3, 15)
    pages.info("after")
    assert shown == [("drawing figures", False), ("measuring: 3 of 15", True)]


def test_an_inner_display_ends_the_outer_one_which_goes_on_afterwards():
    (outer, show_outer), (inner, show_inner) = listener(), listener()
    with live.heard(show_outer):
        with live.heard(show_inner):
            pages.info("within")
        assert set(outer) == {("", False)}
        pages.info("outside")
    assert (outer[-1], inner) == (("outside", False), [("within", False)])


def test_a_display_leaves_the_loggers_as_they_were():
    loggers = [logging.getLogger(name) for name in live.LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    with live.heard(print):
        pass
    assert before == [(logger.handlers, logger.level, logger.propagate) for logger in loggers]


def test_messages_are_shown_once_where_the_root_has_a_handler(caplog):
    # MLflow gives it one when it makes a database.
    shown, show = listener()
    with caplog.at_level(logging.INFO), live.heard(show):
        pages.info("drawing figures")
    assert (shown, caplog.messages) == ([("drawing figures", False)], [])


def test_a_warning_goes_where_it_goes_without_a_display(caplog):
    shown, show = listener()
    with live.heard(show):
        library.warning("runs are trained one by one")
    assert (shown, caplog.messages) == ([], ["runs are trained one by one"])


WITHOUT = """
import logging
from studies import live
library = logging.getLogger("harness.metrics.quality")
library.info("measuring")
library.warning("before")
with live.heard(print):
    library.warning("meanwhile")
"""


def test_a_program_that_sets_up_no_logging_sees_warnings_alone():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "before\nmeanwhile\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_all_cores_compute_is_counted(workers):
    (shown, show), cpu = listener(), torch.device("cpu")
    torch.set_num_threads(workers)
    items = [("a", "b", "c"), ("a", "b"), ("a",)]
    with live.heard(show):
        counted = on_all_cores(len, (), items, cpu, "measuring")
        quiet = on_all_cores(len, (), items, cpu)
    assert counted == quiet == [3, 2, 1]
    assert shown == [(f"measuring: {i} of 3", True) for i in (1, 2, 3)]


def log(out: StringIO) -> rich.console.Console:
    return rich.console.Console(file=out, width=100, force_terminal=False)


def test_a_log_has_a_line_for_what_begins_and_for_every_tenth():
    out = StringIO()
    with live.bar(log(out), 20) as advance:
        for epoch in range(1, 21):
            advance(1, f"epoch {epoch}")
        pages.info("measuring")
        count("measuring", 1, 2)
    lines = out.getvalue().splitlines()
    assert lines[0] == " 10 %  epoch 2"
    assert lines[-2:] == ["100 %  epoch 20", "       measuring"]
    assert len(lines) == 11


def test_a_log_has_a_line_now_and_then_though_nothing_begins(monkeypatch):
    monkeypatch.setattr(live, "EVERY", 0.0)
    out = StringIO()
    with live.bar(log(out), 1000) as advance:
        advance(1, "epoch 1")
        count("measuring", 1, 2)
    assert out.getvalue().splitlines() == ["  0 %  epoch 1", "       measuring: 1 of 2"]


def test_a_terminal_shows_what_is_done_in_its_moving_line():
    out = StringIO()
    terminal = rich.console.Console(file=out, width=100, force_terminal=True)
    with live.bar(terminal, 10) as advance:
        advance(1, "epoch 1")
        pages.info("measuring finished runs")
    assert "measuring finished runs" in out.getvalue()
