"""Random draws are named: they depend on the run alone, never on earlier draws."""

import math

import numpy as np
import pytest
import torch

from harness.config import RunConfig
from harness.streams import batches, generator, noise

BASE = RunConfig(batch_size=8)


def test_the_generator_is_the_same_for_ever():
    # Pinned: another value here means that no recorded run can be repeated.
    drawn = generator(1, "weights", 2, 3).bit_generator.random_raw(2)
    assert drawn.tolist() == [1241771943789741128, 2743686243760680503]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"purpose": "noise"},
        {"epoch": 1},
        {"latent_size": 1},
        {"seed": 2**64},
    ],
)
def test_another_name_is_another_stream(other):
    name = {"seed": 0, "purpose": "weights", "epoch": 0, "latent_size": 0}
    first = generator(**name).standard_normal(4)
    assert np.array_equal(first, generator(**name).standard_normal(4))
    assert not np.any(first == generator(**(name | other)).standard_normal(4))


def test_batches_depend_on_seed_and_batch_size_alone():
    other = {"kl_weight": 0.1, "learning_rate": 0.1, "kl_normalization": "sum", "latent_size": 3}
    expected = batches(BASE, 83, epoch=2)
    assert torch.equal(expected, batches(BASE.replace(**other), 83, epoch=2))


def test_batches_are_a_permutation_without_repetition():
    rows = batches(BASE, 80, epoch=1)
    assert rows.dtype == torch.int64
    assert torch.equal(rows.sort().values, torch.arange(80))


def test_an_incomplete_batch_is_left_out():
    rows = batches(BASE, 83, epoch=1)
    assert rows.shape == (80,)
    assert len(set(rows.tolist())) == 80
    assert rows.max() <= 82


def test_batches_differ_by_seed_and_epoch():
    first = batches(BASE, 80, epoch=1)
    for other in (batches(BASE.replace(seed=1), 80, epoch=1), batches(BASE, 80, epoch=2)):
        assert (first == other).sum() < 10  # 1 place of 80 expected to agree


def test_noise_of_the_first_images_is_that_of_all():
    # So metrics of a part of a split do not depend on the part's size.
    assert torch.equal(noise(0, "noise", 7, 10), noise(0, "noise", 20, 10)[:7])


def test_noise_differs_by_seed_purpose_epoch_and_latent_size():
    first = noise(0, "noise", 20, 10, epoch=1)
    others = [
        noise(1, "noise", 20, 10, epoch=1),
        noise(0, "evaluate/val", 20, 10, epoch=1),
        noise(0, "noise", 20, 10, epoch=2),
        noise(0, "noise", 20, 11, epoch=1)[..., :10],
    ]
    for other in others:
        assert not (first == other).any()


def test_noise_is_standard_normal_and_independent():
    first, second = (noise(seed, "noise", 4_000, 50) for seed in (0, 1))
    assert first.shape == (4_000, 50)
    assert first.dtype == torch.float32
    drawn = first.double()
    n = drawn.numel()
    five_sigma = 5 / math.sqrt(n)
    assert abs(drawn.mean()) < five_sigma
    assert abs(drawn.var() - 1) < five_sigma * math.sqrt(2)
    assert abs((drawn**4).mean() - 3) < five_sigma * math.sqrt(96)
    assert abs((drawn * second).mean()) < five_sigma


def test_draws_leave_the_global_generators_alone():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    noise(0, "noise", 5, 10)
    batches(BASE, 80, epoch=1)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
