"""Answers rank nothing that seeds cannot distinguish, and name what stands behind an interval."""

import pandas as pd
import pytest

from harness import objective
from studies import elbo_vs_mse, kl_normalization, kl_weight, latent_size
from studies.runner.options import Options
from studies.runner.study import make_plan

LUCK = (0.0, 0.1, -0.1)


def frame_of(weights, errors):
    """Make a frame in which a weight has its neg_elbo at every seed, but for a little luck."""
    rows = [
        {"kl_weight": w, "seed": s, "latent_size": 10, "decoder_variance": w / 2, "rate": 1.0}
        | {"val/neg_elbo": e + luck, "neg_elbo": e + luck + 1, "mse": 0.01, "active_units": 5}
        | {"calibration_ratio": 1.0, "mse_class/8": 0.02, "mse_class/3": 0.01}
        | {"sigma": "fixed", "likelihood": "gaussian", "kl_normalization": "pixels"}
        | {"dataset": "digits"}
        for w, e in zip(weights, errors, strict=True)
        for s, luck in enumerate(LUCK)
    ]
    return pd.DataFrame(rows)


def test_the_best_weight_is_named_with_the_cost_of_weight_1():
    text = kl_weight.best_weight(frame_of((0.01, 0.1, 1.0), (-5.0, -9.0, 4.0)))
    assert text.startswith("kl_weight = 0.1 has the lowest validation neg_elbo of 3 values: -9.00")
    assert "Weight 1 costs 13 nats / image of test neg_elbo against it, of encoder and" in text
    assert "decoder together, and is worse." in text
    assert "not distinguishable from it: none." in text
    assert "of the decoder alone" not in text
    assert "Class 8 reconstructs worst (mse 0.0200)." in text


def test_where_the_loss_is_a_likelihood_no_linear_model_is_named():
    frame = frame_of((0.01, 0.1, 1.0), (-5.0, -9.0, 4.0))
    frame["linear/collapse_variance"] = 0.7
    printed = kl_weight.best_weight(frame.assign(sigma="optimal"))
    assert "Weight 1 costs 13 nats" in printed
    assert "linear" not in printed  # the weight is no multiple of the decoder variance
    bernoulli = frame.assign(likelihood="bernoulli", calibration_ratio=float("nan"))
    bernoulli = bernoulli.drop(columns="linear/collapse_variance")
    assert "calibration ratio -, and 5.0 of 10 latents are" in kl_weight.best_weight(bernoulli)


def test_the_linear_models_collapse_stands_beside_the_best_weight():
    frame = frame_of((0.01, 0.1, 1.0, 3.0), (-5.0, -9.0, 4.0, 5.0))
    assert "linear" not in kl_weight.best_weight(frame)  # an older store
    frame["linear/collapse_variance"] = 0.7
    printed = kl_weight.best_weight(frame)
    assert "The exact linear model has no active latent from 1.4 on." in printed


def test_what_the_seeds_cannot_tell_apart_is_not_ranked():
    frame = frame_of((0.01, 0.1, 1.0), (-9.0, -9.01, 4.0))
    near = (frame["kl_weight"] == 0.01) & (frame["seed"] == 0)
    frame.loc[near, "val/neg_elbo"] -= 0.02
    printed = kl_weight.best_weight(frame)
    assert "not distinguishable from it: 0.01." in printed


def test_the_worst_class_is_named():
    frame = frame_of((0.1,), (0.0,)).assign(**{"mse_class/3": 0.5})
    assert kl_weight.worst_class(frame) == "Class 3 reconstructs worst (mse 0.5000)."
    assert kl_weight.worst_class(frame.drop(columns="mse_class/3")) == ""


def sizes_frame():
    """Make runs whose neg_elbo falls up to 4 latents and is level, but for luck, from there on."""
    levels = {1: 5.0, 2: 1.0, 4: -3.0, 8: -3.001, 16: -3.002}
    rows = []
    for size, level in levels.items():
        for seed, luck in enumerate(LUCK):
            wobble = 0.01 * (seed - 1) * (size % 5)
            rows.append(
                {"weight": "calibrated", "kl_weight": 0.02, "latent_size": size, "seed": seed}
                | {"val/neg_elbo": level + luck + wobble, "active_units": min(size, 4)}
            )
    return pd.DataFrame(rows)


def test_latents_beyond_the_useful_ones_are_named():
    printed = latent_size.useful_latents(sizes_frame())
    assert "the smallest size not distinguishable from that is 4" in printed
    assert "Of 16 latents 4.0 are active" in printed
    frame = sizes_frame()
    assert "distinguishable" not in latent_size.useful_latents(frame[frame["seed"] == 0])


def modes_frame(shift):
    rows = [
        {"kl_normalization": mode, "kl_weight": variance / unit, "decoder_variance": variance}
        | {"seed": seed, "neg_elbo": level + luck + shift * place}
        | {"val/neg_elbo": level + luck, "active_units": 0 if variance > 1 else 5}
        for place, (mode, unit) in enumerate({"pixels": 0.5, "sum": 1024.0}.items())
        for variance, level in ((0.01, -3.0), (5.0, 4.0))
        for seed, luck in enumerate(LUCK)
    ]
    return pd.DataFrame(rows)


def test_modes_are_one_weight_by_construction_and_their_paths_are_measured():
    printed = kl_normalization.paths(modes_frame(0.0))
    assert printed.startswith("At equal decoder variance all normalisations have the same loss")
    assert "pixels 0.02, sum 9.77e-06" in printed
    assert "the 2 modes have the same test neg_elbo to the last bit" in printed
    apart = kl_normalization.paths(modes_frame(5.0))
    assert "optimiser: at equal decoder variance and seed the 2 modes differ by" in apart
    assert "deviation of 3.5 nats / image of test neg_elbo (median; at most 5 apart)" in apart
    epsilon = modes_frame(5.0)["kl_normalization"].map({"pixels": 1e-8, "sum": 1e-8 / 2048})
    scaled = kl_normalization.paths(modes_frame(5.0).assign(adam_eps=epsilon))
    assert "whole loss times up to 2048, which Adam divides out but for epsilon" in scaled
    frame = modes_frame(5.0)
    alone = kl_normalization.paths(frame[frame["seed"] == 0])
    assert "and seeds by - (median)." in alone


def test_the_blogs_sentence_is_judged_on_its_data_alone():
    said = "means decoder variance 1,024, and latents are active up to 0.01 only."
    assert said in kl_normalization.paths(modes_frame(0.0).assign(dataset="digits"))
    other = kl_normalization.paths(modes_frame(0.0).assign(dataset="faces"))
    assert "cannot learn properly" not in other


def test_each_mode_trains_as_if_its_whole_loss_were_divided_alike():
    plan = make_plan(kl_normalization.STUDY, Options(seeds=1, values=[0.05]))
    factors = [1, 64, 64 / 10, 64 * 32]
    assert [c.adam_eps for c in plan.configs] == [1e-8 / factor for factor in factors]
    assert [objective.beta(c, 64) for c in plan.configs] == pytest.approx([0.1] * 4, rel=1e-15)
    sgd = make_plan(kl_normalization.STUDY, Options(seeds=1, settings={"optimizer": "sgd"}))
    assert {c.adam_eps for c in sgd.configs} == {1e-8}


def test_cost_and_gain_are_paired_differences():
    rows = [
        {"condition": name, "seed": seed, "mse": mse + luck, "neg_elbo": elbo + luck}
        | {"probe_accuracy": 0.9, "active_units": 1.5, "latent_size": 10}
        for name, mse, elbo in (
            (elbo_vs_mse.CALIBRATED_ELBO, 0.03, -10.0),
            (elbo_vs_mse.MSE_STOCHASTIC, 0.01, 90.0),
            (elbo_vs_mse.AUTOENCODER, 0.01, float("nan")),
            (elbo_vs_mse.BLOG, 0.05, 0.0),
            (elbo_vs_mse.BLOG_WITHOUT_KL, 0.04, 0.0),
        )
        for seed, luck in enumerate(LUCK)
    ]
    printed = elbo_vs_mse.cost_and_gain(pd.DataFrame(rows))
    assert "'ELBO, calibrated' less 'MSE only, stochastic': mse 0.02 ±" in printed
    assert "neg_elbo -100 ±" in printed
    (autoencoder,) = (part for part in printed.split(". ") if "autoencoder" in part)
    assert "mse 0.02 ±" in autoencoder
    assert "neg_elbo" not in autoencoder  # which has none
    assert "'ReLU head, weight 1' less 'ReLU head, no KL': mse 0.01 ±" in printed
    assert "paired, 95 % intervals over 3 seeds" in printed


@pytest.mark.parametrize("missing", list(elbo_vs_mse.CONDITIONS))
def test_a_study_of_fewer_conditions_still_has_an_answer(missing):
    rows = [
        {"condition": name, "seed": seed, "mse": 0.1, "neg_elbo": 0.0, "probe_accuracy": 0.5}
        | {"active_units": 1, "latent_size": 10}
        for name in elbo_vs_mse.CONDITIONS
        if name != missing
        for seed in range(2)
    ]
    assert missing not in elbo_vs_mse.cost_and_gain(pd.DataFrame(rows))
