"""How long a plan takes: estimated from finished runs like it, else not known."""

import pytest

import harness
from harness import RunConfig
from studies.runner import estimate


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (3, "10 s"),
        (42, "40 s"),
        (91, "2 min"),
        (1800, "30 min"),
        (7200, "2 h"),
        (9000, "2 h 30 min"),
    ],
)
def test_a_time_is_written_as_roughly_as_it_is_known(seconds, said):
    assert estimate.duration(seconds) == said


def test_training_final_metrics_and_start_add_up():
    # A stack of 4: 10 epochs of 100 images at 50 images/s are 20 s of each run's share, 100 / 4.
    rows = [(50.0, 4, 10, 100.0)] * 2
    configs = [RunConfig(epochs=300, seed=seed) for seed in range(4)]
    training, final = 4 * 300 * 100 / 50, 4 * 5
    whole = estimate.duration(training + final + estimate.AROUND)
    said = estimate.expected(rows, configs, 100)
    assert said.startswith(f"duration: about {whole} with final metrics and report (the last 2 ")
    assert "trained at 50 images/s here" in said


def sentence(config, uri, width=16):
    configs = [config.replace(seed=seed) for seed in range(5)]
    data = harness.load_dataset("digits")
    return estimate.sentence(configs, data, "cpu", uri, lambda most: min(most, width))


def test_finished_runs_alike_are_the_basis(finished):
    said = sentence(RunConfig(epochs=50, kl_weight=0.3), finished.tracking_uri)
    assert said.startswith("1 stack of up to 5 runs on cpu; duration: about ")
    assert "the last 6 finished runs like these trained at" in said


def test_other_runs_are_no_basis_and_a_store_that_is_not_there_is_not_made(finished, tmp_path):
    uri = f"sqlite:///{tmp_path}/m.db"
    for config, address in (
        (RunConfig(hidden=(16,), epochs=1), finished.tracking_uri),
        (RunConfig(channels=(3, 4), epochs=1), finished.tracking_uri),
        (RunConfig(epochs=50), uri),
        (RunConfig(epochs=50), "http://127.0.0.1:9"),
    ):
        assert f"; {estimate.UNKNOWN}. Nothing was trained." in sentence(config, address)
    assert list(tmp_path.iterdir()) == []


def test_stacks_are_as_wide_as_the_plan_trains_them(tmp_path):
    said = sentence(RunConfig(epochs=2), f"sqlite:///{tmp_path}/m.db", width=2)
    assert said.startswith("3 stacks of up to 2 runs on cpu; ")
