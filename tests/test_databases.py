"""The lock of a shared database, patience while it is away, and the pulse."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import sqlalchemy
from studies.databases import exclusive, is_away, patiently, pulse
from studies.storage import open_storage

from harness import UserError
from studies import databases


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    """Return the address of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/optuna.db"
    return request.getfixturevalue("postgres").create(f"db{time.monotonic_ns()}")


def hold(url, name, there):
    with exclusive(url, name):
        there.send("in")
        there.recv()


@pytest.fixture
def holder(url):
    """Let another process hold the lock 'a' of the database."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(url, "a", there))
    process.start()
    assert here.recv() == "in"
    yield process, here
    process.kill()
    process.join()


def waits_for(url, name):
    """Begin to wait for a lock; the event is set once it was held."""
    had = threading.Event()

    def work():
        with exclusive(url, name):
            had.set()

    threading.Thread(target=work, daemon=True).start()
    return had


def test_a_lock_is_one_processs_until_it_leaves_or_dies(url, holder):
    process, here = holder
    had = waits_for(url, "a")
    with exclusive(url, "b"):  # another name is another lock
        assert not had.wait(0.5)
    process.kill()
    assert had.wait(30)


def test_postgres_takes_its_lock_from_a_process_that_is_stopped(postgres, monkeypatch):
    monkeypatch.setattr(databases, "SILENCE", 1)
    # As of a process that is stopped.
    monkeypatch.setattr(databases, "pulse", lambda beat, seconds: pulse(beat, 1000))
    url = postgres.create("silent")
    with pytest.raises(sqlalchemy.exc.DBAPIError) as left, exclusive(url, "a"):
        assert waits_for(url, "a").wait(30)
    assert is_away(left.value)


def test_a_lock_whose_connection_is_lost_says_so_also_after_a_pulse(postgres, monkeypatch):
    monkeypatch.setattr(databases, "SILENCE", 1)
    url = postgres.create("lost")
    engine = sqlalchemy.create_engine(url)
    others = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"

    def lose():
        with exclusive(url, "a"):
            with engine.connect() as connection:
                connection.exec_driver_sql(f"{others} and datname = 'lost'")
            time.sleep(0.6)

    with pytest.raises(sqlalchemy.exc.SQLAlchemyError) as lost:
        lose()
    engine.dispose()
    assert is_away(lost.value)


def test_a_pulse_keeps_the_lock_of_a_process_that_is_busy(postgres, monkeypatch):
    monkeypatch.setattr(databases, "SILENCE", 1)
    url = postgres.create("busy")
    with exclusive(url, "a"):
        assert not waits_for(url, "a").wait(2.5)


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "postgresql+pg8000://u:secret@h/d"])
def test_a_database_without_a_lock_is_refused_without_its_password(url):
    with pytest.raises(UserError, match="sqlite:///FILE, or postgresql") as refusal:
        open_storage(url)
    assert "secret" not in str(refusal.value)


def test_a_server_that_is_not_there_is_named_without_its_password():
    with pytest.raises(UserError, match="--storage postgresql.*cannot be used") as refusal:
        open_storage("postgresql+psycopg://u:secret@127.0.0.1:9/d")
    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_work_is_repeated_as_a_whole_while_the_database_is_away():
    away = sqlalchemy.exc.OperationalError("select", {}, Exception("gone"))
    begun = []

    def inner():
        begun.append("inner")
        if len(begun) < 6:
            raise away
        return "done"

    def outer():
        begun.append("outer")
        return patiently(inner, "sqlite:///x.db")

    assert patiently(outer, "sqlite:///x.db") == "done"
    assert begun == ["outer", "inner"] * 3


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(databases, "PATIENCE", 0)
    away = sqlalchemy.exc.OperationalError("select", {}, Exception("gone"))

    def work():
        raise away

    with pytest.raises(UserError, match="--storage"):
        patiently(work, "postgresql://u:secret@h/d")
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0, "postgresql://h/d")


def test_a_full_disk_is_not_waited_for(tmp_path):
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/x.db")
    with engine.connect() as connection:
        connection.exec_driver_sql("pragma max_page_count = 1")
        with pytest.raises(sqlalchemy.exc.OperationalError) as full:
            connection.exec_driver_sql("create table t (x)")
    engine.dispose()
    assert not is_away(full.value)


def test_no_pulse_is_under_way_while_a_process_forks():
    lock = threading.Lock()

    def beat():
        with lock:
            time.sleep(0.002)

    with pulse(beat, 0.0001):
        for _ in range(15):
            child = os.fork()
            if child == 0:  # a lock that a beat held would never be free here
                os._exit(0 if lock.acquire(timeout=1) else 1)
            assert os.waitpid(child, 0)[1] == 0


def test_a_pulse_goes_on_after_an_error():
    beats = threading.Semaphore(0)

    def beat():
        beats.release()
        raise OSError

    with pulse(beat, 0.001):
        for _ in range(3):
            assert beats.acquire(timeout=30)


def test_signals_are_heeded_while_the_database_is_away(monkeypatch):
    from studies.runner import stopping

    away = sqlalchemy.exc.OperationalError("select", {}, Exception("gone"))

    def work():
        stopping._received.append(signal.SIGINT)
        raise away

    monkeypatch.setattr(stopping, "_received", [])
    with pytest.raises(KeyboardInterrupt):
        patiently(work, "postgresql://h/d")
