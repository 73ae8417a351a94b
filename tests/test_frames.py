"""Tidy frames: from a real store, and the statistics on known numbers."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import comparisons, frames, tables
from harness import RunConfig, UserError, load_run, tracking, train_and_evaluate


def table(**columns):
    return pd.DataFrame(columns)


def test_a_study_loads_as_one_row_per_weight_and_seed(finished):
    frame = frames.load_study("kl_weight", "digits", finished.tracking_uri)
    cells = set(zip(frame["kl_weight"], frame["seed"], strict=True))
    assert cells == {(w, s) for w in (0.0, 0.02, 1.0) for s in (0, 1)}
    assert len(frame) == 6
    assert frame["kl_normalization"].unique().tolist() == ["pixels"]
    for column in ("neg_elbo", "val/neg_elbo", "train/mse", "decoder_variance", "kl/9"):
        assert np.issubdtype(frame[column].dtype, np.number), column
    assert np.allclose(frame["decoder_variance"], frame["kl_weight"] / 2)
    assert np.allclose(frame["neg_elbo"], frame["distortion"] + frame["rate"])


def test_frame_rows_hold_the_metrics_that_their_run_logged(finished):
    frame = frames.load_study("kl_weight", "digits", finished.tracking_uri)
    row = frame.iloc[3]
    run = load_run(row["run_id"], finished.tracking_uri)
    assert row["kl_weight"] == run.config.kl_weight
    assert row["mse"] == run.metrics["test/mse"]


def test_a_study_is_loaded_by_its_name(finished):
    uri = finished.tracking_uri
    by_name = frames.load_study("kl_weight-digits", tracking_uri=uri)
    pd.testing.assert_frame_equal(by_name, frames.load_study("kl_weight", "digits", uri))


@pytest.mark.parametrize("name", ["kl_weight", "other", "search-digits"])
def test_for_an_unknown_study_the_stored_ones_are_listed(name, finished):
    with pytest.raises(UserError, match=f"'{name}' in .*, which has kl_weight-digits; make"):
        frames.load_study(name, tracking_uri=finished.tracking_uri)
    with pytest.raises(UserError, match="use up to 100 letters"):
        frames.load_study("it's", tracking_uri=finished.tracking_uri)


def test_results_and_stored_runs_make_the_same_frame(tiny, tracking_uri):
    base = RunConfig(hidden=(16, 8), latent_size=3, epochs=2, kl_weight=0.02)
    configs = [base.replace(seed=seed, sigma=s) for seed in (0, 1) for s in ("fixed", "optimal")]
    where = {"experiment": "both", "tracking_uri": tracking_uri, "device": "cpu"}
    made = frames.to_frame(tracking.train_and_evaluate(configs, tiny, **where))
    stored = frames.load_study("both", tracking_uri=tracking_uri)
    assert set(made) <= set(stored)
    metrics = [name for name in made if "/" in name] + ["neg_elbo", "mse", "rate", "active_units"]
    np.testing.assert_allclose(made[metrics], stored[metrics], rtol=1e-12)
    np.testing.assert_allclose(made["decoder_variance"], stored["decoder_variance"], rtol=1e-12)
    settings = list(RunConfig().named())
    different = [name for name in settings if made[name].tolist() != stored[name].tolist()]
    # MLflow has Python's form of a tuple.
    assert different == ["hidden", "channels", "adam_betas", "lr_milestones"]
    assert set(made["hidden"]) == {"16,8"}


def test_results_without_metrics_are_left_out(tiny):
    diverged = SimpleNamespace(config=RunConfig(), metrics={}, history=[], best_epoch=1)
    assert frames.to_frame([diverged]).empty
    (result,) = train_and_evaluate([RunConfig(epochs=1)], tiny, device="cpu")
    assert len(frames.to_frame([result, diverged])) == 1


def test_half_width_is_the_t_interval_of_scipy():
    values = np.array([1.0, 2.0, 4.0, 4.5])
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert frames.half_width(values) == pytest.approx((high - low) / 2)
    assert math.isnan(frames.half_width(np.array([3.0])))


def test_along_axis_averages_over_seeds_in_order():
    frame = table(w=[2.0, 1.0, 2.0, 1.0], seed=[0, 0, 1, 1], mse=[4.0, 1.0, 6.0, 2.0])
    means = frames.along_axis(frame, "w", ["mse"])
    assert means["w"].tolist() == [1.0, 2.0]
    assert means["mse"].tolist() == [1.5, 5.0]
    assert means["seeds"].tolist() == [2, 2]
    assert means["mse±"].iloc[1] == pytest.approx(frames.half_width(np.array([4.0, 6.0])))


def test_groups_and_names_keep_their_order_while_numbers_are_sorted():
    frame = table(
        g=["b", "b", "a", "a", "b"],
        w=[2.0, 1.0, 2.0, 1.0, 1.0],
        seed=[0, 0, 0, 0, 1],
        mse=[1.0] * 5,
    )
    means = frames.along_axis(frame, ["g", "w"], ["mse"])
    assert list(zip(means["g"], means["w"], strict=True)) == [
        ("b", 1.0),
        ("b", 2.0),
        ("a", 1.0),
        ("a", 2.0),
    ]
    assert means["seeds"].tolist() == [2, 1, 1, 1]


def test_a_pairing_takes_out_what_the_seeds_share():
    seeds = np.arange(6)
    luck = np.array([5.0, -3.0, 8.0, 0.0, -7.0, 2.0])  # far larger than the effect
    noise = np.array([0.01, -0.02, 0.0, 0.02, -0.01, 0.0])
    frame = table(
        w=[1] * 6 + [2] * 6,
        seed=[*seeds, *seeds[::-1]],
        mse=[*(luck + 0.1 + noise), *luck[::-1]],
    )
    gap = frames.paired_difference(frame[frame["w"] == 1], frame[frame["w"] == 2], "mse")
    assert gap.mean == pytest.approx(0.1)
    assert gap.half_width == pytest.approx(frames.half_width(noise))
    assert gap.distinguishable


def test_a_difference_within_its_interval_or_of_one_seed_is_not_distinguishable():
    frame = table(w=[1, 2, 1, 2], seed=[0, 0, 1, 1], mse=[1.0, 0.0, 0.0, 0.9])
    first, second = frame[frame["w"] == 1], frame[frame["w"] == 2]
    assert not frames.paired_difference(first, second, "mse").distinguishable
    assert "not distinguishable" in str(frames.paired_difference(first, second, "mse"))


def test_differences_are_marked_by_the_procedure_over_all_pairs_and_not_by_their_intervals():
    luck = np.array([0.0, 1.0, 0.2, 0.7])  # shared, so that 0.1 ± 0.01 is the paired difference
    made = [luck, luck + 50 + np.array([0, 0.1, 0, 0]), luck + 0.1 + np.array([0, 0.01, 0, 0])]
    frame = table(w=np.repeat([1, 2, 3], 4), seed=[0, 1, 2, 3] * 3, mse=np.concatenate(made))
    frame = frame.assign(g="a", all_nan=np.nan)
    found = frames.differences(frame, ["w"], frame[frame["w"] == 1], ["mse", "all_nan"])
    assert found["w"].tolist() == [1, 2, 3]
    assert found["mse"].tolist() == ["reference", "50 ± 0.0796", found["mse"][2]]
    assert found["mse"][2] == "0.103 ± 0.00796 (not distinguishable)"
    assert frames.compare(frame, "w", 3, 1, "mse").distinguishable
    assert found["all_nan"].tolist() == ["reference", "-", "-"]
    both = frames.differences(frame, ["g", "w"], frame[frame["w"] == 1], ["mse"])
    assert both["mse"].tolist() == found["mse"].tolist()


def test_one_seed_has_no_verdict_and_two_are_marked():
    frame = table(w=[1, 1, 2, 2], seed=[0, 1, 0, 1], mse=[0.0, 1.0, 5.0, 6.5])
    reference = frame[frame["w"] == 1]
    (_, two) = frames.differences(frame, ["w"], reference, ["mse"])["mse"]
    assert two == "5.25 ± 3.18 (2 seeds only, not distinguishable)"
    (_, one) = frames.differences(frame[::2], ["w"], reference[:1], ["mse"])["mse"]
    assert one == "5 (one seed)"
    assert not frames.compare(frame[::2], "w", 1, 2, "mse").distinguishable


def test_intervals_stay_in_the_range_of_their_metric():
    frame = table(
        w=[1.0, 1.0, 2.0, 2.0, 3.0],
        seed=[0, 1, 0, 1, 0],
        mse=[0.0, 0.5, 0.5, 0.5, 0.1],
        latent_size=[4] * 5,
        active_units=[3.0, 4.0, 3.0, 4.0, 2.0],
        probe_accuracy=[0.9, 1.0, 0.5, 0.51, 0.5],
        neg_elbo=[-1.0, 1.0, 2.0, 2.0, 1.0],
    )
    frame["val/mse"] = frame["mse"]
    metrics = ["mse", "val/mse", "active_units", "probe_accuracy", "neg_elbo"]
    means = frames.along_axis(frame, "w", metrics)
    for metric, bounds in zip(metrics, [(0, np.inf)] * 2 + [(0, 4), (0, 1)], strict=False):
        low, high = frames.interval(means, metric)
        mean, half = means[metric], means[f"{metric}±"]
        assert low[0] == max(mean[0] - half[0], bounds[0])
        assert high[0] == min(mean[0] + half[0], bounds[1])
        assert math.isnan(low[2])
        assert math.isnan(high[2])
    assert [*means] == ["w", "seeds", *(name for m in metrics for name in (m, f"{m}±"))]
    assert frames.interval(means, "neg_elbo")[0][0] == -means["neg_elbo±"][0]
    cells = tables.cells(means)
    assert [*cells] == ["w", *metrics]
    assert cells["mse"].tolist() == ["0.2500 (0.0000 to 3.4266)", "0.5000 ± 0.0000", "0.1000"]
    assert cells["active_units"].tolist() == ["3.5 (0.0 to 4.0)", "3.5 (0.0 to 4.0)", "2.0"]
    assert cells["neg_elbo"][0] == "0.00 ± 12.71"
    for metric in metrics:
        for place, row in means.iterrows():
            assert tables.plus_minus(row, metric) == cells[metric][place]
    sizes = frames.along_axis(frame.assign(latent_size=frame["w"] + 4), "latent_size", metrics)
    assert frames.interval(sizes, "active_units")[1][:2].tolist() == [5, 6]
    named = frames.along_axis(frame.assign(w=frame["w"].map(str)), "w", metrics)
    assert tables.plus_minus(named.iloc[0], "mse") == cells["mse"][0]
    assert tables.over(2) == "95 % intervals over 2 seeds only"


def test_no_metric_of_unknown_range_is_cut_off():
    for metric in ("neg_elbo", "val/neg_log_likelihood", "term/rate", "mutual_information_lower"):
        assert comparisons.limits(metric) == (-np.inf, np.inf)
    assert comparisons.limits("mse_class/3") == comparisons.limits("train/kl/0") == (0, np.inf)
    assert comparisons.limits("knn_accuracy") == (0, 1)


def test_the_best_value_has_the_lowest_mean_on_validation():
    frame = table(w=[1, 1, 2, 2], seed=[0, 1, 0, 1])
    frame["val/neg_elbo"] = [0.0, 4.0, 1.5, 1.5]
    assert frames.best_value(frame, "w") == 2


def test_classes_are_ordered_by_error():
    frame = pd.DataFrame({"mse_class/0": [1.0, 3.0], "mse_class/1": [4.0, 4.0], "mse": [9, 9]})
    assert frames.class_errors(frame).to_dict() == {1: 4.0, 0: 2.0}


def test_cells_show_intervals_where_there_are_any():
    one = frames.along_axis(table(w=[1.0], seed=[0], mse=[0.12345]), "w", ["mse"])
    assert tables.cells(one)["mse"].tolist() == ["0.1235"]
    two = frames.along_axis(table(w=[1.0, 1.0], seed=[0, 1], mse=[0.1, 0.1]), "w", ["mse"])
    assert tables.cells(two)["mse"].tolist() == ["0.1000 ± 0.0000"]
    assert tables.markdown(tables.cells(two)).splitlines()[-1] == "| 1 | 0.1000 ± 0.0000 |"


def test_kl_is_ordered_run_by_run_and_adds_up_to_the_rate():
    kl = {"kl/0": [0.1, 3.0, 1.0], "kl/1": [2.0, 1.0, np.nan], "kl/10": [1.0, 2.0, np.nan]}
    made = pd.DataFrame(kl | {"val/kl/0": 9.0, "rate": [3.1, 6.0, 1.0]}, index=[4, 7, 9])
    ranked = frames.ordered_kl(made)
    expected = pd.DataFrame(
        {1: [2.0, 3.0, 1.0], 2: [1.0, 2.0, np.nan], 3: [0.1, 1.0, np.nan]}, index=[4, 7, 9]
    )
    pd.testing.assert_frame_equal(ranked, expected)
    assert np.allclose(ranked.sum(axis=1), made["rate"])
