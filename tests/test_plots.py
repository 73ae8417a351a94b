"""Figures show the numbers of the frame they were given."""

import numpy as np
import pytest

from analysis import frames, planes, plots


@pytest.fixture(scope="module")
def frame(finished):
    return frames.load_runs("kl_weight-digits", "kl_weight-digits", finished.tracking_uri)


def test_the_panels_hold_mean_and_single_runs_of_each_metric(frame):
    figure = plots.metrics_along_axis(frame, "kl_weight")
    for panel, metric in zip(figure.axes, ("neg_elbo", "mse", "rate", "active_units"), strict=True):
        mean, dots = panel.get_lines()[:2]
        expected = frame.groupby("kl_weight")[metric].mean()
        assert np.allclose(mean.get_xdata(), expected.index)
        assert np.allclose(mean.get_ydata(), expected)
        assert sorted(dots.get_ydata()) == sorted(frame[metric])
        assert panel.get_ylabel() == plots.LABELS[metric]


def test_weight_zero_has_a_place_on_the_logarithmic_axis(frame):
    panel = plots.metrics_along_axis(frame, "kl_weight").axes[0]
    assert panel.get_xscale() == "symlog"
    assert panel.get_xlim()[0] < 0 < panel.get_xlim()[1]


def test_the_plane_holds_every_run_and_its_lines_have_constant_neg_elbo(frame):
    panel = planes.rate_distortion(frame, "kl_weight").axes[0]
    points = {(x, y) for line in panel.get_lines() for x, y in zip(*line.get_data(), strict=True)}
    assert set(zip(frame["rate"], frame["distortion"], strict=True)) <= points
    thin = [
        line for line in panel.get_lines() if line.get_linewidth() == 0.5 and len(line.get_xdata())
    ]
    assert thin
    for line in thin:
        assert np.ptp(np.add(*line.get_data())) < 1e-9


def test_the_calibrated_weight_is_marked_where_the_ratio_crosses_one(frame):
    made = frame.assign(kl_weight=[0.01, 0.01, 0.1, 0.1, 1.0, 1.0])
    made["calibration_ratio"] = [0.1, 0.1, 1.0, 1.0, 10.0, 10.0]
    panel = plots.metrics_along_axis(made, "kl_weight").axes[1]
    marks = [line for line in panel.get_lines() if line.get_label() == "calibration_ratio = 1"]
    assert marks[0].get_xdata()[0] == pytest.approx(0.1)


@pytest.mark.parametrize("metric", plots.FOUR)
def test_the_linear_model_is_a_dashed_line_with_its_values(frame, metric):
    panel = plots.metrics_along_axis(frame, "kl_weight").axes[plots.FOUR.index(metric)]
    dashed = [line for line in panel.get_lines() if line.get_linestyle() == "--"][0]
    expected = frame.groupby("kl_weight")[f"linear/{metric}"].mean()
    np.testing.assert_array_equal(dashed.get_xdata(), expected.index)
    np.testing.assert_array_equal(dashed.get_ydata(), expected)


def test_the_weight_of_the_linear_models_collapse_is_marked(frame):
    made = frame.assign(**{"linear/collapse_variance": 0.3})
    panel = plots.metrics_along_axis(made, "kl_weight").axes[3]
    (mark,) = [m for m in panel.get_lines() if m.get_label() == "linear model collapses"]
    assert mark.get_xdata()[0] == pytest.approx(0.6)


def test_stores_without_the_linear_model_are_drawn_without_it(frame):
    old = frame[[c for c in frame.columns if not c.startswith("linear/")]]
    for panel in plots.metrics_along_axis(old, "kl_weight").axes:
        assert not [line for line in panel.get_lines() if line.get_linestyle() in ("--", "-.")]


def test_one_seed_and_one_value_can_be_drawn(frame):
    plots.metrics_along_axis(frame[:1], "kl_weight")
    planes.rate_distortion(frame[:1], "kl_weight")
