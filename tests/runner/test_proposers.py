"""Which trials are made, of which runs they consist, and how they are judged."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import optuna
import pytest
from opened import queue_at

from harness import RunConfig
from harness.training.engine import EpochRecord
from studies.runner.proposers import TPE, Cell, Listed, Range, Value, keys

BASE = RunConfig(epochs=3)
SPACE = {
    "kl_weight": Range(0.001, 1.0, log=True),
    "latent_size": Range(2, 64),
    "kl_normalization": ("pixels", "none"),
}
SEARCH = TPE(
    base=BASE,
    space=SPACE,
    seeds=2,
    trials=9,
    pruner="median",
    objectives=("val/neg_elbo",),
    settings={"dataset": "digits", "seeds": 2},
)


# --- lists ----------------------------------------------------------------------------------------


def listed(*values):
    return Listed(
        [
            Cell(
                {"group": "", "value": value, "hidden": [8, 4]},
                RunConfig(kl_weight=value),
                f"kl_weight={value}",
                {"part": "x"},
            )
            for value in values
        ],
        {"dataset": "digits"},
    )


def test_a_list_is_proposed_in_its_order_and_recognised(sqlite_url):
    queue = queue_at(sqlite_url, listed(3.0, 1.0, 2.0))
    assert queue.proposer.settings == {"dataset": "digits"}
    trials = queue.take(3)
    assert [queue.proposer.place(trial) for trial in trials] == [0, 1, 2]
    for place, trial in enumerate(trials):
        (run,) = queue.proposer.planned(trial)
        cell = queue.proposer.cells[place]
        assert run.config == cell.config
        assert (run.key, run.params) == (keys(trial)[0], {"part": "x"})
        assert run.name == f"{cell.label} seed=0"
        tags = {"trial": str(trial.number), "place": str(place), "configuration": cell.label}
        assert run.tags == tags


def test_a_longer_list_places_old_trials_anew_and_a_shorter_one_leaves_them(sqlite_url):
    queue = queue_at(sqlite_url, listed(1, 3))
    for trial in queue.take(2):
        queue.finish(trial, Value([0.0], {}))
    longer = queue_at(sqlite_url, listed(0.5, 1.0, 2.0, 3.0))  # 1 is 1.0
    assert [longer.proposer.place(trial) for trial in longer.trials()] == [1, 3]
    assert [cell.identity["value"] for cell in longer.proposer.missing(longer.trials())] == [0.5, 2]
    shorter = queue_at(sqlite_url, listed(3.0))
    assert [shorter.proposer.place(trial) for trial in shorter.trials()] == [None, 0]
    assert shorter.left() == 0


def test_what_failed_is_proposed_again_unless_it_diverged(sqlite_url):
    queue = queue_at(sqlite_url, listed(1.0, 2.0))
    first, second = queue.take(2)
    queue.finish(first, None)
    queue.give_back()
    assert [queue.proposer.place(trial) for trial in queue.take(2)] == [1]
    assert queue.failed_keys() == keys(second)


def test_the_value_of_a_listed_run_is_its_objective():
    proposer = replace(listed(1.0), objectives=("val/mse",))
    assert proposer.value([{"val/mse": 2.0, "val/neg_elbo": 1.0}]) == ([2.0], {})
    assert proposer.value([None]) is None


# --- searches -------------------------------------------------------------------------------------


def test_a_searchs_trial_is_a_configuration_with_all_its_seeds(sqlite_url):
    queue = queue_at(sqlite_url, replace(SEARCH))
    (trial, *_) = queue.take(9)
    runs = queue.proposer.planned(trial)
    assert [run.key for run in runs] == keys(trial)
    assert [run.config for run in runs] == [BASE.replace(**trial.params, seed=s) for s in (0, 1)]
    assert [run.name for run in runs] == ["trial 0 seed=0", "trial 0 seed=1"]
    assert [run.tags["place"] for run in runs] == ["0", "1"]
    assert {run.tags["configuration"] for run in runs} == {"trial 0"}
    assert trial.params.keys() == SPACE.keys()


def test_a_search_has_rounds_and_grows(sqlite_url):
    queue = queue_at(sqlite_url, replace(SEARCH))
    assert [queue.proposer.at_once(width) for width in (16, 3, 1)] == [2, 1, 1]
    assert [len(queue.take(4)) for _ in range(4)] == [4, 4, 1, 0]
    for trial in queue.trials("RUNNING"):
        queue.finish(trial, Value([float(trial.number)], {}))
    assert queue.left() == 0
    assert queue_at(sqlite_url, replace(SEARCH, trials=12)).left() == 3


def drawn(queue, trials):
    """Complete trials with a value that depends on their parameters; return the parameters."""
    points = []
    while len(points) < trials:
        for trial in queue.take(1):
            queue.finish(trial, Value([trial.params["kl_weight"]], {}))
            points.append(tuple(trial.params.values()))
    return points


def test_a_search_is_repeatable_and_no_process_repeats_anothers_points(sqlite_url, tmp_path):
    search = replace(SEARCH, trials=12)  # the first 10 are random
    whole = drawn(queue_at(sqlite_url, replace(search)), 12)
    assert drawn(queue_at(f"sqlite:///{tmp_path}/again.db", replace(search)), 12) == whole
    apart = f"sqlite:///{tmp_path}/apart.db"
    one, other = (queue_at(apart, replace(search)) for _ in range(2))
    points = [point for _ in range(4) for queue in (one, other) for point in drawn(queue, 1)]
    assert len(set(points)) == 8
    assert points[0] == whole[0]


@pytest.mark.filterwarnings("ignore:Heartbeat")  # elsewhere ignored there, but not among threads
def test_processes_that_search_together_draw_no_trial_too_many(sqlite_url):
    def search_on(name):
        queue = queue_at(sqlite_url, replace(SEARCH, trials=12))
        queue.me = f"elsewhere:1:{name}"
        with queue.working():
            while queue.left():
                for trial in (taken := queue.take(2)):
                    queue.finish(trial, Value([trial.params["kl_weight"]], {}))
                if not taken:
                    queue.wait()
        return queue

    with ThreadPoolExecutor(3) as pool:
        queues = list(pool.map(search_on, range(3)))
    points = [tuple(trial.params.values()) for trial in queues[0].trials("COMPLETE")]
    assert len(queues[0].trials()) == len(set(points)) == 12


def test_with_two_objectives_neg_elbo_is_an_attribute():
    front = replace(SEARCH, objectives=("val/rate", "val/distortion"))
    attrs = {"val/neg_elbo": 5.0, "val/active_units": 2.0}
    finals = [{"val/rate": 1.0, "val/distortion": 4.0, **attrs}] * 2
    assert front.value(finals) == ([1.0, 4.0], attrs)
    assert front.value([finals[0], None]) is None


DEFAULT = {"decoder_variance": 0.01, "latent_size": 10, "sigma": "fixed"}
WITH_DEFAULT = replace(
    SEARCH,
    space={
        "decoder_variance": Range(1e-5, 1.0, log=True),
        "latent_size": Range(2, 64),
        "sigma": ("fixed", "optimal", "learned"),
    },
    default=DEFAULT,
)


def test_the_default_is_tried_first_once_and_again_if_its_process_ends(sqlite_url):
    one, other = (queue_at(sqlite_url, replace(WITH_DEFAULT, trials=6)) for _ in range(2))
    other.me = "elsewhere:1:b"
    assert [trial.params == DEFAULT for trial in one.take(2)] == [True, False]
    assert [trial.params == DEFAULT for trial in other.take(2)] == [False, False]
    one.give_back()
    (again, *_) = other.take(1)
    assert (again.number, again.params) == (4, DEFAULT)
    other.finish(again, None)  # diverged, for good
    assert not any(trial.params == DEFAULT for trial in other.take(9))


def test_only_a_trial_with_a_fixed_sigma_has_a_decoder_variance(sqlite_url):
    trials = queue_at(sqlite_url, replace(WITH_DEFAULT, trials=30)).take(30)
    assert {trial.params["sigma"] for trial in trials} == {"fixed", "optimal", "learned"}
    for trial in trials:
        assert (trial.params["sigma"] == "fixed") == ("decoder_variance" in trial.params)


# --- pruning --------------------------------------------------------------------------------------


def record(values, epoch=1, warmup=None, mse=0.1):
    """Return a record of runs with these validation neg_elbos."""
    values = np.array(values, dtype=float)
    ones = np.ones_like(values)
    metrics = {"loss": ones, "mse": mse * ones, "rate": ones, "neg_elbo": values}
    warm = ones if warmup is None else np.array(warmup)
    configs = (BASE,) * len(values)
    return EpochRecord(
        epoch, 1.0, 1, metrics, metrics, warm, configs, tuple(range(len(values))), (), ()
    )


@pytest.fixture
def queue(sqlite_url):
    """Open a search among whose finished trials everything else looks bad."""
    queue = queue_at(sqlite_url, replace(SEARCH))
    judged = queue.proposer.judged
    for value in (-1000.0, -999.0, -998.0, -997.0, -996.0):
        queue.study.add_trial(
            optuna.trial.create_trial(
                value=value,
                intermediate_values=dict.fromkeys(judged, value),
            )
        )
    return queue


def both(trials):
    """Return the trial of each run."""
    return [trial for trial in trials for _ in range(2)]


def test_epochs_that_are_judged_begin_after_a_third_and_are_few():
    for epochs in (1, 2, 3, 10, 30, 50):
        judged = replace(SEARCH, base=BASE.replace(epochs=epochs)).judged
        assert all(epochs // 3 <= epoch < epochs for epoch in judged)
        assert len(judged) <= 10
        assert len(judged) > 0 or epochs == 1


def test_a_trial_that_is_worse_is_pruned_with_all_its_seeds(queue):
    good, bad = queue.take(2)
    ends = queue.judge(both([good, bad]), record([-2000, -2000, 7, 8]))
    assert ends.keys() == {2, 3}
    assert {(end.status, end.pruned) for end in ends.values()} == {("KILLED", True)}
    assert ends[2].reason == (
        "pruned at epoch 1: validation neg_elbo 7.50 is worse than the median of finished trials"
    )
    assert queue.pruned == {bad.number}
    assert queue.trials("RUNNING")[-1].intermediate_values == {1: 7.5}


def test_no_trial_is_judged_in_a_warm_up_or_out_of_turn_or_without_a_pruner(queue):
    trials = both(queue.take(1))
    assert queue.judge(trials, record([7, 8], warmup=[1.0, 0.5])) == {}
    assert queue.judge(trials, record([7, 8], epoch=3)) == {}
    assert queue.judge(trials, record([8])) == {}  # `patience` has stopped the other seed
    queue.proposer.pruner = "none"
    assert queue.judge(trials, record([7, 8])) == {}
    assert queue.pruned == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_seed_that_diverges_ends_its_trial_before_it_is_pruned(queue, value):
    trials = both(queue.take(2))
    ends = queue.judge(trials, record([7, value, -2000, -2000]))
    assert [ends[row].status for row in sorted(ends)] == ["KILLED", "FAILED"]
    assert ends[0].reason == "another seed of its configuration diverged in epoch 1"
    assert ends[1].reason.startswith("diverged in epoch 1: validation neg_elbo is")
    ends = queue.judge(trials, record([7, 7, 7, 7], mse=2.0))
    assert {end.status for end in ends.values()} == {"FAILED"}
    assert queue.pruned == set()


def test_a_pruner_stops_the_bad_and_lets_the_good_go_on(sqlite_url):
    search = replace(SEARCH, seeds=1, trials=99, base=BASE.replace(epochs=6))
    queue = queue_at(sqlite_url, search)
    for _ in range(2):
        trials = queue.take(6)
        assert len(trials) == 6
        for epoch in search.judged:
            queue.judge(trials, record(range(6), epoch))
        for value, trial in enumerate(trials):
            pruned = trial.number in queue.pruned
            queue.finish(trial, None if pruned else Value([float(value)], {}))
    assert queue.pruned
    assert not {0, 6} & queue.pruned
