"""Random draws are named: they depend on the run alone, never on its stack or on earlier draws."""

import math

import numpy as np
import pytest
import torch

from harness.config import RunConfig
from harness.streams import batches, generator, noise

BASE = RunConfig(batch_size=8)
STACK = [
    BASE,
    BASE.replace(seed=1, kl_weight=0.1),
    BASE.replace(latent_size=3, seed=1),
    BASE.replace(latent_size=16, learning_rate=0.1),
]


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


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0], [2]])
def test_draws_of_a_run_do_not_depend_on_its_stack(order):
    stack = [STACK[i] for i in order]
    rows = batches(stack, 83, epoch=2)
    eps = noise(stack, "noise", 20, epoch=2)
    for s, config in enumerate(stack):
        assert torch.equal(rows[s], batches([config], 83, epoch=2)[0])
        alone = noise([config], "noise", 20, epoch=2)[0]
        assert torch.equal(eps[s, :, : config.latent_size], alone)


def test_configurations_with_one_seed_are_paired():
    same = [BASE, BASE.replace(kl_weight=0.1, learning_rate=0.1, kl_normalization="sum")]
    assert torch.equal(*batches(same, 83, epoch=1))
    assert torch.equal(*noise(same, "noise", 20, epoch=1))
    other_size = [BASE, BASE.replace(latent_size=3)]
    assert torch.equal(*batches(other_size, 83, epoch=1))


def test_batches_are_a_permutation_without_repetition():
    rows = batches(STACK, 80, epoch=1)
    assert rows.dtype == torch.int64
    assert torch.equal(rows.sort(dim=1).values, torch.arange(80).expand(4, -1))


def test_an_incomplete_batch_is_left_out():
    rows = batches(STACK, 83, epoch=1)
    assert rows.shape == (4, 80)
    assert all(len(set(row.tolist())) == 80 for row in rows)
    assert rows.max() <= 82


def test_batches_differ_by_seed_and_epoch():
    first, seed, *_ = batches(STACK, 80, epoch=1)
    epoch = batches(STACK, 80, epoch=2)[0]
    for other in (seed, epoch):
        assert (first == other).sum() < 10  # 1 place of 80 expected to agree


def test_noise_of_the_first_images_is_that_of_all():
    # So metrics of a part of a split do not depend on the part's size.
    assert torch.equal(noise(STACK, "noise", 7), noise(STACK, "noise", 20)[:, :7])


def test_noise_differs_by_seed_purpose_epoch_and_latent_size():
    first = noise([BASE], "noise", 20, epoch=1)
    others = [
        noise([BASE.replace(seed=1)], "noise", 20, epoch=1),
        noise([BASE], "evaluate/val", 20, epoch=1),
        noise([BASE], "noise", 20, epoch=2),
        noise([BASE.replace(latent_size=11)], "noise", 20, epoch=1)[..., :10],
    ]
    for other in others:
        assert not (first == other).any()


def test_noise_of_padded_latents_is_zero():
    eps = noise(STACK, "noise", 20)
    assert eps.shape == (4, 20, 16)
    assert eps.dtype == torch.float32
    for row, config in zip(eps, STACK, strict=True):
        assert not row[:, config.latent_size :].any()
        assert row[:, : config.latent_size].all()


def test_noise_is_standard_normal_and_independent():
    eps = noise([BASE.replace(latent_size=50), BASE.replace(seed=1)], "noise", 4_000)
    drawn = eps[0].double()
    n = drawn.numel()
    five_sigma = 5 / math.sqrt(n)
    assert abs(drawn.mean()) < five_sigma
    assert abs(drawn.var() - 1) < five_sigma * math.sqrt(2)
    assert abs((drawn**4).mean() - 3) < five_sigma * math.sqrt(96)
    between_runs = (eps[0, :, :10] * eps[1, :, :10]).double()
    assert abs(between_runs.mean()) < 5 / math.sqrt(between_runs.numel())


def test_draws_leave_the_global_generators_alone():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    noise(STACK, "noise", 5)
    batches(STACK, 80, epoch=1)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
