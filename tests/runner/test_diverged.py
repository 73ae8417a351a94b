"""A run that diverges fails alone; the table and the answer report it."""

import math
from dataclasses import replace

import pytest

from analysis import frames
from harness import RunConfig, UserError, train
from harness.tracking import connect
from harness.tracking.record import divergence
from studies import kl_normalization, kl_weight
from studies.runner.options import Options
from studies.runner.run import run
from studies.runner.study import Axis, make_plan
from studies.runner.terminal import Terminal

SMALL = RunConfig(hidden=(16,), latent_size=2, batch_size=16, epochs=1)


def verdicts(configs, data):
    record = next(iter(train(configs, data, device="cpu")))
    return record, [divergence(record, row) for row in range(len(configs))]


def test_a_loss_that_is_no_number_is_divergence(tiny):
    _, (tame, wild) = verdicts([SMALL, SMALL.replace(learning_rate=1e30)], tiny)
    assert tame is None
    assert wild in ("training mse is nan", "training loss is nan")


def test_a_finite_error_beyond_that_of_any_constant_image_is_divergence(tiny):
    linear = SMALL.replace(model="linear")
    record, (tame, wild) = verdicts([linear, linear.replace(learning_rate=3.0)], tiny)
    assert tame is None
    assert math.isfinite(record.train["loss"][1])
    assert wild == f"training mse is {record.train['mse'][1]:.3g}, above 1"


def test_posterior_means_far_from_the_prior_are_divergence_if_the_loss_counts_them(tiny):
    wild = SMALL.replace(kl_weight=1e-9, learning_rate=1.2)
    record, (counted,) = verdicts([wild], tiny)
    assert record.train["mse"][0] < 1
    assert counted == f"training rate is {record.train['rate'][0]:.3g}, above 20,000"
    free = replace(record, configs=(wild.replace(kl_weight=0.0),), still=frozenset())
    assert divergence(free, 0) is None


def test_a_run_of_extreme_settings_that_gets_on_has_not_diverged(tiny):
    extreme = [
        SMALL.replace(head="relu", latent_size=10, kl_weight=1e3, kl_normalization="sum"),
        SMALL.replace(kl_weight=1e3, kl_normalization="sum", latent_size=16),
        SMALL.replace(kl_weight=0.0, latent_size=16, learning_rate=1e-2),
        SMALL.replace(kl_weight=0.0, latent="deterministic"),
        SMALL.replace(sigma="optimal"),
        SMALL.replace(likelihood="bernoulli"),
    ]
    assert [v for config in extreme for v in verdicts([config], tiny)[1]] == [None] * len(extreme)


def diverging(plan, names):
    """Return a plan of which some cells have a learning rate with which they diverge."""
    cells = [
        cell._replace(
            config=cell.config.replace(
                learning_rate=1e30 if f"{cell.label} seed={cell.config.seed}" in names else 1e-3
            )
        )
        for cell in plan.proposer.cells
    ]
    return replace(plan, proposer=replace(plan.proposer, cells=cells))


@pytest.fixture(scope="module")
def outcome(empty_database, tmp_path_factory, tiny):
    """Run a study of which one value loses a seed of two, and one loses both."""
    import shutil

    folder = tmp_path_factory.mktemp("diverged")
    shutil.copy(empty_database, folder / "mlflow.db")
    options = Options(
        values=(0.02, 0.5, 1.0),
        seeds=2,
        settings={"epochs": 1},
        storage=f"sqlite:///{folder}/optuna.db",
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
    )
    plan = make_plan(replace(kl_weight.STUDY, base=SMALL, figures={}), options)
    plan = diverging(plan, DIVERGED)
    return plan, options, run(plan, tiny, options, Terminal())


DIVERGED = {"kl_weight=0.5 seed=1", "kl_weight=1 seed=0", "kl_weight=1 seed=1"}


def test_the_runs_fail_alone_with_epoch_and_reason(outcome):
    plan, options, _ = outcome
    runs = connect(options.tracking_uri).runs(plan.experiment, role="run")
    ends = {run.name: (run.status, run.tags.get("reason")) for run in runs}
    failed = {name: reason for name, (status, reason) in ends.items() if status == "FAILED"}
    assert failed.keys() == DIVERGED
    assert all(reason.startswith("diverged in epoch 1: ") for reason in failed.values())
    assert {status for status, _ in ends.values()} == {"FINISHED", "FAILED"}


def test_table_answer_and_report_say_so(outcome, capsys):
    plan, options, found = outcome
    assert list(found.table["kl_weight"]) == [0.02, 0.5]
    assert list(found.table["seeds"]) == [2, 1]
    printed = "Diverged and not ranked, 3 in number: kl_weight=0.5 seed=1 diverged in "
    assert printed in found.answer
    assert "kl_weight = 0.02. Its mean validation neg_elbo" in found.verdict[0]
    assert "there is one value" in found.verdict[1]
    assert printed in (found.folder / "report.html").read_text()
    Terminal().outcome(found, options.tracking_uri)
    assert printed in " ".join(capsys.readouterr().out.split())


def test_where_a_whole_group_diverged_another_is_pictured(tracking_uri, tmp_path, tiny):
    study = replace(
        kl_normalization.STUDY,
        base=SMALL,
        figures={},
        answer=lambda frame: "So.",
        groups=lambda base, data: {m: {"kl_normalization": m} for m in ("sum", "batch")},
    )
    places = {"tracking_uri": tracking_uri, "storage": f"sqlite:///{tmp_path}/optuna.db"}
    options = Options(values=(0.5,), seeds=1, settings={"epochs": 1}, **places)
    plan = make_plan(study, options)
    plan = diverging(plan, {"batch, decoder_variance=0.5 seed=0"})
    found = run(plan, tiny, options, Terminal())
    assert (found.folder / "pictures" / "latents.png").exists()
    assert "Diverged and not ranked, 1 in number: batch, " in found.answer


def test_a_point_beside_a_lost_one_keeps_its_text(tracking_uri, tmp_path, tiny):
    study = replace(
        kl_weight.STUDY,
        base=SMALL,
        axis=Axis("hidden", ((6, 4), (8,))),
        figures={},
        answer=lambda frame: f"The best is {frames.best_value(frame, 'hidden')}.",
    )
    places = {"tracking_uri": tracking_uri, "storage": f"sqlite:///{tmp_path}/optuna.db"}
    options = Options(seeds=1, settings={"epochs": 1}, **places)
    plan = diverging(make_plan(study, options), {"hidden=6,4 seed=0"})
    found = run(plan, tiny, options, Terminal())
    assert list(found.table["hidden"]) == ["8"]
    assert found.answer.startswith("The best is 8.")


def test_a_study_of_which_every_point_lost_a_seed_is_refused_in_one_line(
    tracking_uri, tmp_path, tiny
):
    study = replace(kl_weight.STUDY, base=SMALL, figures={})
    places = {"tracking_uri": tracking_uri, "storage": f"sqlite:///{tmp_path}/optuna.db"}
    options = Options(values=(0.5,), seeds=2, settings={"epochs": 1}, **places)
    plan = diverging(make_plan(study, options), {"kl_weight=0.5 seed=1"})
    with pytest.raises(UserError, match="has no point to rank: a seed of every one diverged"):
        run(plan, tiny, options, Terminal())
