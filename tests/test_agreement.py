"""When two trainings of one run agree, on known numbers."""

import math

import pytest

from harness.records import Logged
from studies.agreement import TOLERANCE, compare, exact, rounding, verdict

LOGGED = [
    Logged("val/neg_elbo", 1, 5.0),
    Logged("val/neg_elbo", 2, -0.5),
    Logged("val/distortion", 2, -20.0),
    Logged("val/active_units", 2, 8.0),
    Logged("val/gap_to_linear", 2, 0.5),
    Logged("test/mse", 2, 0.02),
    Logged("best/epoch", 2, 2.0),
    Logged("progress/epoch_seconds", 2, 0.3),
]
NOW = {(value.metric, value.step): value.value for value in LOGGED}


def now(metric: str, epoch: int, value: float) -> dict[tuple[str, int], float]:
    return NOW | {(metric, epoch): value}


LATE = rounding(steps=1000)
"""The rule on another device for epochs of so many steps that none is early."""


def test_equal_values_reproduce_on_any_device():
    said = "Reproduced: all 8 values of 7 metrics are equal to the last bit."
    for rule in (exact, LATE):
        found = compare(LOGGED, NOW, rule)
        assert found.equal == len(LOGGED)
        assert found.reproduces
        assert verdict(found) == said


def test_one_last_bit_is_a_difference_on_the_same_device_only():
    other = now("test/mse", 2, math.nextafter(0.02, 1))
    here, elsewhere = compare(LOGGED, other), compare(LOGGED, other, LATE)
    assert here.equal == elsewhere.equal == len(LOGGED) - 1
    assert not here.reproduces
    assert elsewhere.reproduces
    said = "1 of 8 values differ, worst test/mse in epoch 2: 0.02 logged, 0.020000000000000004 now"
    assert f"Not reproduced: {said}" in verdict(here)
    assert f"Reproduced: {said}" in verdict(elsewhere)
    assert "10 % is allowed on another device" in verdict(elsewhere)


@pytest.mark.parametrize(
    ("metric", "value", "scale"),
    [
        ("val/neg_elbo", -0.5, 20.0),  # the largest number of nats, not its own
        ("test/mse", 0.02, 0.02),
        ("val/gap_to_linear", 0.5, 100.0),
    ],
)
def test_the_tolerance_is_a_share_of_the_scale_of_the_unit(metric, value, scale):
    for factor, good in ((0.99, True), (1.01, False)):
        found = compare(LOGGED, now(metric, 2, value + factor * TOLERANCE * scale), LATE)
        assert found.worst.share == pytest.approx(factor * TOLERANCE)
        assert found.reproduces == good


@pytest.mark.parametrize(("steps", "early"), [(50, True), (51, False)])
def test_before_rounding_is_amplified_less_is_allowed(steps, early):
    for share, good in ((0.9e-4, True), (1.1e-4, not early)):
        other = now("val/neg_elbo", 2, -0.5 + share * 20)
        assert compare(LOGGED, other, rounding(steps)).reproduces == good
    assert compare(LOGGED, now("val/gap_to_linear", 2, 5.0), rounding(steps)).reproduces


def test_the_worst_difference_is_the_worst_against_what_is_allowed():
    other = now("test/mse", 2, 0.02 * (1 + 2e-4)) | {("val/gap_to_linear", 2): 5.0}
    found = compare(LOGGED, other, rounding(steps=1))
    assert found.worst.logged.metric == "test/mse"
    assert not found.reproduces


def test_a_count_may_differ_by_two_and_the_best_epoch_be_another_on_another_device():
    for metric, value, good in (
        ("val/active_units", 10.0, True),
        ("val/active_units", 5.0, False),
        ("best/epoch", 1.0, True),
    ):
        other = now(metric, 2, value)
        assert compare(LOGGED, other, LATE).reproduces == good
        assert not compare(LOGGED, other).reproduces


def test_a_number_that_is_none_agrees_with_itself_alone():
    logged = [Logged("val/mse", 1, math.nan), Logged("val/rate", 1, math.inf)]
    same = {("val/mse", 1): math.nan, ("val/rate", 1): math.inf}
    assert compare(logged, same).reproduces
    for other in (same | {("val/mse", 1): 1.0}, same | {("val/rate", 1): math.nan}):
        assert not compare(logged, other, LATE).reproduces


def test_a_scale_of_zero_allows_nothing():
    logged = [Logged("val/mse", 1, 0.0)]
    assert compare(logged, {("val/mse", 1): -0.0}).reproduces
    assert not compare(logged, {("val/mse", 1): 1e-9}, LATE).reproduces


def test_the_bounds_of_fewer_samples_are_of_their_metrics_unit():
    logged = [Logged("test/neg_log_likelihood/k64", 9, 1.0), Logged("val/kl/3", 9, 50.0)]
    (gap, _) = compare(logged, {(v.metric, v.step): v.value + 1 for v in logged}).gaps
    assert gap.share == pytest.approx(1 / 50)


def test_what_is_not_computed_again_is_named_and_does_not_reproduce():
    found = compare(LOGGED, {key: value for key, value in NOW.items() if key[0] != "test/mse"})
    assert found.missing == ("test/mse",)
    assert not found.reproduces
    assert verdict(found) == "Not reproduced: logged but not computed now: test/mse."


def test_what_is_new_is_named_and_does_no_harm():
    found = compare(LOGGED, now("test/fid", 2, 1.0))
    assert found.new == ("test/fid",)
    assert found.reproduces


def test_wall_clock_is_left_out():
    other = now("progress/epoch_seconds", 2, 99.0)
    assert not compare(LOGGED, other).reproduces
    left_out = compare(LOGGED, other, leave_out=["progress/epoch_seconds"])
    assert left_out.reproduces
    assert len(left_out.gaps) == len(LOGGED) - 1


def test_a_value_logged_twice_is_compared_twice():
    found = compare([*LOGGED, Logged("test/mse", 2, 0.03)], NOW)
    assert len(found.gaps) == len(LOGGED) + 1
    assert found.worst.logged.value == 0.03


def test_parts_hold_every_value_once():
    parts = compare(LOGGED, NOW).parts()
    assert list(parts) == ["val", "test", "best", "progress"]
    assert sum(len(part.gaps) for part in parts.values()) == len(LOGGED)
