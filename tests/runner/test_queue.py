"""Trials: one process each, repeated after its death, and no result counted twice."""

import logging
import multiprocessing
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from opened import queue_at, storage_at

from harness import RunConfig, UserError
from studies.runner import stopping
from studies.runner.database import is_gone, open_storage, process_name
from studies.runner.proposers import Cell, Listed, Value, keys
from studies.runner.queue import check_settings, noted, open_queue

VALUES = tuple(i / 10 for i in range(1, 7))
SETTINGS = {"dataset": "digits", "epochs": 2}
DEAD = f"{process_name(2**22 + 1).rpartition(':')[0]}:1"  # an id above the largest


def cells(values=VALUES):
    return [
        Cell({"value": value, "seed": 0}, RunConfig(kl_weight=value), f"kl_weight={value}", {})
        for value in values
    ]


def joined(url, owner=None, values=VALUES, complete=set, settings=SETTINGS):
    """Open the study as another process does, by default one of another machine."""
    queue = queue_at(url, Listed(cells(values), settings), complete=complete)
    queue.me = owner if owner == "" or ":" in str(owner) else f"elsewhere:1:{owner}"
    return queue


def value_of(trial, **attrs):
    """Return the value that a trial is completed with."""
    return Value([trial.user_attrs["cell"]["value"]], attrs)


def finish(queue):
    """Take and complete trials until none is left; return their numbers."""
    numbers = []
    with queue.working():
        while queue.left():
            for trial in (taken := queue.take(3)):
                queue.finish(trial, value_of(trial))
                numbers.append(trial.number)
            if not taken:
                queue.wait()
    return numbers


def together(work, items):
    """Do work for several items at once; if one fails, the others stop waiting for it."""

    def stopping_the_others(item):
        try:
            return work(item)
        except BaseException:
            stopping._received.append(signal.SIGINT)
            raise

    with ThreadPoolExecutor(len(items)) as pool:
        begun = [pool.submit(stopping_the_others, item) for item in items]
    failed = [error for future in begun if (error := future.exception())]
    for error in failed:
        if not isinstance(error, KeyboardInterrupt):
            raise error
    return [future.result() for future in begun]


def assert_exact(queue):
    """Assert that every cell has one result, the right one, and that no trial is open."""
    done = queue.trials("COMPLETE")
    wanted = sorted(cell.config.kl_weight for cell in queue.proposer.cells)
    assert sorted(trial.value for trial in done) == wanted
    assert all([trial.value] == value_of(trial).values for trial in done)
    assert queue.trials("RUNNING", "WAITING") == []
    every = keys(*queue.trials())
    assert len(set(every)) == len(every) == len(queue.trials())


def fall_silent(url):
    """Let the last heartbeats be an hour ago."""
    engine = sqlalchemy.create_engine(url)
    before = {
        "sqlite": "datetime(heartbeat, '-1 hour')",
        "postgresql": "heartbeat - interval '1 hour'",
    }[engine.name]
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"update trial_heartbeats set heartbeat = {before}"))
    engine.dispose()


# --- taking ---------------------------------------------------------------------------------------


def test_processes_take_trials_without_overlap_and_together_all(url):
    taken = together(finish, [joined(url, i) for i in range(4)])
    numbers = [number for part in taken for number in part]
    assert len(numbers) == len(set(numbers)) == len(VALUES)
    assert_exact(joined(url))


def test_a_process_takes_no_more_than_its_share(sqlite_url):
    first, second = joined(sqlite_url, 1), joined(sqlite_url, 2)
    assert [len(first.take(9, workers=4)), len(second.take(9))] == [2, 2]  # of 6, then of 4
    assert len(first.take(9)) == 1
    assert len(first.take(9)) == 1
    assert first.take(9) == []
    assert first.left() == 6


def test_keys_are_there_before_anything_is_trained(sqlite_url):
    first = joined(sqlite_url, 1)
    for trial in first.take(2):
        (run,) = first.proposer.planned(trial)
        assert [run.key] == keys(trial) == keys(first.trials("RUNNING")[trial.number])


@pytest.mark.parametrize("owner", [DEAD, "", None], ids=["dead", "none", "unsigned"])
def test_trials_without_a_living_process_are_handed_out_again_once(url, owner):
    dead, heirs = joined(url, DEAD), [joined(url, i) for i in range(2)]
    dead.me = owner
    if owner is None:
        dead.proposer.propose(dead.study, [], 2)
    taken = dead.trials() if owner is None else dead.take(2)
    together(finish, heirs)
    assert_exact(heirs[0])
    failed = heirs[0].trials("FAIL")
    assert [t.number for t in failed] == [t.number for t in taken]
    assert heirs[0].failed_keys() == keys(*taken)


def test_what_an_attempt_took_whose_lock_was_lost_is_taken_anew(sqlite_url):
    queue = joined(sqlite_url, 1)
    first = queue.take(2)
    queue._held.clear()  # known only after the lock was left in peace
    again = queue.take(2)
    assert [value_of(t) for t in first] == [value_of(t) for t in again]
    assert {t.number for t in first} == {t.number for t in queue.trials("FAIL")}
    assert {t.number for t in again} == {t.number for t in queue.trials("RUNNING")}


# --- silence --------------------------------------------------------------------------------------


def test_the_late_result_of_a_silent_process_is_refused(url, caplog):
    late, heir = joined(url, "late"), joined(url, "heir")
    trials = late.take(3)
    fall_silent(url)
    finish(heir)
    late.note(trials[0], Value([-1.0], {}))
    late.pruned.add(trials[2].number)
    assert not late.finish(trials[0], Value([-1.0], {}))
    assert not late.finish(trials[1], None)
    assert not late.finish(trials[2], None)
    assert "missed its heartbeats; the result of trial 0 is discarded" in caplog.text
    assert_exact(heir)
    assert {t.number for t in trials} == {t.number for t in heir.trials("FAIL")}
    assert len(heir.failed_keys()) == 3  # none counts as diverged


def test_heartbeats_keep_trials_and_those_without_a_result_are_given_back(url):
    busy, other = joined(url, "busy"), joined(url, "other")
    trials = busy.take(3)
    fall_silent(url)

    def interrupted():
        with busy.working():
            busy._beat()
            other.take(1)
            assert other.trials("FAIL") == []
            busy.finish(trials[0], value_of(trials[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {t.number for t in other.trials("FAIL")} == {t.number for t in trials[1:]}
    (held,) = other.trials("RUNNING")
    other.finish(held, value_of(held))
    finish(other)
    assert_exact(other)


def test_a_process_that_was_stopped_itself_keeps_its_trials_if_nobody_took_them(url):
    alone = joined(url, 1)
    trials = alone.take(2)
    fall_silent(url)
    assert len(alone.take(1)) == 1
    assert {t.number for t in trials} < {t.number for t in alone.trials("RUNNING")}


# --- adoption -------------------------------------------------------------------------------------


def left_behind(url, owner):
    """Take three trials; two have results, of which the runs of one are whole on the disk."""
    dead = joined(url, owner)
    trials = dead.take(3)
    for trial in trials[:2]:
        dead.note(trial, value_of(trial, note=1))
    return trials


@pytest.mark.parametrize("owner", [DEAD, ""], ids=["dead", "none"])
def test_whole_runs_of_a_process_that_ended_are_adopted_on_the_same_disk(url, owner):
    trials = left_behind(url, owner)
    fall_silent(url)  # a while ago
    here, there = joined(url, "here", complete=lambda: set(keys(trials[0]))), joined(url, "there")
    assert [trial.number for trial in here.reassign()] == [trials[0].number]
    assert {t.number for t in here.trials("FAIL")} == {t.number for t in trials[1:]}
    here.wait()  # not for a process that ended
    (adopted,) = here.take(9)
    assert noted(adopted) == value_of(trials[0], note=1)
    for other in (here, there):  # one has it, and its owner lives
        assert adopted.number not in {t.number for t in other.take(9)}
    here.finish(adopted, noted(adopted))
    (done,) = there.trials("COMPLETE")
    assert (done.number, done.user_attrs["note"]) == (trials[0].number, 1)


@pytest.mark.parametrize("owner", [process_name(), "elsewhere:1:1"], ids=["here", "elsewhere"])
def test_trials_of_a_process_that_may_live_are_not_adopted(sqlite_url, owner):
    queue = joined(sqlite_url, owner)
    (trial,) = queue.take(1)
    queue.note(trial, value_of(trial))
    other = joined(sqlite_url, "other", complete=lambda: set(keys(trial)))
    assert trial.number not in {t.number for t in other.take(9)}
    assert trial.number in {t.number for t in other.trials("RUNNING")}


def test_trials_with_a_result_wait_for_delivery_after_an_error(sqlite_url):
    queue = joined(sqlite_url, process_name())
    first, second = queue.take(2)

    def interrupted():
        with queue.working():
            queue.note(first, value_of(first))
            raise UserError("the server is away")

    with pytest.raises(UserError):
        interrupted()
    assert [t.number for t in queue.trials("FAIL")] == [second.number]
    queue.store_complete = lambda: set(keys(first))
    (adopted,) = queue.take(9)
    assert adopted.number == first.number
    assert noted(adopted) == value_of(first)


# --- finishing ------------------------------------------------------------------------------------


def test_a_trial_that_is_finished_twice_counts_once(sqlite_url):
    queue = joined(sqlite_url, 1)
    first, second, third = queue.take(3)
    queue.pruned.add(third.number)
    for _ in range(2):  # as after a reply that was lost
        assert queue.finish(first, Value([1.0], {"note": "x"}))
        assert queue.finish(second, None)
        assert queue.finish(third, None)
    assert [t.number for t in queue.trials("COMPLETE")] == [first.number]
    assert [t.number for t in queue.trials("PRUNED")] == [third.number]
    assert queue.failed_keys() == []
    assert queue.left() == len(VALUES) - 3


# --- continuing -----------------------------------------------------------------------------------


def test_a_study_grows_and_repeats_nothing(sqlite_url):
    finish(joined(sqlite_url, 1, values=VALUES[:2]))
    queue = joined(sqlite_url, 2)
    assert queue.left() == len(VALUES) - 2
    assert len(finish(queue)) == len(VALUES) - 2
    assert joined(sqlite_url, 3, values=(VALUES[0], 1)).left() == 1
    assert_exact(queue)
    assert joined(sqlite_url, 3, values=VALUES[::-1]).left() == 0


def test_other_settings_are_refused_with_the_differences(sqlite_url):
    joined(sqlite_url, 1)
    with pytest.raises(
        UserError, match="epochs: 2 there, 3 here; x: None there, 1 here"
    ) as refusal:
        joined(sqlite_url, 2, settings={"dataset": "digits", "epochs": 3, "x": 1})
    assert "\n" not in str(refusal.value)


def test_settings_that_an_older_study_lacks_are_the_defaults(sqlite_url):
    joined(sqlite_url, 1)
    assert joined(sqlite_url, 2, settings=SETTINGS | {"kl_cycles": 1}).left() == len(VALUES)
    with pytest.raises(UserError, match="kl_cycles: 1 there, 2 here"):
        joined(sqlite_url, 2, settings=SETTINGS | {"kl_cycles": 2})


def test_settings_are_compared_without_writing(sqlite_url):
    storage = storage_at(sqlite_url)
    assert not check_settings(storage, "study", SETTINGS)
    joined(sqlite_url, 1)
    assert check_settings(storage, "study", SETTINGS)


@pytest.mark.parametrize("settings", [{"values": [0.1], "seeds": 3}, None])
def test_studies_of_the_first_edition_and_of_others_are_refused_in_one_line(sqlite_url, settings):
    study = optuna.create_study(storage=storage_at(sqlite_url), study_name="study")
    study.enqueue_trial({})
    if settings:
        study.set_user_attr("settings", settings)
    with pytest.raises(UserError, match="first edition.*cannot be continued.*--study") as refusal:
        joined(sqlite_url)
    assert "\n" not in str(refusal.value)


# --- waiting --------------------------------------------------------------------------------------


def test_waiting_names_the_processes_and_ends_with_their_trials(url, caplog):
    busy, other = joined(url, "node7/1:4711:1"), joined(url, "other")
    trials = busy.take(9)
    assert other.take(9) == []
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.wait)
        while "waiting for process 4711 on node7" not in caplog.text:
            time.sleep(0.05)
        assert not waiting.done()
        busy.finish(trials[0], value_of(trials[0]))
        waiting.result()
    assert "--fresh" not in caplog.text
    fall_silent(url)
    other.wait()
    assert len(other.trials("FAIL")) == len(VALUES) - 1


def test_a_process_without_others_does_not_wait(sqlite_url):
    queue = joined(sqlite_url, 1)
    queue.take(2)
    queue.wait()


# --- processes that are killed --------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["studies.runner.queue", "optuna.storages", "alembic.command"])


def drain(url, values, seed, notes):
    """Complete trials as a study's process does: first a trial's keys are written to the disk."""
    chance, disk = random.Random(seed), Path(notes)

    def complete():  # what "delivered" means where the disk is the server
        return {file.name for file in disk.iterdir()}

    queue = open_queue(open_storage(url), "study", Listed(cells(values), SETTINGS), complete)
    with queue.working():
        while queue.left():
            taken = queue.take(3)
            for trial in taken:
                time.sleep(0.05 * chance.random())
                value = value_of(trial, by=queue.me)
                if not noted(trial):
                    for key in keys(trial):
                        (disk / key).touch()
                    queue.note(trial, value)
                queue.finish(trial, value)
            if not taken:
                queue.wait()


def drained_under_kills(url, values, folder, seed, kills, workers=2, event=lambda: None):
    """Let processes drain a list, kill and replace some at random moments; return the queue."""
    chance, team = random.Random(seed), []

    def start():
        arguments = url, values, len(team), str(folder)
        team.append(PROCESSES.Process(target=drain, args=arguments))
        team[-1].start()

    queue = joined(url, "reader", values)
    for _ in range(workers):
        start()
    for _ in range(kills):
        done = len(queue.trials("COMPLETE"))
        while len(queue.trials("COMPLETE")) == done and queue.left():
            assert {process.exitcode for process in team} <= {None, 0, -signal.SIGKILL}
            time.sleep(0.02)
        time.sleep(0.3 * chance.random())
        victim = chance.choice([process for process in team if process.is_alive()] or team)
        victim.kill()
        victim.join()
        event()
        start()
    for process in team:
        process.join()
    assert {process.exitcode for process in team} <= {0, -signal.SIGKILL}
    return queue


def assert_nothing_twice(queue):
    assert_exact(queue)
    for trial in queue.trials("COMPLETE"):
        assert trial.user_attrs["by"] == trial.user_attrs["process"]
    assert all(is_gone(trial.user_attrs.get("process", DEAD)) for trial in queue.trials())


def test_processes_that_are_killed_lose_no_cell_and_repeat_none(url, tmp_path):
    (tmp_path / "disk").mkdir()
    queue = drained_under_kills(url, VALUES, tmp_path / "disk", seed=0, kills=1)
    assert_nothing_twice(queue)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_kill_of_many_processes_costs_time_and_nothing_else(url, tmp_path, seed):
    (tmp_path / "disk").mkdir()
    values = tuple(i / 100 for i in range(1, 61))
    queue = drained_under_kills(url, values, tmp_path / "disk", seed, kills=12, workers=4)
    assert_nothing_twice(queue)


@pytest.mark.slow
def test_a_database_that_restarts_costs_time_and_nothing_else(postgres, tmp_path):
    (tmp_path / "disk").mkdir()
    url = postgres.create("restarted")
    values = tuple(i / 100 for i in range(1, 31))

    def restart():
        postgres.control("-m", "fast", "restart")

    queue = drained_under_kills(url, values, tmp_path / "disk", 0, kills=2, event=restart)
    assert_nothing_twice(queue)


def test_threads_survive_a_database_that_restarts(postgres):
    url = postgres.create("restarted_here")
    queues = [joined(url, i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(finish, queue) for queue in queues]
        for _ in range(2):
            postgres.control("-m", "fast", "restart")
        for future in work:
            future.result()
    assert_exact(queues[0])
