"""Plans before anything is trained: what labels, weights and commands of points say is so."""

import shlex
from dataclasses import replace

import optuna
import pytest
from studies.grid import open_grid
from studies.origin import description
from studies.plan import Point, make_plan
from studies.sources import KNOWN
from studies.stack import forget_all
from studies.storage import open_storage
from studies.study import Axis
from studies.summary import command

from harness import RunConfig, UserError, tracking, train
from harness.objective import beta, decoder_variance
from studies import conditions, elbo_vs_mse, kl_weight, latent_size, search
from studies.runner import cli
from studies.runner.options import Options
from studies.runner.terminal import Steps, Terminal


@pytest.mark.parametrize("mode", ["pixels", "batch", "sum"])
def test_a_calibrated_weight_is_calibrated_in_every_normalisation(mode):
    for study in (latent_size.STUDY, elbo_vs_mse.STUDY):
        plan = make_plan(study, Options(kl_normalization=mode, seeds=1))
        variances = {p: decoder_variance(c[0], 64) for p, c in plan.configs.items()}
        wanted = dict.fromkeys(variances, 0.01) | {
            point: 0.5 for point in variances if point.group == "blog's weight"
        }
        if study is elbo_vs_mse.STUDY:
            wanted = dict.fromkeys(variances, 0.0)
            wanted |= {Point("", name): 0.5 for name in (conditions.BLOG_ELBO, conditions.BLOG)}
            wanted[Point("", conditions.CALIBRATED_ELBO)] = 0.01
        assert variances == pytest.approx(wanted, rel=1e-15)
    baseline = search.calibrated(RunConfig(kl_normalization=mode), KNOWN["digits"])
    assert decoder_variance(baseline, 64) == pytest.approx(0.01, rel=1e-15)


def test_no_weight_is_called_calibrated_where_weights_set_no_variance():
    with pytest.raises(UserError, match="the KL weight sets the decoder variance only"):
        make_plan(elbo_vs_mse.STUDY, Options(sigma="optimal"))
    plan = make_plan(latent_size.STUDY, Options(sigma="optimal", kl_normalization="batch"))
    assert {point.group for point in plan.configs} == {"exact ELBO's weight"}
    assert {beta(config, 64) for config in plan.runs} == {1.0}
    with pytest.raises(UserError, match="divides by the number of latents"):
        make_plan(latent_size.STUDY, Options(kl_normalization="latent"))
    sigma_vae = search.calibrated(RunConfig(sigma="optimal"), KNOWN["mnist"])
    assert beta(sigma_vae, 784) == 1


@pytest.mark.parametrize("values", [(), ((1, 2),), (None,)])
def test_an_axis_has_values_that_optuna_gives_back(values):
    with pytest.raises(UserError, match="give at least one, each a number or a word"):
        Axis("hidden", values)


@pytest.mark.parametrize(("name", "question"), [("mine", None), ("mine", " "), ("a/b", "Why?")])
def test_a_study_has_a_name_and_a_question(name, question):
    with pytest.raises(UserError, match="asks nothing|study_name="):
        replace(kl_weight.STUDY, name=name, question=question)


def test_brackets_in_a_question_are_shown(capsys):
    Terminal().question("Which [red]weight[/red] of [0, 1]?")
    assert capsys.readouterr().out == "Which [red]weight[/red] of [0, 1]?\n"


def test_every_configuration_has_what_the_study_compares():
    axis = Axis("latent", ("stochastic", "deterministic"))
    study = replace(kl_weight.STUDY, base=RunConfig(kl_weight=0.0), axis=axis)
    with pytest.raises(UserError, match="a plain autoencoder has no neg_elbo"):
        make_plan(study, Options())


def test_points_that_differ_have_different_names():
    plan = make_plan(kl_weight.STUDY, Options(values=(0.1001, 0.1002, 1 / 3)))
    assert [plan.label(point).split("=")[1] for point in plan.configs] == [
        *("0.1001", "0.1002", "0.3333")
    ]


def test_the_command_of_a_report_is_one_that_the_study_takes():
    plan = make_plan(latent_size.STUDY, Options(values=(8,), seeds=1, kl_normalization="sum"))
    arguments = shlex.split(command(plan).partition("studies.latent_size ")[2])
    options = cli.parse("latent_size", "Why?", int, arguments)
    assert make_plan(latent_size.STUDY, options).settings == plan.settings


def test_the_line_of_an_epoch_names_the_lowest_number_that_there_is(tiny):
    small = RunConfig(hidden=(16,), latent_size=2, batch_size=16, epochs=1, kl_weight=0.0)
    for latent, name in (("stochastic", "neg_elbo"), ("deterministic", "mse")):
        record = next(iter(train([small.replace(latent=latent)], tiny, "cpu")))
        said = []
        Steps(1, lambda steps, now, said=said: said.append(now))(record)
        assert said[0].startswith("epoch 1/1 of 1 run, ")
        assert f"best {name} {float(record.val[name][0]):.2f}" in said[0]


def test_a_study_that_somebody_else_made_is_refused(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    optuna.create_study(storage=storage, study_name="mine").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    with pytest.raises(UserError, match="'mine' in --storage was not made by this harness"):
        open_grid(make_plan(kl_weight.STUDY, Options(study_name="mine")), storage)


def test_a_finished_study_keeps_no_checkpoints_whoever_finishes_it(tracking_uri):
    store = tracking.connect(tracking_uri)
    file = store.home / "cache" / "checkpoints" / "mine" / "left"
    file.parent.mkdir(parents=True)
    file.touch()
    forget_all(store, "mine")
    forget_all(store, "mine")
    assert not file.parent.exists()


def test_addresses_in_commands_are_quoted():
    said = description("0", "sqlite:////my place/m.db")
    assert "--tracking-uri 'sqlite:////my place/m.db'" in said
