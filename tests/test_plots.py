"""Figures show the numbers of the frame they were given."""

import numpy as np
import pandas as pd
import pytest

from analysis import frames, plots
from analysis.plots.along_axis import FOUR
from analysis.plots.style import COLORS, label
from analysis.tables import plain
from harness.tracking import connect
from harness.tracking.runs import Epoch, Run


@pytest.fixture(scope="module")
def frame(finished):
    return frames.load_study("kl_weight", "digits", finished.tracking_uri)


def test_the_panels_hold_mean_and_single_runs_of_each_metric(frame):
    figure = plots.metrics_along_axis(frame, "kl_weight")
    for panel, metric in zip(figure.axes, ("neg_elbo", "mse", "rate", "active_units"), strict=True):
        mean, dots = panel.get_lines()[:2]
        expected = frame.groupby("kl_weight")[metric].mean()
        assert np.allclose(mean.get_xdata(), expected.index)
        assert np.allclose(mean.get_ydata(), expected)
        assert sorted(dots.get_ydata()) == sorted(frame[metric])
        assert panel.get_ylabel() == label(metric)


def test_weight_zero_has_a_place_on_the_logarithmic_axis(frame):
    panel = plots.metrics_along_axis(frame, "kl_weight").axes[0]
    assert panel.get_xscale() == "symlog"
    assert panel.get_xlim()[0] < 0 < panel.get_xlim()[1]


def test_the_plane_holds_every_run_and_its_lines_have_constant_neg_elbo(frame):
    panel = plots.rate_distortion(frame, "kl_weight").axes[0]
    points = {(x, y) for line in panel.get_lines() for x, y in zip(*line.get_data(), strict=True)}
    assert set(zip(frame["rate"], frame["distortion"], strict=True)) <= points
    thin = [
        line for line in panel.get_lines() if line.get_linewidth() == 0.5 and len(line.get_xdata())
    ]
    assert thin
    for line in thin:
        assert np.ptp(np.add(*line.get_data())) < 1e-9


def test_values_at_one_point_of_the_plane_have_one_label():
    size, rate = [1, 2, 4, 8, 1, 2], [0.0, 0.01, 0.0, 0.02, 5.0, 9.0]
    made = pd.DataFrame({"x": size, "part": [*"aaaabb"], "rate": rate})
    made["distortion"] = [7.0, 7.0, 7.01, 7.0, 0.0, -2.0]
    figure = plots.rate_distortion(made, "x", "part")
    assert [text.get_text() for text in figure.axes[0].texts] == ["1 … 8", "1", "2"]
    figure = plots.rate_distortion(made[1:], "x", "part")
    assert figure.axes[0].texts[0].get_text() == "2, 4, 8"


def test_the_calibrated_weight_is_marked_where_the_ratio_crosses_one(frame):
    made = frame.assign(kl_weight=[0.01, 0.01, 0.1, 0.1, 1.0, 1.0])
    made["calibration_ratio"] = [0.1, 0.1, 1.0, 1.0, 10.0, 10.0]
    panel = plots.metrics_along_axis(made, "kl_weight").axes[1]
    marks = [line for line in panel.get_lines() if line.get_label() == "calibration_ratio = 1"]
    assert marks[0].get_xdata()[0] == pytest.approx(0.1)


@pytest.mark.parametrize("metric", FOUR)
def test_the_linear_model_is_a_dashed_line_with_its_values(frame, metric):
    panel = plots.metrics_along_axis(frame, "kl_weight").axes[FOUR.index(metric)]
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


def test_one_seed_and_one_value_are_drawn_as_one_point(frame):
    one = frame[:1]
    panels = plots.metrics_along_axis(one, "kl_weight").axes
    for panel, metric in zip(panels, ("neg_elbo", "mse", "rate", "active_units"), strict=True):
        first = panel.get_lines()[0]
        assert first.get_xydata().tolist() == [[one["kl_weight"].item(), one[metric].item()]]
    lines = plots.rate_distortion(one, "kl_weight").axes[0].get_lines()
    assert [one["rate"].item(), one["distortion"].item()] in [
        point for line in lines for point in line.get_xydata().tolist()
    ]


NAMES = ["mlp", "mlp", "conv", "conv", "linear", "linear"]
TWELVE = [f"group {i}" for i in range(12)]


def test_an_axis_of_names_is_drawn_in_its_order(frame):
    made = frame.assign(model=NAMES)
    figure = plots.metrics_along_axis(made, "model")
    mean, dashed = (
        next(line for line in figure.axes[0].get_lines() if line.get_linestyle() == style)
        for style in ("-", "--")
    )
    for line in (mean, dashed):
        assert list(line.get_xdata()) == ["mlp", "conv", "linear"]
    plots.quality_along_axis(made, "model")
    (legend,) = plots.rate_distortion(made, "model").legends
    assert [text.get_text() for text in legend.get_texts()][1:] == ["mlp", "conv", "linear"]


@pytest.mark.parametrize("widths", [("256", "512,256", "64,32"), ("512,256", "64", "128,64,32")])
def test_an_axis_of_tuples_is_drawn_as_categories(widths, frame):
    axis = frames.tidy(
        [
            Run(row["run_id"], row["name"], "FINISHED", {"hidden": width}, {}, {})
            for width, (_, row) in zip(np.repeat(widths, 2), frame.iterrows(), strict=True)
        ]
    )
    made = frame.assign(hidden=axis["hidden"])
    panel = plots.metrics_along_axis(made, "hidden").axes[3]
    assert list(panel.get_lines()[0].get_xdata()) == list(widths)
    assert [text.get_text() for text in panel.get_xticklabels()] == list(widths)
    (legend,) = plots.rate_distortion(made, "hidden").legends
    assert [text.get_text() for text in legend.get_texts()][1:] == list(widths)
    shown = plots.kl_per_latent(made.assign(rate=1.0), "hidden").axes
    titles = [panel.get_title().split("\n")[0].removesuffix(" (best)") for panel in shown]
    assert titles == [f"hidden = {width}" for width in widths]
    assert frames.along_axis(made, "hidden", ["mse"])["hidden"].tolist() == list(widths)


def test_calibration_is_marked_on_the_axis_of_a_weight_alone(frame):
    made = frame.assign(learning_rate=[0.01, 0.01, 0.1, 0.1, 1.0, 1.0])
    made["calibration_ratio"] = [0.1, 0.1, 10.0, 10.0, 0.5, 0.5]
    for panel in plots.metrics_along_axis(made, "learning_rate").axes:
        assert "calibration_ratio = 1" not in [line.get_label() for line in panel.get_lines()]


def test_no_group_is_left_out_and_none_looks_like_another(frame):
    made = pd.concat([frame.assign(part=part) for part in TWELVE])
    panel = plots.metrics_along_axis(made, "kl_weight", "part").axes[0]
    assert [n for n in panel.get_legend_handles_labels()[1] if n.startswith("group")] == TWELVE
    plots.rate_distortion(made, "kl_weight", "part")
    lines = plots.frontier(made, "part").axes[0].get_lines()
    looks = {(x.get_color(), x.get_marker()) for x in lines if x.get_label() in TWELVE}
    assert len(looks) == len(TWELVE)


def test_many_classes_have_a_colour_each():
    rows = {"model": "one", "x": range(12), "y": range(12), "class": range(12)}
    panel = plots.latent_scatter(pd.DataFrame(rows)).axes[0]
    assert len({line.get_color() for line in panel.get_lines()}) == 12


def test_the_diagonal_of_all_latents_does_not_look_like_the_linear_model(frame):
    made = frame.assign(latent_size=[2, 2, 4, 4, 8, 8], part="first")
    active = plots.metrics_along_latent_size(made, "part").axes[3]
    sizes = [2, 4, 8]
    (diagonal,) = [line for line in active.get_lines() if list(line.get_ydata()) == sizes]
    assert diagonal.get_linestyle() == "-"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0021544, "0.00215"), (1024.0, "1024"), (10, "10"), ("conv", "conv"), (0.0, "0")]
    + [(float("nan"), "-"), ((256, 64), "256, 64")],
)
def test_values_are_written_shortly(value, text):
    assert plain(value) == text


def test_no_band_and_no_bar_leaves_the_range_of_its_metric():
    made = pd.DataFrame(
        {
            "condition": ["a", "a", "b", "b", "c"],
            "hidden": [1, 1, 2, 2, 3],
            "latent_size": 4,
            "seed": [0, 1, 0, 1, 0],
            "neg_elbo": [-1.0, 1.0, 3.0, 3.1, 2.0],
            "mse": [0.0, 0.5, 0.2, 0.2, -1e-9],
            "rate": [0.1, 2.0, 5.0, 5.0, 1.0],
            "active_units": [3.0, 4.0, 0.0, 1.0, 2.0],
            "kl/0": [0.1, 2.0, 5.0, 5.0, 1.0],
            "val/neg_elbo": [-1.0, 1.0, 3.0, 3.1, 2.0],
        }
    )
    figure = plots.metrics_along_axis(made, "hidden")
    bands = [panel.collections[0].get_paths()[0].vertices[:, 1] for panel in figure.axes]
    lowest = [band.min() for band in bands]
    assert lowest[0] < -10
    assert lowest[1:] == [pytest.approx(0, abs=1e-9), 0, 0]
    assert bands[3].max() == 4
    assert bands[1].max() > 3
    assert "mean of 2 seeds only, 95 %" in figure.axes[0].get_legend_handles_labels()[1]
    bars = [
        panel.collections[0].get_segments() for panel in plots.conditions(made).axes
    ]  # mse, neg_elbo, rate, active units
    ends = [np.concatenate(segments)[:, 0] for segments in bars]
    assert [part.min() for part in ends] == [pytest.approx(-1e-9), ends[1].min(), 0, 0]
    assert ends[1].min() < -10
    assert ends[3].max() == 4
    for panel in plots.kl_per_latent(made, "hidden").axes:
        assert np.concatenate(panel.collections[0].get_segments())[:, 1].min() >= 0


def curves_of(values, ends, lengths=(), **columns):
    """Make histories that fall to an end, and their frame: one run a value, unless repeated."""
    rows = {"run_id": [f"run {i}" for i in range(len(values))], "x": values, "val/neg_elbo": ends}
    lengths = lengths or [10] * len(values)
    points = [
        (run, epoch, end + 100 / epoch**3)
        for run, end, length in zip(rows["run_id"], ends, lengths, strict=True)
        for epoch in range(1, length + 1)
    ]
    histories = pd.DataFrame(points, columns=["run_id", "epoch", "value"])
    return histories, pd.DataFrame(rows | {"neg_elbo": ends} | columns)


def lines(panel, width):
    """Return the drawn lines of a width: .7 runs, 1.8 means, 1.2 the linear model."""
    shown = [line for line in panel.get_lines() if len(line.get_xdata())]
    return [line for line in shown if line.get_linewidth() == width]


def test_learning_curves_hold_every_epoch_of_every_run_and_the_mean_over_seeds(finished, frame):
    rows = connect(finished.tracking_uri).histories(frame["run_id"].tolist(), "val/neg_elbo")
    histories = pd.DataFrame(rows, columns=Epoch._fields)
    assert len(histories) == frame["epochs"].sum()
    figure = plots.learning_curves(histories, frame, "kl_weight")
    panel, values = figure.axes[0], histories.pivot(index="epoch", columns="run_id")["value"]
    drawn = {tuple(line.get_ydata()) for line in lines(panel, 0.7)}
    assert drawn == {tuple(values[run]) for run in frame["run_id"]}
    means = {tuple(line.get_ydata()): line.get_color() for line in lines(panel, 1.8)}
    best = frame.groupby("kl_weight")["val/neg_elbo"].mean().idxmin()
    for weight, runs in frame.groupby("kl_weight"):
        color = means.pop(tuple(values[runs["run_id"]].mean(axis=1)))
        assert (color == COLORS[1]) == (weight == best)
    assert not means
    (linear,) = lines(panel, 1.2)
    expected = frame.loc[frame["kl_weight"] == best, "linear/neg_elbo"].mean()
    assert linear.get_ydata()[0] == expected
    fitted = plots.learning_curves(histories, frame.assign(sigma="optimal"), "kl_weight").axes[0]
    assert not lines(fitted, 1.2)
    assert figure.get_supylabel() == label("val/neg_elbo")


def test_a_mean_ends_with_the_first_run_and_each_run_ends_with_a_dot():
    histories, frame = curves_of([1, 1, 2, 2], [0.0, 1.0, 5.0, 6.0], lengths=[4, 10, 10, 10])
    panel = plots.learning_curves(histories, frame, "x").axes[0]
    means = [np.isfinite(line.get_ydata()).sum() for line in lines(panel, 1.8)]
    assert means == [4, 10]
    runs = lines(panel, 0.7)
    assert [(run.get_xdata()[-1], *run.get_markevery()) for run in runs] == [
        (end, -1) for end in (4, 10, 10, 10)
    ]


def test_first_epochs_and_bad_values_do_not_flatten_the_rest_and_are_counted():
    histories, frame = curves_of([1, 2, 3, 4, 5], [0.0, 1.0, 2.0, 3.0, 500.0])
    panel = plots.learning_curves(histories, frame, "x").axes[0]
    assert panel.get_ylim()[1] < 20
    assert panel.texts[0].get_text() == "1 of 5 runs end above, up to 500"
    panel = plots.learning_curves(histories, frame[:4], "x").axes[0]
    assert panel.get_ylim()[1] < 20
    assert not panel.texts


def test_more_than_nine_values_have_a_colour_bar_and_no_legend(frame):
    histories, made = curves_of([*range(64)], [float(abs(x - 20)) for x in range(64)])
    figure = plots.learning_curves(histories, made, "x")
    assert figure.axes[1].get_ylabel() == "x"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["best: 20"]
    figure = plots.learning_curves(histories, made.assign(x=[f"${x}" for x in range(64)]), "x")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [r"best: \$20"]
    ticks = [text.get_text() for text in figure.axes[1].get_yticklabels()]
    assert (ticks[0], len(ticks)) == (r"\$0", 9)
    many = pd.concat([frame.assign(kl_weight=frame["kl_weight"] + i) for i in range(5)])
    plane = plots.rate_distortion(many, "kl_weight")
    assert plane.axes[1].get_ylabel() == label("kl_weight")
    assert len(plane.legends[0].get_texts()) == 1  # the lines of equal neg_elbo


def test_groups_have_a_panel_each_with_a_best_value_of_their_own():
    histories, frame = curves_of(["a", "b", "a", "b", "a"], [0.0, 1.0, 3.0, 2.0, 0.0])
    made = frame.assign(part=["one", "one", "two", "two", "three"])
    figure = plots.learning_curves(histories, made, "x", "part")
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["one: best a", "two: best b", "three: best a"]


@pytest.mark.parametrize("rows", [0, 1])
def test_runs_without_epochs_and_of_a_single_epoch_are_drawn(rows):
    histories, frame = curves_of([1], [0.0])
    histories = pd.DataFrame(histories[:rows].values.tolist(), columns=Epoch._fields)
    panel = plots.learning_curves(histories, frame, "x").axes[0]
    assert len(panel.texts if not rows else lines(panel, 0.7)) == 1
