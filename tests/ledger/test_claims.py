"""Verdicts at their boundaries, and the ledger's tables against themselves."""

import math
from dataclasses import replace

import pytest

from harness import RunConfig, load_dataset
from studies.ledger.evidence import Evidence
from studies.ledger.references import FULL, SHORT, Claim, Runs, claims, decimals, required


def nothing(evidence: Evidence) -> float:
    return math.nan


PRINTED = Claim("x", "y", "0.0387", 0.5 * 10**-4, "z", nothing)
ABOUT = Claim("x", "y", "8", 1.0, "z", nothing)
RANGE = Claim("x", "y", "1 or 2", (0.5, 2.5), "z", nothing)
MORE = Claim("x", "y", "over 100", (100, math.inf), "z", nothing)
DRAW = Claim("x", "y", "0.0477", None, "z", nothing, digits=4)

VERDICTS = {
    "the printed number": (PRINTED, 0.0387, "pass"),
    "a number that rounds to it": (PRINTED, 0.03874999, "pass"),
    "one that rounds to the next": (PRINTED, 0.03875001, "fail"),
    "one that rounds to the one before": (PRINTED, 0.03864999, "fail"),
    "the tolerance itself": (ABOUT, 9.0, "pass"),
    "just more than it": (ABOUT, 9.0001, "fail"),
    "just less than it": (ABOUT, 6.9999, "fail"),
    "the lower limit": (RANGE, 0.5, "pass"),
    "below it": (RANGE, 0.4, "fail"),
    "the upper limit": (RANGE, 2.5, "pass"),
    "above it": (RANGE, 2.6, "fail"),
    "no upper limit": (MORE, 1e9, "pass"),
    "too little": (MORE, 99.9, "fail"),
    "a range around the reference": (DRAW, (0.04, 0.05), "pass"),
    "a range that ends there": (DRAW, (0.04, 0.0477), "pass"),
    "a range that begins there": (DRAW, (0.0477, 0.05), "pass"),
    "a range below": (DRAW, (0.04, 0.0476), "fail"),
    "a range above": (DRAW, (0.0478, 0.05), "fail"),
    "no number": (ABOUT, math.nan, "fail"),
    "no number against one limit": (MORE, math.nan, "fail"),
    "no range": (DRAW, (math.nan, math.nan), "fail"),
}


@pytest.mark.parametrize(("claim", "obtained", "verdict"), VERDICTS.values(), ids=VERDICTS.keys())
def test_a_verdict_is_right_at_its_boundary(claim, obtained, verdict):
    assert claim.verdict(obtained) == verdict


def test_a_tolerance_is_written_as_it_is_applied():
    assert PRINTED.tolerance == "± 5e-05"
    assert (ABOUT.tolerance, RANGE.tolerance, MORE.tolerance, DRAW.tolerance) == (
        "± 1", "0.5 to 2.5", "at least 100", "inside the range",
    )  # fmt: skip


def test_an_obtained_value_has_one_digit_more_than_the_reference():
    assert PRINTED.write(0.038701) == "0.03870"
    assert ABOUT.write(7.96) == "8.0"
    assert DRAW.write((0.04123, 0.05)) == "0.0412 to 0.0500"
    assert [decimals(n) for n in ("12", "10.083", "0.047659844")] == [0, 3, 9]


def test_runs_are_wanted_once_and_in_the_order_of_the_claims():
    first, second = (Runs(label, RunConfig(), 2) for label in "ab")
    large = replace(first, label="c", gpu=True)
    needed = ((second,), (first, second), (), (large,), (first,))
    ledger = [replace(ABOUT, needs=needs) for needs in needed]
    parts = {"x": ledger[:2], "y": ledger[2:]}
    assert required(parts) == [second, first, large]
    assert required(parts, gpu=False) == [second, first]


@pytest.mark.parametrize("form", [SHORT, FULL], ids=["short", "full"])
def test_labels_configurations_and_claims_of_the_ledger_are_unique(form):
    ledger = claims(form)
    wanted = required(ledger)
    assert len({runs.label for runs in wanted}) == len(wanted)
    assert len({runs.config for runs in wanted}) == len(wanted)
    names = [claim.name for part in ledger.values() for claim in part]
    assert len(set(names)) == len(names)


def test_the_full_form_repeats_the_short_one_with_more_of_the_same():
    # So that runs of the short form are not trained again.
    short, full = (
        {(runs.label, runs.config, s) for runs in required(claims(form)) for s in range(runs.seeds)}
        for form in (SHORT, FULL)
    )
    assert {label for label, *_ in short - full} == {SHORT.blog.label}
    assert FULL.blog.config.epochs == 176


def test_linear_algebra_confirms_every_exact_claim(mnist_folder):
    evidence = Evidence(load_dataset("mnist", mnist_folder), [], load=None)
    exact = claims(SHORT)["Exact, by linear algebra"]  # every number of the brief's section 3
    verdicts = {claim.name: claim.verdict(claim.measure(evidence)) for claim in exact}
    assert len(verdicts) == 40
    within = {claim.reference: claim.within for claim in exact}
    assert within["52.7250"] == within["5.1168"] == pytest.approx(0.5e-4)
    assert {name for name, verdict in verdicts.items() if verdict != "pass"} == set()
