"""The lock of a shared database, retries while it is away, heartbeats, ended processes."""

import multiprocessing
import os
import signal
import threading
import time

import optuna
import pytest
import sqlalchemy

from harness import UserError
from studies.runner import database, stopping
from studies.runner.database import (
    BEAT,
    exclusive,
    has_study,
    heartbeat_seconds,
    is_away,
    is_gone,
    open_storage,
    process_name,
    pulse,
    retry,
)


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
    """Wait for a lock in a thread; return an event that is set once it was held."""
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
    monkeypatch.setattr(database, "SILENCE", 1)
    # As of a process that is stopped.
    monkeypatch.setattr(database, "pulse", lambda beat, seconds: pulse(beat, 1000))
    url = postgres.create("silent")
    with pytest.raises(sqlalchemy.exc.DBAPIError) as left, exclusive(url, "a"):
        assert waits_for(url, "a").wait(30)
    assert is_away(left.value)


def test_a_lock_whose_connection_is_lost_is_an_error_also_after_a_pulse(postgres, monkeypatch):
    monkeypatch.setattr(database, "SILENCE", 1)
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
    monkeypatch.setattr(database, "SILENCE", 1)
    url = postgres.create("busy")
    with exclusive(url, "a"):
        assert not waits_for(url, "a").wait(1.5)


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
        return retry(inner, "sqlite:///x.db")

    assert retry(outer, "sqlite:///x.db") == "done"
    assert begun == ["outer", "inner"] * 3


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(database, "PATIENCE", 0)
    away = sqlalchemy.exc.OperationalError("select", {}, Exception("gone"))

    def work():
        raise away

    with pytest.raises(UserError, match="--storage"):
        retry(work, "postgresql://u:secret@h/d")
    with pytest.raises(ZeroDivisionError):
        retry(lambda: 1 // 0, "postgresql://h/d")


def test_a_full_disk_is_not_waited_for(tmp_path):
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/x.db")
    with engine.connect() as connection:
        connection.exec_driver_sql("pragma max_page_count = 1")
        with pytest.raises(sqlalchemy.exc.OperationalError) as full:
            connection.exec_driver_sql("create table t (x)")
    engine.dispose()
    assert not is_away(full.value)


def test_a_pulse_goes_on_after_an_error():
    beats = threading.Semaphore(0)

    def beat():
        beats.release()
        raise OSError

    with pulse(beat, 0.001):
        for _ in range(3):
            assert beats.acquire(timeout=30)


def test_a_signal_ends_the_wait_for_a_database():
    away = sqlalchemy.exc.OperationalError("select", {}, Exception("gone"))

    def work():
        stopping._received.append(signal.SIGINT)
        raise away

    with pytest.raises(KeyboardInterrupt):
        retry(work, "postgresql://h/d")


# --- processes ------------------------------------------------------------------------------------


def test_a_process_that_was_killed_is_gone_and_this_one_is_not():
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    process.start()
    name = process_name(process.pid)
    assert not is_gone(name)
    assert not is_gone(process_name())
    os.kill(process.pid, signal.SIGKILL)
    while not is_gone(name):  # though its parent has not waited for it yet
        time.sleep(0.01)
    process.join()
    assert is_gone(name)


def test_a_later_process_of_the_same_id_is_another():
    assert is_gone(process_name().rpartition(":")[0] + ":1")


def test_a_process_of_another_machine_is_never_gone():
    assert not is_gone("elsewhere:1:1")


@pytest.mark.parametrize("given", ["0", "-1", "x", "1.5", ""])
def test_seconds_between_heartbeats_are_a_whole_number(given, monkeypatch):
    monkeypatch.delenv(BEAT, raising=False)
    assert heartbeat_seconds() == 20
    monkeypatch.setenv(BEAT, "3")
    assert heartbeat_seconds() == 3
    monkeypatch.setenv(BEAT, given)
    with pytest.raises(UserError, match=f"{BEAT}='{given}'"):
        heartbeat_seconds()


def test_heartbeats_are_in_the_same_zone_whatever_the_servers(postgres):
    url = postgres.create("zone")
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("alter database zone set timezone = 'Asia/Tokyo'")
    engine.dispose()
    storage = open_storage(url)
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("show timezone").scalar().lower() == "utc"
    storage.engine.dispose()


def test_a_lock_that_is_busy_counts_as_away(tmp_path):
    engine = sqlalchemy.create_engine(
        f"sqlite:///{tmp_path}/x.db", connect_args={"timeout": 0}, poolclass=sqlalchemy.NullPool
    )
    with engine.connect() as one, engine.connect() as other:
        one.exec_driver_sql("begin immediate")
        with pytest.raises(sqlalchemy.exc.OperationalError) as busy:
            other.exec_driver_sql("begin immediate")
    assert is_away(busy.value)


def test_looking_for_a_study_writes_no_tables(tmp_path):
    file = tmp_path / "optuna.db"
    file.touch()
    url = f"sqlite:///{file}"
    assert not has_study(url, "mine")
    assert file.stat().st_size == 0
    optuna.create_study(storage=open_storage(url), study_name="mine")
    assert has_study(url, "mine")
    assert not has_study(url, "other")
