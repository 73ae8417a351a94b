"""Trials handed out: to one process each, again after a death, and with no result counted twice."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
import sqlalchemy
from studies.books import Books
from studies.desk import LostError
from studies.grid import open_grid
from studies.hunt import open_hunt
from studies.plan import Point, make_plan
from studies.search_options import SearchOptions, make_search_plan
from studies.storage import open_storage

from harness import UserError, tracking
from studies import kl_weight, search, worker
from studies.runner import stopping, workers
from studies.runner.options import Options

VALUES = tuple(i / 10 for i in range(1, 7))
PLAN = make_plan(kl_weight.STUDY, Options(values=VALUES, seeds=1))


OPENED: list[optuna.storages.RDBStorage] = []


@pytest.fixture(autouse=True)
def _closed():
    """Close the connections of a test, which processes of their own would take with them."""
    yield
    while OPENED:
        OPENED.pop().engine.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path, monkeypatch):
    """Return the address of a new database, as workers of `--workers 4` see it."""
    monkeypatch.setenv(workers.NUMBER, "1/4")
    monkeypatch.setattr(stopping, "_received", [])
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/optuna.db"
    return request.getfixturevalue("postgres").create(f"db{time.monotonic_ns()}")


def joined(url, token, process=None, plan=PLAN, opened=open_grid):
    """Open a study as another process does."""
    OPENED.append(open_storage(url))
    found = opened(plan, OPENED[-1])
    name = worker.name(process or os.getpid())
    found.desk.me = name.rpartition(":")[0] + f":{token}"
    return found


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


def finish(grid):
    """Take and tell until nothing is left; returns the numbers of the trials."""
    numbers = []
    for trials in grid.asked(at_once=3):
        with grid.desk.working():
            for trial in trials:
                grid.tell(trial, [grid.point(trial).value])
                numbers.append(trial.number)
    return numbers


def assert_exact(grid):
    """Assert that every point has one result, its own, and that nothing else is open."""
    done = grid.trials("COMPLETE")
    assert sorted(grid.point(trial).value for trial in done) == sorted(VALUES)
    assert all(trial.value == grid.point(trial).value for trial in done)
    assert grid.trials("RUNNING", "WAITING") == []


def test_processes_take_trials_without_overlap_and_together_all(url):
    taken = together(finish, [joined(url, i) for i in range(4)])
    numbers = [number for own in taken for number in own]
    assert len(numbers) == len(set(numbers)) == len(VALUES)
    assert_exact(joined(url, "reader"))


def test_a_process_takes_no_more_than_its_share(url):
    first, second = joined(url, 1), joined(url, 2)
    assert [len(next(g.asked(at_once=9))) for g in (first, second)] == [2, 1]  # of 6, then of 4
    assert first.desk.share(left=100, at_once=9) == 9


@pytest.mark.parametrize("left_by", ["a dead process", "one that had not signed"])
def test_trials_of_the_dead_are_handed_out_again_once(url, left_by):
    dead, heirs = joined(url, "dead", 2**22 + 1), [joined(url, i) for i in range(2)]
    taken = next(dead.asked(at_once=2))
    if left_by == "one that had not signed":
        dead.desk._set_state(dead.trials("WAITING")[0], "RUNNING")
    together(finish, heirs)
    assert_exact(heirs[0])
    assert {t.number for t in taken} <= set(heirs[0].desk.dead())
    failed = 2 + (left_by != "a dead process")
    assert len(heirs[0].desk.dead()) == failed
    assert len(heirs[0].study.trials) == len(VALUES) + failed


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


def test_the_late_result_of_a_silent_process_does_not_count(url):
    late, heir = joined(url, "late"), joined(url, "heir")
    (trial, other) = next(late.asked(at_once=2))
    fall_silent(url)
    with late.desk.working():
        finish(heir)
        with pytest.raises(LostError):
            late.tell(trial, [-1.0])
        with pytest.raises(LostError):
            late.tell(other, [None])  # nor does its point count as diverged
        raise LostError
    assert late.desk.lost
    assert_exact(heir)
    assert late.desk.diverged() == []
    assert {trial.number, other.number} == set(heir.desk.dead())


def test_a_heartbeat_tells_that_trials_are_lost_and_training_ends(url, capsys):
    late, heir = joined(url, "late"), joined(url, "heir")
    (trial,) = next(late.asked(at_once=1))
    epochs = []
    with late.desk.working():
        on_epoch = late.desk.watching(epochs.append)
        late.desk._beat()
        on_epoch("kept")
        fall_silent(url)
        heir.bury()
        late.desk._beat()
        on_epoch("lost")
        epochs.append("never")
    assert epochs == ["kept", "lost"]
    assert "was silent too long" in capsys.readouterr().err
    assert trial.number in late.desk.dead()


def test_heartbeats_keep_trials_and_what_is_not_told_is_given_back(url):
    busy, other = joined(url, "busy"), joined(url, "other")
    trials = next(busy.asked(at_once=3))
    fall_silent(url)

    def interrupted():
        with busy.desk.working():
            busy.desk._beat()
            assert other.bury() == []
            busy.tell(trials[0], [busy.point(trials[0]).value])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert busy.trials("RUNNING") == []
    finish(other)
    assert_exact(other)


def test_a_point_that_waits_twice_is_trained_once(url):
    first, second = joined(url, 1), joined(url, 2)
    first.bury()
    twin = first.trials("WAITING")[0]
    states = optuna.trial.TrialState

    def add(state):
        first.study.add_trial(
            optuna.trial.create_trial(
                state=state, params=twin.params, distributions=twin.distributions
            )
        )

    add(states.WAITING)
    add(states.RUNNING)
    (running,) = first.trials("RUNNING")
    first.desk.sign(running)
    with ThreadPoolExecutor(1) as pool:
        heir = pool.submit(finish, second)  # which waits for the twin
        while len(second.trials("COMPLETE")) < len(VALUES) - 1:
            time.sleep(0.05)
        first.tell(running, [running.params["kl_weight"]])
        heir.result()
    assert_exact(second)


def test_a_telling_that_is_repeated_counts_once(url):
    grid = joined(url, 1)
    first, second = next(grid.asked(at_once=2))
    for _ in range(2):  # as after a reply that was lost
        grid.tell(first, [1.0])
        grid.tell(second, [None])
    assert [t.number for t in grid.trials("COMPLETE")] == [first.number]
    assert [t.number for t in grid.desk.diverged()] == [second.number]
    assert len(grid.left()) == len(VALUES) - 2


def test_what_an_attempt_took_whose_lock_was_lost_is_taken_anew(url):
    grid = joined(url, 1)
    first = grid.desk.section(lambda: grid._take(at_once=2))
    again = grid.desk.section(lambda: grid._take(at_once=2))
    assert [grid.point(t) for t in first] != [grid.point(t) for t in again]
    assert {t.number for t in first} == set(grid.desk.dead())
    assert (
        grid.desk.held.keys()
        == {t.number for t in again}
        == {t.number for t in grid.trials("RUNNING")}
    )


@pytest.mark.filterwarnings("ignore:Heartbeat")  # elsewhere ignored there, but not among threads
def test_searching_processes_draw_no_point_twice_and_no_trial_too_many(url):
    plan = make_search_plan(search.SEARCH, SearchOptions(trials=12, seeds=1))

    def search_on(found):
        for trials in found.asked(at_once=2):
            results = [{"val/neg_elbo": float(trial.number)} for trial in trials]
            with found.desk.working():
                found.tell(trials, results, set())

    hunts = [joined(url, i, plan=plan, opened=open_hunt) for i in range(3)]
    together(search_on, hunts)
    found = hunts[0]
    drawn = [tuple(trial.params.values()) for trial in found.study.trials]
    assert len(drawn) == len(set(drawn)) == 12
    assert found.left() == 0


def test_the_summary_is_written_once_also_after_a_death(postgres, tracking_uri, monkeypatch):
    monkeypatch.setattr(stopping, "_received", [])
    url = postgres.create("summaries")
    store = tracking.connect(tracking_uri)
    experiment = tracking.open_experiment(store, PLAN.experiment, "Why?")
    tags = {"study": PLAN.name, "role": "summary"}
    tracking.RunLog(store, experiment, "summary", tags, {})  # left open by a dead process
    written = []

    def summarize():
        log = tracking.RunLog(store, experiment, "summary", tags, {})
        written.append(threading.get_ident())
        time.sleep(0.2)
        log.end()
        return "outcome"

    def conclude(grid):
        return Books(grid.desk, store, PLAN.experiment).conclude(summarize, worked=True)

    ended = together(conclude, [joined(url, i) for i in range(3)])
    assert len(written) == 1
    assert sorted(said == "outcome" for said in ended) == [False, False, True]
    assert all(f"process {os.getpid()}" in said for said in ended if said != "outcome")
    statuses = [run["status"] for run in tracking.read_runs(store, PLAN.experiment)]
    assert sorted(statuses) == ["FINISHED", "KILLED"]


def test_a_database_that_restarts_costs_time_and_nothing_else(postgres, monkeypatch):
    monkeypatch.setattr(stopping, "_received", [])
    url = postgres.create("restarted")
    grids = [joined(url, i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(finish, grid) for grid in grids]
        for _ in range(2):
            postgres.control("-m", "fast", "restart")
        for future in work:
            future.result()
    assert_exact(grids[0])


def test_settings_and_points_of_a_joined_study_are_the_first_ones(url):
    joined(url, 1).bury()
    assert len(joined(url, 2).trials("WAITING")) == len(VALUES)
    joined(url, 2).bury()
    assert len(joined(url, 2).trials("WAITING")) == len(VALUES)
    other = make_plan(kl_weight.STUDY, Options(values=VALUES, seeds=2))
    with pytest.raises(UserError, match="seeds: 1 there, 2 here"):
        joined(url, 3, plan=other)


def test_points_that_an_older_version_enqueued_are_found(url):
    grid = joined(url, 1)
    grid.study.enqueue_trial({"kl_weight": 0.1})
    assert grid.point(grid.trials("WAITING")[0]) == Point("", 0.1)
    finish(grid)
    assert_exact(grid)
