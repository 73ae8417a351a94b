"""Plans before anything is trained: labels, weights, settings and commands of points."""

import shlex
from dataclasses import replace

import pytest

from harness import RunConfig, UserError
from harness.objective import beta, decoder_variance
from harness.tracking.record import description
from studies import conditions, elbo_vs_mse, kl_weight, latent_size, search
from studies.runner import cli
from studies.runner.options import Options
from studies.runner.study import KNOWN, Axis, make_plan


def settings(study, *words):
    """Return what a command must agree in with the study that it continues."""
    kind = type(study.axis.values[0])
    return make_plan(study, cli.parse(study.name, "Why?", kind, words)).proposer.settings


@pytest.mark.parametrize("mode", ["pixels", "batch", "sum"])
def test_a_calibrated_weight_is_calibrated_in_every_normalisation(mode):
    sizes = make_plan(latent_size.STUDY, Options(kl_normalization=mode, seeds=1))
    named = {"blog's weight": 0.5, "calibrated weight": 0.01}
    for cell in sizes.proposer.cells:
        wanted = named[cell.identity["group"]]
        assert decoder_variance(cell.config, 64) == pytest.approx(wanted, rel=1e-15)
    named = {conditions.BLOG_ELBO: 0.5, conditions.BLOG: 0.5, conditions.CALIBRATED_ELBO: 0.01}
    for cell in make_plan(
        elbo_vs_mse.STUDY, Options(kl_normalization=mode, seeds=1)
    ).proposer.cells:
        wanted = named.get(cell.identity["value"], 0.0)
        assert decoder_variance(cell.config, 64) == pytest.approx(wanted, rel=1e-15)
    baseline = search.baseline(RunConfig(kl_normalization=mode), KNOWN["digits"])
    assert decoder_variance(baseline, 64) == pytest.approx(0.01, rel=1e-15)


def test_no_weight_is_called_calibrated_where_weights_set_no_variance():
    with pytest.raises(UserError, match="the KL weight sets the decoder variance only"):
        make_plan(elbo_vs_mse.STUDY, Options(sigma="optimal"))
    plan = make_plan(latent_size.STUDY, Options(sigma="optimal", kl_normalization="batch"))
    assert {cell.identity["group"] for cell in plan.proposer.cells} == {"exact ELBO's weight"}
    assert {beta(config, 64) for config in plan.configs} == {1.0}
    with pytest.raises(UserError, match="divides by the number of latents"):
        make_plan(latent_size.STUDY, Options(kl_normalization="latent"))
    sigma_vae = search.baseline(RunConfig(sigma="optimal"), KNOWN["mnist"])
    assert beta(sigma_vae, 784) == 1


@pytest.mark.parametrize("values", [(), ((1, 2),), (None,)])
def test_an_axis_has_values_that_are_numbers_or_words(values):
    with pytest.raises(UserError, match="give at least one, each a number or a word"):
        Axis("hidden", values)


@pytest.mark.parametrize(("name", "question"), [("mine", None), ("mine", " "), ("a/b", "Why?")])
def test_a_study_has_a_name_and_a_question(name, question):
    with pytest.raises(UserError, match="has no question|study_name="):
        replace(kl_weight.STUDY, name=name, question=question)


def test_every_configuration_has_what_the_study_compares():
    axis = Axis("latent", ("stochastic", "deterministic"))
    study = replace(kl_weight.STUDY, base=RunConfig(kl_weight=0.0), axis=axis)
    with pytest.raises(UserError, match="a plain autoencoder has no neg_elbo"):
        make_plan(study, Options())


def test_points_that_differ_have_different_names():
    plan = make_plan(kl_weight.STUDY, Options(values=(0.1001, 0.1002, 1 / 3), seeds=1))
    assert [f"{cell.label} seed={cell.config.seed}" for cell in plan.proposer.cells] == [
        *("kl_weight=0.1001 seed=0", "kl_weight=0.1002 seed=0", "kl_weight=0.3333 seed=0")
    ]


def test_the_command_of_a_report_is_one_that_the_study_takes():
    options = Options(values=(8,), seeds=1, kl_normalization="sum", study_name="mine")
    plan = make_plan(latent_size.STUDY, options)
    arguments = shlex.split(plan.command.partition("studies.latent_size ")[2])
    again = make_plan(latent_size.STUDY, cli.parse("latent_size", "Why?", int, arguments))
    assert again.proposer == plan.proposer
    assert (again.name, again.configs) == ("mine", plan.configs)


def test_what_may_grow_is_no_setting():
    small = settings(kl_weight.STUDY, "--values", "1", "--seeds", "1")
    assert settings(kl_weight.STUDY) == small
    assert settings(kl_weight.STUDY, "--epochs", "3") != small
    assert settings(kl_weight.STUDY, "--dataset", "mnist") != small


def test_addresses_in_commands_are_quoted():
    text = description("0", "sqlite:////my place/m.db")
    assert "--tracking-uri 'sqlite:////my place/m.db'" in text
