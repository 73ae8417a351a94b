"""A run that was stopped goes on from its checkpoint, to the last bit as if it never had been."""

import hashlib
import logging
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from textbook import ALIKE, BERNOULLI, MIXED, REMEDIES, SMALL, flat

from harness.config import UserError
from harness.training.checkpoint import Checkpoints, Epoch, Saved, made_with
from harness.training.engine import EpochRecord, train

EPOCHS = 5
LONG = [c.replace(epochs=EPOCHS) for c in MIXED]


@pytest.fixture
def long(parts):
    """Return runs, of different shapes where each is computed alone."""
    return LONG if parts == "apart" else [c.replace(epochs=EPOCHS) for c in ALIKE]


def trained(configs, data, checkpoints=None, epochs=None) -> list[EpochRecord]:
    """Train on a CPU, and stop after some epochs as an interrupted caller does."""
    running = train(configs, data, device="cpu", checkpoints=checkpoints)
    records = list(islice(running, epochs))
    running.close()
    return records


def check_same(ours: list[EpochRecord], its: list[EpochRecord]) -> None:
    """Assert that two trainings gave the same bits in every epoch and in the end."""
    assert [r.epoch for r in ours] == [r.epoch for r in its]
    for one, other in zip(ours, its, strict=True):
        rows = [one.rows.index(row) for row in other.rows]
        np.testing.assert_array_equal(one.kl_warmup[rows], other.kl_warmup)
        for part in ("train", "val"):
            assert getattr(one, part).keys() == getattr(other, part).keys()
            for name, values in getattr(other, part).items():
                np.testing.assert_array_equal(getattr(one, part)[name][rows], values, name)
    for row, origin in enumerate(its[-1].rows):
        own = ours[-1].model(ours[-1].rows.index(origin))
        assert torch.equal(flat(own), flat(its[-1].model(row)))


@pytest.mark.parametrize("stopped", [1, 3, EPOCHS])
def test_stopped_runs_go_on_with_the_same_bits(tiny, long, tmp_path, stopped):
    whole = trained(long, tiny)
    kept = Checkpoints(tmp_path, every=100)
    trained(long, tiny, kept, stopped)
    again = trained(long, tiny, kept)
    assert {r.resumed for r in again} == {(stopped,) * len(long)}
    check_same(again, whole)


@pytest.mark.parametrize("configs", [REMEDIES, BERNOULLI], ids=["remedies", "bernoulli"])
def test_every_kind_of_run_goes_on_with_the_same_bits(tiny, tmp_path, configs):
    configs = [c.replace(epochs=4) for c in configs]
    kept = Checkpoints(tmp_path, every=100)
    trained(configs, tiny, kept, 2)
    check_same(trained(configs, tiny, kept), trained(configs, tiny))


def test_a_killed_process_leaves_the_epoch_that_was_last_due(tiny, tmp_path):
    kept = Checkpoints(tmp_path, every=2)
    running = train(LONG, tiny, device="cpu", checkpoints=kept)
    for _ in islice(running, 5):  # the fourth epoch's checkpoints are written before the fifth
        pass
    stopped_here = {file: file.read_bytes() for file in tmp_path.iterdir()}
    running.close()
    for file, content in stopped_here.items():
        file.write_bytes(content)
    again = trained(LONG, tiny, kept)
    assert again[0].resumed == (4,) * len(LONG)
    check_same(again, trained(LONG, tiny))


def test_a_run_goes_on_beside_any_others_whatever_they_have_behind_them(
    tiny, parts, long, tmp_path
):
    kept = Checkpoints(tmp_path, every=100)
    trained(long[:2], tiny, kept, 3)
    trained(long[3:4], tiny, kept, 1)
    again = trained(long, tiny, kept)
    resumed = dict(zip(again[0].rows, again[0].resumed, strict=True))
    assert resumed == {0: 3, 1: 3, 2: 0, 3: 1, 4: 0}
    if parts == "apart":
        check_same(again, trained(long, tiny))
    else:  # products of another width are summed in another order
        whole = trained(long, tiny)[-1]
        rows = [again[-1].rows.index(row) for row in whole.rows]
        np.testing.assert_allclose(again[-1].val["mse"][rows], whole.val["mse"], rtol=1e-4)


def test_a_run_that_was_computed_in_a_stack_goes_on_alone(tiny, tmp_path, monkeypatch, request):
    alike = [c.replace(epochs=EPOCHS) for c in ALIKE]
    whole = trained(alike, tiny)[-1]
    kept = Checkpoints(tmp_path, every=100)
    trained(alike[:3], tiny, kept, 2)
    request.getfixturevalue("together")
    trained(alike[3:], tiny, kept, 2)
    trained(alike, tiny, kept, 4)
    monkeypatch.undo()
    again = trained(alike, tiny, kept)
    assert again[0].resumed == (4,) * len(alike)
    np.testing.assert_allclose(again[-1].val["mse"], whole.val["mse"], rtol=1e-4)


def test_runs_are_resumed_on_several_cores(tiny, tmp_path, monkeypatch):
    whole = trained(LONG, tiny)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    kept = Checkpoints(tmp_path, every=100)
    trained(LONG, tiny, kept, 2)
    check_same(trained(LONG, tiny, kept), whole)


def test_a_run_that_was_dropped_is_not_kept(tiny, tmp_path):
    kept = Checkpoints(tmp_path, every=1)
    for record in train(LONG, tiny, device="cpu", checkpoints=kept):
        if record.epoch == 2:
            kept.remove([LONG[1]])
            record.drop([1])
    assert not kept.file(LONG[1]).exists()
    assert len(list(tmp_path.iterdir())) == len(LONG) - 1


def test_without_checkpoints_nothing_is_resumed(tiny):
    assert {r.resumed for r in trained(LONG, tiny)} == {(0,) * len(LONG)}


# --- files --------------------------------------------------------------------------------------

STATE = {"weights": torch.tensor([1.5, -0.0, math.nan]), "steps": torch.tensor(3.0)}
SAVED = Saved([Epoch(0.5, 96, {"mse": 0.1}, {"mse": math.nan, "rate": -math.inf})], STATE)
MADE = {"code": "abc", "dtype": "torch.float32"}


def test_a_file_gives_back_what_was_saved(tmp_path):
    kept = Checkpoints(tmp_path / "new" / "folder", every=1)
    kept.save(SMALL, MADE, SAVED)
    found = kept.load(SMALL, MADE)
    assert repr(found.epochs) == repr(SAVED.epochs)
    assert found.state.keys() == STATE.keys()
    for name, value in STATE.items():
        assert found.state[name].numpy().tobytes() == value.numpy().tobytes()


def test_removed_files_are_gone(tmp_path):
    kept = Checkpoints(tmp_path / "one", every=1)
    for seed in (0, 1):
        kept.save(SMALL.replace(seed=seed), MADE, SAVED)
    kept.remove([SMALL, SMALL])
    assert not kept.load(SMALL, MADE).epochs
    assert kept.load(SMALL.replace(seed=1), MADE).epochs
    kept.clear()
    assert list(tmp_path.iterdir()) == []


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def another_number(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"96, {", b"97, {"))


def something_else(file: Path) -> None:
    content = b"no safetensors"
    file.write_bytes(content + hashlib.sha256(content).digest())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(b""), "contents have changed"),
        (lambda file: file.write_bytes(b"no checkpoint at all"), "contents have changed"),
        (lambda file: file.write_bytes(40 * b"no checkpoint"), "contents have changed"),
        (truncated, "contents have changed"),
        (one_bit, "contents have changed"),
        (another_number, "contents have changed"),
        (something_else, "header"),
    ],
    ids=[
        *("empty", "short", "other", "truncated", "one bit", "another number", "something else"),
    ],
)
def test_a_file_that_is_not_whole_is_not_used_and_one_line_tells_why(
    tmp_path, caplog, spoil, message
):
    kept = Checkpoints(tmp_path, every=1)
    kept.save(SMALL, MADE, SAVED)
    before = kept.file(SMALL).read_bytes()
    spoil(kept.file(SMALL))
    assert kept.file(SMALL).read_bytes() != before
    with caplog.at_level(logging.WARNING):
        assert not kept.load(SMALL, MADE).epochs
    (record,) = caplog.records
    assert message in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("now", [MADE | {"code": "abd"}, MADE | {"dtype": "torch.float64"}])
def test_a_file_made_with_something_else_is_not_used(tmp_path, caplog, now):
    kept = Checkpoints(tmp_path, every=1)
    kept.save(SMALL, MADE, SAVED)
    assert not kept.load(SMALL, now).epochs
    assert "it was made with another" in caplog.text


def test_what_a_run_is_made_with_tells_images_and_precision_apart(tiny, data):
    base = made_with(SMALL, tiny, "cpu", torch.float32)
    assert base == made_with(SMALL, tiny, "cpu", torch.float32)
    fewer = replace(tiny, train=tiny.train.head(32))
    assert made_with(SMALL, fewer, "cpu", torch.float32)["dataset"] != base["dataset"]
    assert made_with(SMALL, tiny, "cpu", torch.float64) != base


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    import os

    kept = Checkpoints(tmp_path, every=1)
    kept.save(SMALL, MADE, SAVED)
    before = kept.file(SMALL).read_bytes()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        kept.save(SMALL, MADE, SAVED._replace(epochs=[]))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_of_no_epoch_is_refused(tmp_path, every):
    with pytest.raises(UserError, match=f"checkpoint_every={every}: give a whole number"):
        Checkpoints(tmp_path, every)
