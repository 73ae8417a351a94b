"""Plans before anything is trained: labels, weights, settings and commands of points."""

import shlex
from dataclasses import replace

import pytest

from harness import RunConfig, UserError, term
from harness.objective import beta, decoder_variance
from harness.tracking.record import description
from studies import elbo_vs_mse, kl_weight, latent_size
from studies.runner import cli
from studies.runner.options import SETTINGS, Options, arguments, text
from studies.runner.study import KNOWN, Axis, calibrated, make_plan

OPTIONS = ("model_options", "term_options")  # each is an axis under its own name
BINARY = ("likelihood", "binarization")  # a value of one needs another of the other


def settings(study, *words):
    """Return what a command must agree in with the study that it continues."""
    return make_plan(study, cli.parse(study, words)).proposer.settings


@pytest.mark.parametrize("mode", ["pixels", "batch", "sum"])
def test_a_calibrated_weight_is_calibrated_in_every_normalisation(mode):
    sizes = make_plan(latent_size.STUDY, Options(seeds=1, settings={"kl_normalization": mode}))
    named = {"blog's weight": 0.5, "calibrated weight": 0.01}
    for cell in sizes.proposer.cells:
        wanted = named[cell.identity["group"]]
        assert decoder_variance(cell.config, 64) == pytest.approx(wanted, rel=1e-15)
    named = {"ELBO, weight 1": 0.5, "ReLU head, weight 1": 0.5, "ELBO, calibrated": 0.01}
    for cell in make_plan(
        elbo_vs_mse.STUDY, Options(seeds=1, settings={"kl_normalization": mode})
    ).proposer.cells:
        wanted = named.get(cell.identity["value"], 0.0)
        assert decoder_variance(cell.config, 64) == pytest.approx(wanted, rel=1e-15)
    baseline = calibrated(RunConfig(kl_normalization=mode), KNOWN["digits"])
    assert decoder_variance(baseline, 64) == pytest.approx(0.01, rel=1e-15)


def test_no_weight_is_called_calibrated_where_weights_set_no_variance():
    with pytest.raises(UserError, match="the KL weight sets the decoder variance only"):
        make_plan(elbo_vs_mse.STUDY, Options(settings={"sigma": "optimal"}))
    settings = {"sigma": "optimal", "kl_normalization": "batch"}
    plan = make_plan(latent_size.STUDY, Options(settings=settings))
    assert {cell.identity["group"] for cell in plan.proposer.cells} == {"exact ELBO's weight"}
    assert {beta(config, 64) for config in plan.configs} == {1.0}
    with pytest.raises(UserError, match="divides by the number of latents"):
        make_plan(latent_size.STUDY, Options(settings={"kl_normalization": "latent"}))
    sigma_vae = calibrated(RunConfig(sigma="optimal"), KNOWN["mnist"])
    assert beta(sigma_vae, 784) == 1


def test_an_axis_has_values():
    with pytest.raises(UserError, match="axis 'hidden' has no values: give at least one"):
        Axis("hidden", ())


@pytest.mark.parametrize("name", ["width", "seed"])
def test_an_axis_that_is_no_setting_needs_a_function(name):
    with pytest.raises(UserError, match=f"axis '{name}' is no setting of RunConfig"):
        make_plan(replace(kl_weight.STUDY, axis=Axis(name, (1, 2))), Options())


OTHERS = {
    "latent": "deterministic", "sigma": "optimal", "model": "linear", "precision": "tf32",
    "head": "relu", "kl_normalization": "sum", "terms": {"squares": 0.5}, "hidden": (8, 4),
    "channels": (4,), "activation": "tanh", "dequantize": "uniform", "optimizer": "sgd",
    "adam_betas": (0.5, 0.9), "momentum": 0.5, "lr_schedule": "cosine", "lr_milestones": (2, 3),
    "lr_factor": 0.25, "keep": "best",
}  # fmt: skip
STEPS = {"lr_schedule": "steps", "lr_milestones": (1,), "lr_factor": 0.5}
BESIDE = {"channels": {"model": "conv"}, "momentum": {"optimizer": "sgd"}}
BESIDE |= {"lr_milestones": STEPS, "lr_factor": STEPS}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in (*BINARY, *OPTIONS)])
def test_every_setting_can_be_an_axis_and_an_option(name, registered):
    """A value of the axis, the option and the field of `RunConfig` are one setting."""
    term("squares")(lambda batch: batch.z.square().mean())
    base = RunConfig(kl_weight=0.0, kl_warmup_epochs=2, **BESIDE.get(name, {}))
    value = OTHERS[name] if name in OTHERS else getattr(base, name) + 1
    axis = Axis(name, [getattr(base, name), value])
    study = replace(kl_weight.STUDY, base=base, axis=axis, objective="val/mse")
    written = [text(value) for value in axis.values]
    plan = make_plan(study, cli.parse(study, ["--values", *written, "--seeds", "1"]))
    first = base.replace(epochs=50)
    assert plan.configs == [first.replace(**{name: v}) for v in axis.values]
    assert [cell.params for cell in plan.proposer.cells] == [{name: w} for w in written]
    words = shlex.split(plan.command.partition("studies.kl_weight ")[2])
    assert make_plan(study, cli.parse(study, words)).proposer == plan.proposer
    with pytest.raises(UserError, match=f"{name}=.*sweeps it; leave it out"):
        make_plan(study, Options(settings={name: value}))
    if name != "kl_weight":
        option = arguments(Options(settings={**BESIDE.get(name, {}), name: value}))
        other = replace(study, axis=Axis("kl_weight", (0.0,)))
        planned = make_plan(other, cli.parse(other, option))
        assert {text(getattr(config, name)) for config in planned.configs} == {text(value)}


@pytest.mark.parametrize("values", ["x", "8,,", "8,x", "8.5"])
def test_a_text_that_is_no_tuple_is_refused_in_one_line(values):
    study = replace(kl_weight.STUDY, axis=Axis("hidden", ((16,), (8, 4))))
    with pytest.raises(UserError, match="hidden=.*: give a whole number >= 1"):
        make_plan(study, cli.parse(study, ["--values", values]))
    (config,) = make_plan(study, cli.parse(study, ["--values", "none", "--seeds", "1"])).configs
    assert config.hidden == ()


def test_a_setting_that_a_study_sets_itself_is_refused():
    for study, name in ((latent_size.STUDY, "kl_weight"), (elbo_vs_mse.STUDY, "kl_weight")):
        with pytest.raises(UserError, match="kl_weight=0.5: .* sweeps it; leave it out"):
            make_plan(study, Options(settings={name: 0.5}))


@pytest.mark.parametrize(("name", "question"), [("mine", None), ("mine", " "), ("a/b", "Why?")])
def test_a_study_has_a_name_and_a_question(name, question):
    with pytest.raises(UserError, match="has no question|study_name="):
        replace(kl_weight.STUDY, name=name, question=question)


def test_every_configuration_has_what_the_study_compares():
    axis = Axis("latent", ("stochastic", "deterministic"))
    study = replace(kl_weight.STUDY, base=RunConfig(kl_weight=0.0), axis=axis)
    with pytest.raises(UserError, match="it has no neg_elbo, which kl_weight compares"):
        make_plan(study, Options())


def test_points_that_differ_have_different_names():
    plan = make_plan(kl_weight.STUDY, Options(values=(0.1001, 0.1002, 1 / 3), seeds=1))
    assert [f"{cell.label} seed={cell.config.seed}" for cell in plan.proposer.cells] == [
        *("kl_weight=0.1001 seed=0", "kl_weight=0.1002 seed=0", "kl_weight=0.3333 seed=0")
    ]


def test_the_command_of_a_report_is_one_that_the_study_takes():
    settings = {"kl_normalization": "sum", "hidden": (32,)}
    options = Options(values=(8,), seeds=1, settings=settings, study_name="mine")
    plan = make_plan(latent_size.STUDY, options)
    arguments = shlex.split(plan.command.partition("studies.latent_size ")[2])
    again = make_plan(latent_size.STUDY, cli.parse(latent_size.STUDY, arguments))
    assert again.proposer == plan.proposer
    assert (again.name, again.configs) == ("mine", plan.configs)


def test_what_may_grow_is_no_setting():
    small = settings(kl_weight.STUDY, "--values", "1", "--seeds", "1")
    assert settings(kl_weight.STUDY) == small
    assert settings(kl_weight.STUDY, "--epochs", "3") != small
    assert settings(kl_weight.STUDY, "--dataset", "mnist") != small


def test_addresses_in_commands_are_quoted():
    text = description("0", "sqlite:////my place/m.db", "digits")
    assert "--tracking-uri 'sqlite:////my place/m.db'" in text
