"""The journal of what waits for a server, and when the server is asked."""

import json
import math
import multiprocessing
import os
import resource
import signal

import pytest

from harness import UserError
from harness.journal import Journal, Write
from harness.outbox import LONGEST_PAUSE, Outbox, Pace, Unavailable


def write(run: str, kind: str, **values) -> Write:
    return Write(run, "7", kind, values)


def a_run(run: str) -> list[Write]:
    return [
        write(run, "create"),
        write(run, "batch", metrics=[["a", 1.5, 0, 1]]),
        write(run, "end"),
    ]


class Desk:
    """Takes writes while it is open."""

    def __init__(self) -> None:
        self.open, self.taken, self.asked = True, [], 0
        self.searched: set[str] = set()
        self.refuses: type[Exception] | None = None

    def send(self, write, run_id, *, again):
        """Take a write, or say that it is closed."""
        self.asked += 1
        if not self.open:
            raise Unavailable("closed")
        self.taken.append((write.run, write.kind, write.values, run_id, again))
        return run_id or f"id-of-{write.run}"

    def remove_others(self, experiment, key, run_id):
        """Look whether the run is one that it knows."""
        if self.refuses:
            raise self.refuses("not now")
        assert (experiment, run_id) == ("7", f"id-of-{key}")
        self.searched.add(key)


@pytest.fixture
def desk():
    return Desk()


@pytest.fixture
def outbox(tmp_path, desk):
    return Outbox(tmp_path / "box", "http://x", desk)


def journals(folder):
    return list(folder.rglob("writes.jsonl"))


def left(folder) -> Journal:
    (found,) = journals(folder)
    journal = Journal.left(found.parent)
    assert journal is not None
    return journal


def test_order_is_kept_whatever_fails(outbox, desk, tmp_path):
    first, second = a_run("a"), a_run("b")
    outbox.put(first[0])
    desk.open = False
    for item in [first[1], *second[:2], first[2]]:
        outbox.put(item)
    assert len(journals(tmp_path)) == 1
    desk.open = True
    outbox.settle()
    outbox.put(second[2])
    said = [(run, kind) for run, kind, *_ in desk.taken]
    assert said == [("a", "create"), ("a", "batch"), ("b", "create"), ("b", "batch")] + [
        ("a", "end"),
        ("b", "end"),
    ]
    assert [again for *_, again in desk.taken] == [False, True, True, True, True, False]
    assert desk.taken[1][2] == {"metrics": [["a", 1.5, 0, 1]]}
    assert journals(tmp_path) == []


def test_a_server_that_is_away_is_asked_rarely(outbox, desk):
    desk.open = False
    for item in a_run("a") * 100:
        outbox.put(item)
    assert desk.asked < 10


def test_pauses_double_up_to_a_minute_and_slow_answers_cost_a_tenth(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def pause(seconds: float, *, answered: bool) -> float:
        nonlocal now
        pace.note(seconds, answered=answered)
        start = now
        while not pace.ready():
            now += 0.5
        return now - start

    pace = Pace()
    assert [pause(0, answered=False) for _ in range(8)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        *2 * [LONGEST_PAUSE],
    ]
    assert pause(0.1, answered=True) == 0
    assert pause(4, answered=True) == 36
    assert pause(5, answered=False) == 45
    assert pause(0, answered=False) == 2


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_is_no_write(cut, tmp_path):
    journal = Journal.new(tmp_path)
    for item in a_run("a"):
        journal.keep(item)
    journal._lock.release()  # as the death of its process does
    file = journal.folder / "writes.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    taken = left(tmp_path)
    assert [item.kind for _, item in taken.waiting] == ["create", "batch"]
    assert taken.unfinished == {"a": "7"}
    taken.keep(write("a", "end"))
    taken._lock.release()
    assert [item.kind for _, item in left(tmp_path).waiting] == ["create", "batch", "end"]


def test_a_line_broken_elsewhere_is_one_clear_error(tmp_path):
    journal = Journal.new(tmp_path)
    for item in a_run("a"):
        journal.keep(item)
    journal._lock.release()
    file = journal.folder / "writes.jsonl"
    file.write_text(file.read_text().replace('"batch"', "batch", 1))
    with pytest.raises(UserError, match=r"writes.jsonl is broken in line 2; delete"):
        left(tmp_path)


def test_values_come_back_as_they_were(tmp_path):
    values = [0.1, 1 / 3, 5e-324, -0.0, math.inf, -math.inf, math.nan]
    (tmp_path / "files" / "sub").mkdir(parents=True)
    (tmp_path / "files" / "sub" / "x").write_bytes(b"\x00\xff")
    journal = Journal.new(tmp_path / "box")
    journal.keep(Write("a", "7", "files", {"values": values, "text": 'é"\n'}, tmp_path / "files"))
    journal._lock.release()
    ((_, item),) = left(tmp_path).waiting
    assert repr(item.values) == repr({"values": values, "text": 'é"\n'})
    assert (item.folder / "sub" / "x").read_bytes() == b"\x00\xff"


def _die_with_a_journal(folder, kinds: int) -> None:
    desk = Desk()
    desk.open = False
    outbox = Outbox(folder, "http://x", desk)
    for item in a_run("a")[:kinds]:
        outbox.put(item)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_what_a_killed_process_left_is_delivered_and_its_run_ended(kinds, outbox, desk, tmp_path):
    child = multiprocessing.get_context("fork").Process(
        target=_die_with_a_journal, args=(tmp_path / "box", kinds)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    outbox.settle()
    kinds_taken = [kind for _, kind, *_ in desk.taken]
    ended = ["create", "batch", "end"]
    assert desk.searched == {"a"}, "the dead may have created it twice"
    assert kinds_taken == (ended if kinds == 3 else [*ended[:kinds], "tag", "end"])
    assert journals(tmp_path) == []


def test_the_journal_of_a_living_process_is_left_alone(outbox, desk, tmp_path):
    desk.open = False
    outbox.put(a_run("a")[0])
    other = Desk()
    Outbox(tmp_path / "box", "http://x", other).settle()
    assert other.taken == []
    assert len(journals(tmp_path)) == 1


def test_what_was_delivered_is_not_delivered_again(tmp_path, desk):
    journal = Journal.new(tmp_path / "box")
    for item in [*a_run("a"), *a_run("b")]:
        journal.keep(item)
    for _ in range(2):
        journal.run_ids["a"] = "id-of-a"
        journal.delivered()
    journal._lock.release()
    Outbox(tmp_path / "box", "http://x", desk).settle()
    assert [(run, kind) for run, kind, *_ in desk.taken] == [
        ("a", "end"),
        *[("b", item.kind) for item in a_run("b")],
    ]
    assert desk.taken[0][3] == "id-of-a"


@pytest.mark.parametrize("torn", [b"\x00\x00\x00\n", b"0 a\n", b"x a id\n", b"\xff b c\n"])
def test_a_torn_note_of_delivery_costs_a_second_delivery_and_nothing_else(torn, tmp_path, desk):
    journal = Journal.new(tmp_path / "box")
    for item in a_run("a"):
        journal.keep(item)
    (journal.folder / "done.txt").write_bytes(torn)
    journal._lock.release()
    Outbox(tmp_path / "box", "http://x", desk).settle()
    assert [kind for _, kind, *_ in desk.taken] == ["create", "batch", "end"]


def test_a_line_that_is_no_text_is_one_clear_error(tmp_path):
    journal = Journal.new(tmp_path)
    journal.keep(a_run("a")[0])
    with (journal.folder / "writes.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    journal._lock.release()
    with pytest.raises(UserError, match=r"writes.jsonl is broken in line 2; delete"):
        left(tmp_path)


def test_a_line_that_was_refused_does_not_come_when_the_file_is_closed(tmp_path):
    journal = Journal.new(tmp_path / "box")
    journal.keep(a_run("a")[0])
    file = journal.folder / "writes.jsonl"
    before = file.read_bytes()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x").touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            journal.keep(Write("a", "7", "files", {"path": "x" * 99}, tmp_path / "files"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert list((journal.folder / "files").iterdir()) == []


@pytest.mark.parametrize("error", [Unavailable, UserError])
def test_a_twin_that_cannot_be_removed_now_is_removed_later_and_refuses_no_write(
    error, outbox, desk, tmp_path, capsys
):
    desk.open, desk.refuses = False, error
    for item in a_run("a"):
        outbox.put(item)
    desk.open = True
    outbox.settle()
    assert [kind for _, kind, *_ in desk.taken] == ["create", "batch", "end"]
    assert journals(tmp_path) == []
    desk.refuses = None
    outbox.settle()
    assert desk.searched == ({"a"} if error is Unavailable else set())
    assert ("may be there twice" in capsys.readouterr().err) == (error is UserError)


def test_a_full_disk_is_one_clear_error_and_leaves_whole_lines(tmp_path, monkeypatch):
    journal = Journal.new(tmp_path)
    journal.keep(a_run("a")[0])
    before = (journal.folder / "writes.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            journal.keep(a_run("a")[1])
    assert (journal.folder / "writes.jsonl").read_bytes() == before
    journal.keep(a_run("a")[1])
    lines = (journal.folder / "writes.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["create", "batch"]
