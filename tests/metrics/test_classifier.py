"""The classifier behind Fréchet distances: what it is a function of, and its cache."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from harness.data.dataset import Dataset, Split
from harness.metrics import frechet
from harness.metrics.frechet import Classifier, classifier
from harness.models.files import put


def pixels(split, channels=3):
    """Return images of 8 x 8 pixels in [0, 1]."""
    return split.pixels(slice(None), torch.float32).view(-1, channels, 8, 8)


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 9, 11)])
def test_images_of_any_shape_have_features_and_classes(shape):
    net = Classifier(shape, 7)
    images = torch.rand(5, *shape)
    assert net.embed(images).shape == (5, 64)
    assert net(images).shape == (5, 7)


def test_colour_images_are_learnt(tmp_path):
    # The class is the brightest channel.
    labels = torch.arange(300) % 3
    images = torch.randint(0, 100, (300, 3, 64), dtype=torch.uint8)
    images[torch.arange(300), labels] += 100
    split = Split(images.flatten(1), labels, largest=255)
    data = Dataset("colours", (3, 8, 8), 3, split.head(200), split, split, "")
    net = classifier(data, tmp_path)
    with torch.no_grad():
        guesses = net(pixels(split)[200:]).argmax(1)
    assert (guesses == labels[200:]).double().mean() > 0.95


def test_it_is_a_function_of_the_training_split_alone(tiny, tmp_path):
    one = classifier(tiny, tmp_path / "one")
    torch.rand(3)
    other = classifier(replace(tiny, test=tiny.test.head(10)), tmp_path / "other")
    assert same(one, other)
    first, second = (next((tmp_path / name).iterdir()).name for name in ("one", "other"))
    assert first == second


def test_training_leaves_pytorchs_random_state_and_threads_alone(tiny, tmp_path):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    classifier(tiny, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_its_features_have_mean_variance_one_over_the_training_images(tiny, tmp_path):
    net = classifier(tiny, tmp_path)
    with torch.no_grad():
        embedded = net.embed(pixels(tiny.train, 1))
    assert float(embedded.var(0).mean()) == pytest.approx(1, rel=1e-4)


def test_the_scaling_of_the_features_changes_no_logit(tiny):
    net, x = frechet._untrained(tiny), pixels(tiny.test, 1)
    with torch.no_grad():
        before = net(x)
        frechet._normalize(net, pixels(tiny.train, 1))
        torch.testing.assert_close(net(x), before)


def test_the_cache_gives_back_the_same_bits_and_trains_nothing(tiny, tmp_path, monkeypatch):
    one = classifier(tiny, tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(frechet, "STEPS", 0)  # a training would now give another net
    assert same(classifier(tiny, tmp_path), one)
    assert file.stat().st_mtime_ns == written


def test_without_a_folder_it_is_trained_and_nothing_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = classifier(tiny)
    assert not list(tmp_path.iterdir())
    assert same(net, classifier(tiny, tmp_path))


def test_other_images_or_labels_have_another_place_in_the_cache(tiny, tmp_path):
    classifier(tiny, tmp_path)
    classifier(replace(tiny, train=tiny.train.head(64)), tmp_path)
    classifier(replace(tiny, train=replace(tiny.train, labels=tiny.train.labels * 0)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "another net's"])
def test_a_broken_cache_file_is_trained_over(tiny, tmp_path, damage):
    one = classifier(tiny, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "another net's":
        put(file, save(Classifier((1, 16, 16), 10).state_dict()))
    else:
        file.write_bytes({"empty": b"", "cut": whole[:-100], "text": b"no tensors"}[damage])
    assert same(classifier(tiny, tmp_path), one)
    assert file.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_done_without(tiny, tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    net = classifier(tiny, tmp_path / "taken")
    assert same(net, classifier(tiny, tmp_path))


def test_studies_keep_it_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert frechet.user_cache() == tmp_path / "vae-sweep-harness"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert frechet.user_cache() == tmp_path / ".cache" / "vae-sweep-harness"
    monkeypatch.setenv("HOME", "nowhere")
    assert frechet.user_cache() is None


def test_it_is_trained_by_adam_at_a_rate_that_falls_to_zero(tiny, monkeypatch):
    monkeypatch.setattr(frechet, "STEPS", 7)
    monkeypatch.setattr(frechet, "_normalize", lambda net, images: None)
    expected, train = frechet._untrained(tiny), tiny.train
    optimizer = torch.optim.Adam(expected.parameters(), lr=frechet.LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 7)
    for rows, _ in zip(frechet._batches(len(train)), range(7), strict=False):
        optimizer.zero_grad()
        logits = expected(pixels(train, 1)[rows])
        torch.nn.functional.cross_entropy(logits, train.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    assert same(classifier(tiny), expected)
