"""How long a plan takes: from finished runs like it, else from a trial; nothing is written."""

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


def test_images_final_metrics_and_start_add_up(tiny):
    known = estimate.Pace(images_per_second=100, final=2.0, basis="")
    runs = [RunConfig(epochs=5, seed=seed) for seed in range(3)]
    images = 3 * 5 * len(tiny.train)
    assert known.seconds(runs, tiny) == pytest.approx(images / 100 + 6 + estimate.AROUND)


def test_what_a_run_spends_beside_training_is_shared_by_its_stack():
    # A stack of 4: 10 epochs of 100 images at 50 images/s are 80 s of its 100.
    rate, final = estimate._paces((50.0, 4, 10, 100.0), 100)
    assert (rate, final) == (50.0, pytest.approx(5.0))


def test_finished_runs_alike_are_what_it_is_known_from(finished):
    config = RunConfig(epochs=50, kl_weight=0.3)
    data = harness.load_dataset("digits")
    known = estimate.pace(config, data, "cpu", finished.tracking_uri)
    assert "the last 6 finished runs like these" in known.basis
    assert known.images_per_second > 0
    assert known.final >= 0


def test_other_runs_are_not_asked_and_a_store_that_is_not_there_is_not_made(finished, tmp_path):
    other = RunConfig(hidden=(16,), epochs=1)
    data = harness.load_dataset("digits")
    for uri in (finished.tracking_uri, f"sqlite:///{tmp_path}/m.db"):
        assert "a trial of" in estimate.pace(other, data, "cpu", uri).basis
    assert list(tmp_path.iterdir()) == []
    narrow = RunConfig(channels=(3, 4), epochs=1)
    assert estimate._recorded(narrow, data, "cpu", finished.tracking_uri) is None


def test_the_sentence_names_stacks_time_and_basis(tmp_path):
    data, uri = harness.load_dataset("digits"), f"sqlite:///{tmp_path}/m.db"
    runs = [RunConfig(hidden=(16,), seed=seed, epochs=2) for seed in range(5)]
    said = estimate.sentence(runs, data, "cpu", uri, lambda width: 2)
    assert said.startswith("3 stacks of up to 2 runs on cpu. About ")
    assert "a trial of" in said
    assert said.endswith("Nothing was trained.")
