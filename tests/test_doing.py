"""What is being done is said to whoever listens, and to nobody else."""

from io import StringIO

import pytest
import rich.console
import torch

from harness import doing
from harness.cores import crew
from studies import live


def said() -> tuple[list[tuple[str, bool]], doing.Show]:
    heard: list[tuple[str, bool]] = []
    return heard, lambda what, further: heard.append((what, further))


def test_what_is_said_reaches_the_listener_while_it_listens():
    heard, show = said()
    doing.say("before")
    with doing.heard(show):
        doing.say("drawing figures")
        doing.count("measuring", 3, 15)
    doing.say("after")
    assert heard == [("drawing figures", False), ("measuring: 3 of 15", True)]


def test_an_inner_listener_is_heard_alone_and_the_outer_one_again():
    (outer, show_outer), (inner, show_inner) = said(), said()
    with doing.heard(show_outer):
        with doing.heard(show_inner):
            doing.say("within")
        doing.say("outside")
    assert (outer, inner) == ([("outside", False)], [("within", False)])


def test_a_program_without_a_listener_prints_nothing(capfd):
    doing.say("unheard")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crew_counts_what_is_done_if_it_is_told_what(workers):
    heard, show = said()
    with doing.heard(show), crew(lambda item: item, workers, torch.device("cpu")) as cores:
        assert cores.map(range(3), "measuring") == [0, 1, 2]
        assert cores.map(range(3)) == [0, 1, 2]
    assert [what for what, _ in heard] == [f"measuring: {i} of 3" for i in (1, 2, 3)]


def log(out: StringIO) -> rich.console.Console:
    return rich.console.Console(file=out, width=100, force_terminal=False)


def test_a_log_has_a_line_for_what_begins_and_for_every_tenth():
    out = StringIO()
    with live.bar(log(out), 20) as advance:
        for epoch in range(1, 21):
            advance(1, f"epoch {epoch}")
        doing.say("measuring")
        doing.count("measuring", 1, 2)
    lines = out.getvalue().splitlines()
    assert lines[0] == " 10 %  epoch 2"
    assert lines[-2:] == ["100 %  epoch 20", "       measuring"]
    assert len(lines) == 11


def test_a_log_has_a_line_now_and_then_though_nothing_begins(monkeypatch):
    monkeypatch.setattr(live, "EVERY", 0.0)
    out = StringIO()
    with live.bar(log(out), 1000) as advance:
        advance(1, "epoch 1")
        doing.count("measuring", 1, 2)
    assert out.getvalue().splitlines() == ["  0 %  epoch 1", "       measuring: 1 of 2"]


def test_a_terminal_shows_what_is_done_in_its_moving_line():
    out = StringIO()
    terminal = rich.console.Console(file=out, width=100, force_terminal=True)
    with live.bar(terminal, 10) as advance:
        advance(1, "epoch 1")
        doing.say("measuring finished runs")
    assert "measuring finished runs" in out.getvalue()
