"""Answers rank nothing that seeds cannot distinguish, and name what stands behind an interval."""

from types import SimpleNamespace

import pandas as pd
import pytest

from analysis.comparisons import rank
from harness import RunConfig, UserError, objective
from studies import elbo_vs_mse, kl_normalization, kl_weight, latent_size, sweep
from studies.runner import answers
from studies.runner.options import Options
from studies.runner.study import KNOWN, make_plan
from studies.runner.summary import histories_of

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
    assert text.startswith("kl_weight = 0.1: decoder variance 0.05 pixel², calibration ratio 1, 5.")
    assert "Weight 1 costs 13 nats / image of test neg_elbo against it, of encoder and" in text
    assert "decoder together, and is worse." in text
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
    assert "calibration ratio -, 5.0 of 10 latents active" in kl_weight.best_weight(bernoulli)


def test_the_linear_models_collapse_stands_beside_the_best_weight():
    frame = frame_of((0.01, 0.1, 1.0, 3.0), (-5.0, -9.0, 4.0, 5.0))
    assert "linear" not in kl_weight.best_weight(frame)  # an older store
    frame["linear/collapse_variance"] = 0.7
    printed = kl_weight.best_weight(frame)
    assert "The exact linear model has no active latent from 1.4 on." in printed


def test_what_the_seeds_cannot_tell_apart_is_not_ranked():
    frame = frame_of((0.01, 0.1, 1.0), (-9.0, -9.01, -9.005))
    assert "together, and is not distinguishable from it." in kl_weight.best_weight(frame)
    alone = kl_weight.best_weight(frame[frame["seed"] == 0])
    assert "encoder and decoder together. " in alone


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
    assert "4.0 of 16 latents are active" in printed
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
    assert "standard deviation of 0 nats / image of test neg_elbo (median; at most 0 a" in printed
    apart = kl_normalization.paths(modes_frame(5.0))
    assert "optimiser: at equal decoder variance and seed the 2 modes end with a" in apart
    assert "deviation of 3.5 nats / image of test neg_elbo (median; at most 5 apart)" in apart
    frame = modes_frame(5.0)
    alone = kl_normalization.paths(frame[frame["seed"] == 0])
    assert "; that over seeds is - (median)." in alone


def test_decoder_variances_are_ranked_and_not_the_names_of_their_weights():
    compared = kl_normalization.STUDY.compared(modes_frame(0.0))
    ranking = rank(compared, kl_normalization.STUDY.columns)
    assert (ranking.values, ranking.best) == (2, ("pixels", 0.01))


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


def test_a_probe_that_reads_collapsed_latents_is_explained():
    rows = [
        {"condition": name, "seed": seed, "mse": 0.1, "neg_elbo": 0.0, "rate": 0.02}
        | {"probe_accuracy": probe, "active_units": active, "latent_size": 10}
        | {f"mse_class/{i}": 0.1 for i in range(10)}
        for name, probe, active in (
            (elbo_vs_mse.CALIBRATED_ELBO, 0.9, 10.0),
            (elbo_vs_mse.BLOG_ELBO, 0.84, 0.0),
            (elbo_vs_mse.BLOG, 0.1, 0.0),
        )
        for seed in range(3)
    ]
    *_, explained = elbo_vs_mse.cost_and_gain(pd.DataFrame(rows)).split("\n\n")
    assert explained.startswith("'ELBO, weight 1' has a probe accuracy of 0.84 beside 0 active")
    assert "ReLU" not in explained  # whose probe finds no more than chance does
    assert explained.endswith("at most the rate, 0.02 nats / image.")


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


# --- verdict, warnings and next step ------------------------------------------------------------


def curves(*values_of_runs):
    """Return the histories of runs, each from its values by epoch."""
    rows = [
        (f"run {place}", epoch, value)
        for place, values in enumerate(values_of_runs)
        for epoch, value in enumerate(values, 1)
    ]
    return pd.DataFrame(rows, columns=["run_id", "epoch", "value"])


FALLING = [100.0 - epoch for epoch in range(50)]
LEVEL = [*FALLING[:30], *[70.0] * 20]


@pytest.mark.parametrize(
    ("histories", "expected"),
    [
        (curves(FALLING), "neg_elbo fell by 5 nats / image in the last 5 of 50 epochs; try --ep"),
        (curves([8, 7.5], [8, 7]), "neg_elbo fell by 0.75 nats / image in the last epoch; try"),
        (curves([8.0]), "Trained for one epoch: whether neg_elbo still falls is not known; try"),
        (curves(LEVEL), ""),
        (curves([*FALLING[:45], 90, 90, 90, 90, 90]), ""),  # it rises
        (curves([*LEVEL, 69.8]), ""),  # less than 1 % of the fall since the first epoch
        (curves([*LEVEL[:-1], 60], LEVEL), ""),  # of one seed alone: within two standard errors
        (curves(FALLING[:10], FALLING[:8]), ""),  # one stopped early
        (curves(), ""),
    ],
)
def test_an_objective_that_still_falls_is_named_with_epochs_to_try(histories, expected):
    found = answers.still_improving(histories)
    assert found.startswith(expected) if expected else not found
    if expected:
        assert answers.still_improving(histories, epochs=300).endswith("try --epochs 300.")


def runs(**columns):
    same = {"latent_size": 10, "kl_weight": 0.1, "sigma": "fixed"}
    return pd.DataFrame({"seed": range(3), **same, **columns})


@pytest.mark.parametrize(
    ("warn", "columns", "expected"),
    [
        ("worse_than_linear", {"neg_elbo": 9.0, "linear/neg_elbo": -16.0}, "is 25 nats / image wo"),
        ("worse_than_linear", {"neg_elbo": -16.1, "linear/neg_elbo": -16.0}, ""),
        ("worse_than_linear", {"neg_elbo": [-17, -16.9, -14], "linear/neg_elbo": -16.1}, ""),
        (
            "worse_than_linear",
            {"sigma": "optimal", "neg_elbo": 9.0, "linear/neg_elbo": -16.0},
            "",
        ),
        ("few_active", {"active_units": [0, 0, 1]}, "No latent of 10 is active"),
        ("few_active", {"active_units": 2}, "Only 2.0 of 10 latents are active"),
        ("few_active", {"active_units": 3}, ""),
        ("not_calibrated", {"calibration_ratio": 5.0}, "a KL weight near 0.02 agrees with it."),
        ("not_calibrated", {"calibration_ratio": 0.0}, "calibration ratio is 0, far from 1"),
        ("not_calibrated", {"calibration_ratio": 2.9}, ""),
        ("few_effective", {"effective_samples": 2.5}, "rests on 2.5 effective importance samples"),
        ("few_effective", {"effective_samples": 200.0}, ""),
    ],
)
def test_a_setting_that_its_numbers_do_not_carry_has_a_warning(warn, columns, expected):
    found = getattr(answers, warn)(runs(**columns))
    assert expected in found if expected else not found
    assert not getattr(answers, warn)(runs())  # without the metric


def test_a_best_value_at_an_end_is_named_unless_it_is_0_or_a_name():
    assert "w = 4 is the largest value that was tried" in answers.at_an_end("w", [4, 1, 2])
    assert "smaller ones may be better" in answers.at_an_end("w", [0.1, 1.0])
    for values in ([2, 1, 4], [0.0, 1.0], [1, 2], [4], ["4", "1"], [[4], [1]], [True, False]):
        assert not answers.at_an_end("w", values)


def ranked(errors, seeds=3, keys="w"):
    """Rank values 1, 2, ... whose seeds differ by a little luck."""
    rows = [
        {"w": place, "v": "x", "val/neg_elbo": error + luck}
        for place, error in enumerate(errors, 1)
        for luck in LUCK[:seeds]
    ]
    return rank(pd.DataFrame(rows), keys)


def test_a_verdict_is_the_best_setting_how_sure_it_is_and_what_is_next():
    best, sure, following = answers.verdict(ranked((5.0, -9.0, -8.99)), "wait.")
    assert best.startswith("Best: w = 2. Its mean validation neg_elbo of encoder and decoder toget")
    assert "the lowest of 3 values: -9.00 nats / image (95 % interval -9.25 to " in best
    assert "not distinguishable from it: 3; 1 is worse (Games-Howell over all pairs at 5 %)" in sure
    assert "could not be seen; 5 seeds would show" in sure
    assert sure.endswith(
        "The next value would take more than 100 seeds, if it differs as it does here."
    )
    assert following == "Next: wait."
    assert "one seed shows no difference" in answers.verdict(ranked((5.0, 1.0), 1), "")[1]
    assert "there is one value" in answers.verdict(ranked((5.0,)), "")[1]
    several = answers.verdict(ranked((5.0, 1.0), keys=["v", "w"]), "")
    assert several[0].startswith("Best: v = x, w = 2. ")
    many = answers.verdict(ranked([1.0] * 12), "")[1]
    assert "not distinguishable from it: 11 of 11 others" in many


@pytest.mark.parametrize(
    ("errors", "seeds", "values", "epochs", "expected"),
    [
        ((5, 1, 5), 3, [2, 1, 3], 100, {"epochs": 100}),
        ((5, 1, 5), 1, [2, 1, 3], 0, {"seeds": 3}),
        ((5, 1, 5), 2, [2, 1, 3], 0, {"seeds": 3}),
        ((9, 5, 1), 3, [0.4, 0.1, 0.2], 0, {"values": [0.8]}),
        ((9, 5, 1), 3, [64, 16, 32], 0, {"values": [128]}),
        ((1, 5, 9), 3, [-2.0, 0.0, 1.0], 0, {"values": [-4.0]}),
        ((5, 1, 5), 3, [0.1, 0.001, 10.0], 0, None),
        ((5, 1, 5), 3, ["b", "a", "c"], 0, None),
        ((5, 1, 1.001), 3, [2, 1, 3], 0, {"seeds": 5}),
        ((5, 9, 1, 1.001), 3, [4, 1, 2, 3], 0, {"seeds": 5}),
    ],
)
def test_the_next_step_is_the_one_that_the_runs_lack_most(errors, seeds, values, epochs, expected):
    asked = []
    ranking = ranked(errors, seeds)
    text, command = answers.next_step(
        lambda **changes: asked.append(changes) or "python", ranking, values, epochs
    )
    assert asked == ([expected] if expected else [])
    assert command == ("python" if expected else "")
    assert text.endswith(": python" if expected else "are suggested.")
    assert answers.next_step(lambda **changes: "", ranking, values, epochs)[1] == ""


def test_a_plan_gives_the_command_of_another_one_in_the_same_stores():
    options = Options(seeds=2, storage="sqlite:///o.db", tracking_uri="http://u:p@host")
    plan = make_plan(kl_weight.STUDY, options)
    where = "--study-name mine --storage sqlite:///o.db"  # and no password
    line = "python -m studies.kl_weight --dataset digits --epochs"
    assert plan.vary("mine", seeds=5) == f"{line} 50 --seeds 5 {where}"
    assert plan.vary("mine", epochs=9) == f"{line} 9 --seeds 2 {where} --fresh"
    assert plan.vary("mine", values=[0.5]) == f"{line} 50 --values 0.5 --seeds 2 {where}"
    assert plan.vary("mine", values=["x"]) == ""
    grid = make_plan(sweep.sweep({"sigma": ("fixed",), "hidden": ((8,), (6, 4))}), Options())
    line = "python -m studies.sweep --axis sigma=fixed --axis hidden="
    assert plan.vary("mine", values=[-1.0]) == ""
    assert grid.vary("s", values=[[8], []]).startswith(f"{line}8,none --dataset digits")
    assert grid.vary("s", seeds=4).startswith(f"{line}8,6x4 --dataset digits")


def test_refitting_asks_for_another_summary_of_the_same_study():
    plain, refitted = (make_plan(kl_weight.STUDY, Options(refit=n)) for n in (0, 20))
    assert plain.summary_key != refitted.summary_key
    assert plain.proposer.settings == refitted.proposer.settings
    assert "--refit 20" in refitted.command
    with pytest.raises(UserError, match="refit=-1: give a whole number >= 0"):
        make_plan(kl_weight.STUDY, Options(refit=-1))


def test_what_the_decoder_alone_has_is_named_beside_the_whole_model():
    frame = frame_of((0.01, 0.1, 1.0), (-5.0, -9.0, 4.0))
    frame[answers.REFITTED] = frame["kl_weight"] * 10 - 20
    printed = answers.decoders(frame, rank(frame, "kl_weight"), 50)
    assert "first 50 test images, neg_elbo is lowest at kl_weight = 0.01: -19.90" in printed
    assert "(-19.00 at the setting above)" in printed
    assert "and 9 of the decoder alone, and is worse." in kl_weight.best_weight(frame)
    assert (
        answers.decoders(frame.drop(columns=answers.REFITTED), rank(frame, "kl_weight"), 50) == ""
    )


def test_the_number_to_quote_is_that_of_the_chosen_setting():
    frame = frame_of((0.01, 0.1), (-5.0, -9.0))
    ranking, best = rank(frame, "kl_weight"), frame[frame["kl_weight"] == 0.1]
    printed = answers.to_quote(best.assign(neg_elbo_se=0.9), ranking)
    assert "test neg_elbo -8.00 ± 0.25 nats / image of kl_weight = 0.1 (95 % intervals" in printed
    assert "the test images add a standard error of 0.9)" in printed
    assert answers.to_quote(best.drop(columns="neg_elbo"), ranking) == ""


def test_the_group_of_weight_1_is_the_blogs_on_its_data_alone():
    names = [[*latent_size.weights(RunConfig(), KNOWN[name])][0] for name in ("mnist", "kmnist")]
    assert names == ["blog's weight", "weight 1"]


def test_the_further_value_of_kept_weights_is_no_epoch():
    rows = [(run, epoch, 1.0) for run in "ab" for epoch in (1, 2, 3)]
    found = SimpleNamespace(store=SimpleNamespace(histories=lambda ids, metric: rows))
    frame = pd.DataFrame({"run_id": ["a", "b"], "keep": ["best", "last"]})
    assert histories_of(found, frame, "x")["epoch"].tolist() == [1, 2, 1, 2, 3]
    assert len(histories_of(found, frame[["run_id"]], "x")) == 6  # of an earlier version
