"""Figures of latents and samples show the numbers of the frame they were given."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from analysis import frames, plots
from analysis.plots.latents import shown_values
from analysis.plots.style import COLORS


@pytest.fixture(scope="module")
def frame(finished):
    return frames.load_study("kl_weight", "digits", finished.tracking_uri)


def test_bars_are_the_ordered_kl_and_as_many_are_dark_as_are_active(frame):
    # After three epochs weight 1 has collapsed; its bars are looked at all the same.
    active = frame["kl_weight"].map({0.0: 10, 0.02: 7.4, 1.0: 2})
    made = frame.assign(active_units=active, rate=1.0)
    panels = plots.kl_per_latent(made, "kl_weight").axes
    assert [panel.get_title().split("\n")[0].split(" (")[0] for panel in panels] == [
        "kl_weight = 0.02",
        "kl_weight = 1",
    ]
    for panel, weight, active in zip(panels, (0.02, 1.0), (7, 2), strict=True):
        expected = frames.ordered_kl(frame[frame["kl_weight"] == weight]).mean()
        assert np.allclose([bar.get_height() for bar in panel.patches], expected)
        dark = [to_hex(bar.get_facecolor()) == COLORS[0].lower() for bar in panel.patches]
        assert dark == [True] * active + [False] * (10 - active)


def test_the_best_value_says_so_and_groups_are_rows(frame):
    made = pd.concat([frame.assign(part="first"), frame.assign(part="second")])
    made = made.assign(rate=1.0, **{"val/neg_elbo": abs(made["kl_weight"] - 0.02)})
    axes = plots.kl_per_latent(made, "kl_weight", "part").axes
    titles = [panel.get_title().split("\n")[0] for panel in axes]
    assert titles == ["kl_weight = 0.02 (best)", "kl_weight = 1"] * 2
    assert [label.split("\n")[0] for panel in axes if (label := panel.get_ylabel())] == [
        "first",
        "second",
    ]


def sweep(values, best, rate=1.0, axis="kl_weight"):
    """Return one run a value; the best has the lowest validation neg_elbo."""
    scores = [-1.0 if value == best else 0.0 for value in values]
    return pd.DataFrame({axis: values, "val/neg_elbo": scores, "rate": rate})


def test_panels_are_the_best_weight_one_and_others_far_apart():
    weights = [0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    shown = shown_values(sweep(weights, best=0.003), "kl_weight")
    assert shown == sorted(shown)
    assert len(shown) == 5
    assert {0.003, 1.0, 10.0} <= set(shown)
    assert 0.0 not in shown


def test_collapsed_values_have_no_panel_unless_there_are_no_others():
    weights = [0.01, 0.1, 1.0, 10.0]
    rates = [20.0, 10.0, 0.5, 0.001]
    assert shown_values(sweep(weights, 0.1, rates), "kl_weight") == weights[:3]
    dead = sweep([1.0, 10.0], 1.0, 0.0)
    assert shown_values(dead, "kl_weight") == [1.0, 10.0]


def test_weight_zero_has_no_panel_even_if_it_is_best():
    assert shown_values(sweep([0.0, 0.1, 1.0], best=0.0), "kl_weight") == [0.1, 1.0]
    assert shown_values(sweep([0.0], best=0.0), "kl_weight") == [0.0]


def test_names_keep_their_order_and_need_no_weight():
    names = ["ELBO", "blog", "MSE only"]
    shown = shown_values(sweep(names, "blog", axis="condition"), "condition")
    assert shown == names


def test_many_latents_of_different_numbers_and_runs_without_kl_can_be_drawn(frame):
    wide = frame[:2].assign(latent_size=64, **{f"kl/{i}": 0.1 for i in range(64)})
    plain = frame[2:3].assign(latent_size=3, rate=np.nan)
    few = frame[3:4].assign(latent_size=3, **{f"kl/{i}": np.nan for i in range(3, 10)})
    axes = plots.kl_per_latent(pd.concat([wide, plain, few]), "latent_size").axes
    assert [len(panel.patches) for panel in axes] == [3, 64]
    assert [len(panel.containers) for panel in axes] == [2, 1]  # lines of 64 would be a slab


def test_quality_lines_are_means_along_the_axis(frame):
    left, right = plots.quality_along_axis(frame, "kl_weight").axes
    drawn = {line.get_label(): line for panel in (left, right) for line in panel.get_lines()}
    for metric in ("rate", "mutual_information_lower", "frechet", "frechet_reconstructions"):
        expected = frame.groupby("kl_weight")[metric].mean()
        np.testing.assert_allclose(drawn[metric].get_ydata(), expected)
    floor = frame["frechet_floor"].unique()
    assert len(floor) == 1
    assert drawn["frechet_floor"].get_ydata()[0] == pytest.approx(floor[0])


def test_stores_without_quality_are_drawn_without_it(frame):
    missing = [c for c in frame.columns if "frechet" in c or "information" in c]
    left, right = plots.quality_along_axis(frame.drop(columns=missing), "kl_weight").axes
    assert [line.get_label() for line in left.get_lines()] == ["rate"]
    assert not right.get_lines()
