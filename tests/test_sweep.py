"""A sweep of one or two settings, from its command line or from Python to its answer."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import frames, plots
from harness import UserError, load_run
from harness.tracking import connect
from studies import sweep
from studies.runner.options import Options
from studies.runner.run import run
from studies.runner.study import make_plan
from studies.runner.terminal import Terminal

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--hidden", "16", "--latent-size", "2", "--epochs", "1", "--batch-size", "32"]

FILE = """
import math

from torch import nn

from harness import network, term


def small(data_shape, latent_size, *, width=8, sizes=(1,)):
    pixels = math.prod(data_shape)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 2 * latent_size))
    decoder = nn.Sequential(nn.Linear(latent_size, pixels), nn.Unflatten(1, tuple(data_shape)))
    return encoder, decoder


network("small")(small)
network("other")(small)


@term("pull")
def pull(batch, *, towards=0.0, grid=(2, 2)):
    return (batch.posterior.mean - towards).square().mean()
"""


@pytest.fixture
def file(tmp_path, monkeypatch, registered):
    """Return the name of a file of parts in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts.py").write_text(FILE)
    return "parts.py"


def plan_of(line):
    return make_plan(*sweep.parse(shlex.split(line)))


def trained(line, folder, tiny, **changes):
    """Run a command line on a few digits, in databases of a folder."""
    study, options = sweep.parse([*shlex.split(line), *SMALL])
    places = {"tracking_uri": f"sqlite:///{folder}/mlflow.db"}
    options = replace(options, **places, storage=f"sqlite:///{folder}/optuna.db")
    plan = make_plan(replace(study, **changes), options)
    return run(plan, tiny, options, Terminal())


# --- plans --------------------------------------------------------------------------------------

AXES = [
    # command line, what the runs have under the names of `RunConfig.named`
    ("learning_rate=1e-4,1e-2", {"learning_rate": [1e-4, 1e-2]}),
    ("batch_size=64,32", {"batch_size": [64, 32]}),
    ("epochs=1,2", {"epochs": [1, 2]}),
    ("hidden=256x64,128,none", {"hidden": [(256, 64), (128,), ()]}),
    ("channels=4x8 --model conv", {"channels": [(4, 8)]}),
    ("sigma=fixed,optimal,learned", {"sigma": ["fixed", "optimal", "learned"]}),
    ("model=mlp,parts.py:small", {"model": ["mlp", "small"]}),
    ("latent=stochastic,deterministic", {"kl_weight": [1.0, 0.0]}),
    ("lr_factor=0.1,0.5 --lr-schedule exponential", {"lr_factor": [0.1, 0.5]}),
    (
        "lr_milestones=1,1x2 --axis lr_factor=0.5 --lr-schedule steps",
        {"lr_milestones": [(1,), (1, 2)], "lr_factor": [0.5, 0.5]},
    ),
    ("latent=deterministic --kl-weight 0", {"latent": ["deterministic"]}),
    ("width=16,32 --model parts.py:small", {"width": [16, 32]}),
    ("sizes=4,8x2 --model parts.py:small", {"sizes": [(4,), (8, 2)]}),
    ("pull=0,0.2,100 --term parts.py:pull=1", {"pull": [0.0, 0.2, 100.0]}),
    ("pull=0,1 --term mmd=2 --term parts.py:pull=1", {"pull": [0, 1], "mmd": [2, 2]}),
    ("parts.py:pull=0,1", {"pull": [0.0, 1.0]}),
    ("pull.towards=1,2.5 --term parts.py:pull=1", {"pull.towards": [1, 2.5]}),
    ("pull.grid=3,3x4 --term parts.py:pull=1", {"pull.grid": [(3,), (3, 4)]}),
    ("total_correlation=0,5", {"total_correlation": [0, 5]}),
    (
        "mmd=1,2 --axis mmd.bandwidth=0.5,1",
        {"mmd": [1, 1, 2, 2], "mmd.bandwidth": [0.5, 1, 0.5, 1]},
    ),
    (
        "model=parts.py:small,parts.py:other --axis width=1,2",
        {"model": ["small", "small", "other", "other"], "width": [1, 2, 1, 2]},
    ),
]


@pytest.mark.parametrize(("line", "expected"), AXES)
def test_every_setting_is_an_axis_and_the_printed_command_repeats_it(line, expected, file):
    plan = plan_of(f"--axis {line} --seeds 1")
    found = [config.named() for config in plan.configs]
    assert {name: [values[name] for values in found] for name in expected} == expected
    start = "python -m studies.sweep --axis "
    assert plan.command.startswith(start)
    again = plan_of(plan.command.removeprefix("python -m studies.sweep"))
    assert (again.proposer, again.command, again.name) == (plan.proposer, plan.command, plan.name)
    assert [*plan.start] == shlex.split(plan.command)[1 : 1 + len(plan.start)]  # of --workers


def test_a_name_has_the_axes_and_the_dataset_and_labels_have_both_values():
    plan = plan_of("--axis learning_rate=1e-4,0.001 --axis hidden=8x4,16 --seeds 1")
    assert plan.name == plan.experiment == "sweep-learning_rate-hidden-digits"
    assert [cell.label for cell in plan.proposer.cells] == [
        *("learning_rate=0.0001, hidden=8,4", "learning_rate=0.0001, hidden=16"),
        *("learning_rate=0.001, hidden=8,4", "learning_rate=0.001, hidden=16"),
    ]
    given = ["--axis", "mmd.bandwidth=1,2", "--term", "mmd=1", "--study-name", "mine"]
    study, options = sweep.parse(given)
    assert study.name == "sweep-mmd.bandwidth"
    assert make_plan(study, options).name == "mine"
    assert sweep.sweep({"größe": (1, 2)}).name == "sweep-gr__e"


def test_a_sweep_is_a_study_that_python_makes_too():
    study = sweep.sweep({"learning_rate": (1e-4, 1e-3), "hidden": [(8, 4), [16]]})
    plan = make_plan(study, Options(seeds=2, settings={"epochs": 3}))
    line = "--axis learning_rate=0.0001,0.001 --axis hidden=8x4,16 --seeds 2 --epochs 3"
    assert plan.proposer == plan_of(line).proposer
    assert plan.command == plan_of(line).command
    with pytest.raises(UserError, match="give those of a sweep with its axes"):
        make_plan(study, Options(values=(1,)))


@pytest.mark.parametrize(
    ("line", "objective"),
    [
        ("--axis learning_rate=1e-4,1e-3", "val/neg_elbo"),
        ("--axis binarization=threshold,stochastic --likelihood bernoulli", "val/neg_elbo"),
        ("--axis binarization=none,stochastic --likelihood bernoulli", "val/loss"),
        ("--axis likelihood=gaussian,bernoulli", "val/loss"),
        ("--axis latent=stochastic,deterministic", "val/loss"),
        ("--axis learning_rate=1e-4,1e-3 --axis latent=deterministic", "val/loss"),
    ],
)
def test_runs_are_compared_by_neg_elbo_where_all_have_it(line, objective):
    plan = plan_of(line)
    assert plan.objective == objective
    assert plan.proposer.objectives == (objective,)


def test_what_may_grow_is_no_setting(file):
    for small, large in (
        ("--axis learning_rate=1e-4", "--axis learning_rate=1e-4,1e-3 --seeds 1"),
        ("--axis sigma=fixed --axis epochs=1", "--axis sigma=fixed,optimal --axis epochs=1,2"),
        ("--axis parts.py:pull=0", "--axis pull=0,1 --term parts.py:pull=3"),
        ("--axis width=1 --model parts.py:small", "--axis width=1,2 --model parts.py:small"),
    ):
        first, second = plan_of(small), plan_of(large)
        assert first.proposer.settings == second.proposer.settings
        assert first.name == second.name


# --- refusals -----------------------------------------------------------------------------------

REFUSED = [
    ("", "give --axis NAME=VALUE,VALUE: one, or two of different names"),
    ("--axis", "--axis"),
    ("--axis learning_rate", "--axis learning_rate: write NAME=VALUE,VALUE"),
    ("--axis learning_rate=", "--axis learning_rate=: write NAME=VALUE,VALUE"),
    ("--axis epochs=1 --axis epochs=2", "--axis epochs is given twice"),
    ("--axis epochs=1 --axis sigma=fixed --axis head=relu", "axes epochs, sigma, head: give one"),
    ("--axis learning_rate=1e-3,0.001", "learning_rate=0.001,0.001: give every value once"),
    ("--axis learning_rate=1e-3,x", "learning_rate=x: give a number"),
    ("--axis batch_size=8,8.5", "batch_size=8.5: give a whole number >= 1"),
    ("--axis batch_size=8,5000", "digits has 1280 training images; give at most 1280"),
    ("--axis learning_rate=0.1,-1", "learning_rate=-1.0: give a finite number > 0"),
    ("--axis lr_factor=0.1,2 --lr-schedule exponential", "lr_factor=2.0: give a number <= 1"),
    ("--axis lr_factor=0.1,0.5", "lr_factor=0.1 with lr_schedule='constant' has no effect"),
    ("--axis learning_rate=nan", "learning_rate=nan: give a finite number > 0"),
    ("--axis hidden=8x4,8xx", "hidden=''"),
    ("--axis sigma=fixed,free", "sigma='free': choose one of fixed, optimal, learned"),
    ("--axis seed=0,1", "axis 'seed': give --seeds N instead"),
    ("--axis learning_rat=1e-3", "did you mean 'learning_rate'?"),
    ("--axis widht=1 --model parts.py:small", "did you mean 'width'?"),
    ("--axis terms=1", "axis 'terms': give the name of one term or option instead"),
    ("--axis channels=4,8", "axis 'channels' with model='mlp': only conv has it"),
    ("--axis learning_rate=1e-3,1 --learning-rate 1", "learning_rate sweeps it; leave it out"),
    ("--axis epochs=1,2 --axis head=relu --epochs 1", "sweep-epochs-head sweeps it"),
    (
        "--axis kl_cycles=1,4 --axis kl_warmup_epochs=1,20",
        "kl_cycles=4, kl_warmup_epochs=20: kl_warmup_epochs=20 with kl_cycles=4",
    ),
    (
        "--axis latent=stochastic,deterministic --axis kl_weight=0,1",
        "latent=deterministic, kl_weight=1.0: kl_weight=1.0 with latent='deterministic'",
    ),
    (
        "--axis kl_weight=0,1 --axis latent=stochastic,deterministic",
        "kl_weight=1.0, latent=deterministic: kl_weight=1.0 with latent='deterministic'",
    ),
    ("--axis model=parts.py:none", "the file registers no network of that name"),
    ("--axis epochs=1,2 --seeds 0", "seeds=0: give a whole number >= 1"),
]


@pytest.mark.parametrize(("line", "expected"), REFUSED)
def test_what_cannot_be_swept_is_one_line_and_nothing_is_written(line, expected, file, capsys):
    before = sorted(path.name for path in Path().iterdir())
    with pytest.raises(SystemExit) as stop:
        sweep.main(shlex.split(line))
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert expected in printed
    assert printed.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == before


def test_one_seed_and_one_value_are_noted_before_anything_trains(capsys, tmp_path):
    places = ["--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    places += ["--storage", f"sqlite:///{tmp_path}/o.db"]
    sweep.main(["--axis", "sigma=fixed", "--seeds", "1", "--dry-run", *places])
    printed = capsys.readouterr().out
    assert "One value of sigma: nothing to compare.\n" in printed
    assert "One seed: no spread is known, and no value is called better; give --seeds 3." in printed
    sweep.main(["--axis", "sigma=fixed,optimal", "--dry-run", *places])
    assert "One " not in capsys.readouterr().out


# --- answers and figures ------------------------------------------------------------------------

KEYS = ["learning_rate", "kl_weight"]


@pytest.fixture(scope="module")
def grid(finished):
    """Return a frame of three learning rates and three weights, two seeds each, best in between."""
    frame = frames.load_study("kl_weight", "digits", finished.tracking_uri)
    draw, parts = np.random.default_rng(0), []
    for rate, more in ((1e-4, 5.0), (1e-3, -2.0), (1e-2, 1.0)):
        noise = draw.normal(0, 1, len(frame)) + more
        changed = {name: frame[name] + noise for name in ("neg_elbo", "val/neg_elbo")}
        parts.append(frame.assign(learning_rate=rate, **changed))
    return pd.concat(parts, ignore_index=True)


def cell_texts(figure):
    """Return the texts of a heat map's cells, row by row."""
    return [text.get_text().replace("\n", " ") for text in figure.axes[0].texts]


def test_the_heat_map_has_the_means_of_the_frame_and_frames_the_best(grid):
    figure = plots.heat_map(grid, *KEYS)
    cells = grid.groupby(KEYS)["neg_elbo"]
    expected = [f"{cell.mean():.2f} ± {frames.half_width(cell):.2f}" for _, cell in cells]
    assert cell_texts(figure) == expected
    panel, bar = figure.axes
    np.testing.assert_allclose(np.ravel(panel.collections[0].get_array()), cells.mean())
    assert [text.get_text() for text in panel.get_xticklabels()] == ["0", "0.02", "1"]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["0.0001", "0.001", "0.01"]
    best = grid.groupby(KEYS)["val/neg_elbo"].mean().idxmin()
    place = [(0, 0.02, 1).index(best[1]), (1e-4, 1e-3, 1e-2).index(best[0])]
    assert panel.get_lines()[0].get_xydata().min(0).tolist() == place
    assert bar.get_ylabel() == "neg_elbo (nats / image)"


def test_a_cell_without_a_run_is_empty_and_one_that_lost_a_seed_is_not_the_best(grid):
    best = grid["val/neg_elbo"].groupby([grid[key] for key in KEYS]).mean().idxmin()
    of_best = (grid[KEYS] == list(best)).all(axis=1)
    figure = plots.heat_map(grid[~of_best], *KEYS)
    assert cell_texts(figure).count("–") == 1
    first, second = (
        plots.heat_map(frame, *KEYS).axes[0].get_lines()[0].get_xydata()
        for frame in (grid, grid.drop(grid[of_best].index[0]))
    )
    assert first.tolist() != second.tolist()


def test_names_keep_their_order_in_the_heat_map_and_one_cell_is_drawn(grid):
    made = grid.assign(sigma=np.where(grid["kl_weight"] == 1, "optimal", "fixed"))
    panel = plots.heat_map(made[::-1], "learning_rate", "sigma").axes[0]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["optimal", "fixed"]
    assert len(cell_texts(plots.heat_map(grid[:1], *KEYS))) == 1


def test_a_cell_far_off_does_not_flatten_the_colours(grid):
    made = grid.copy()
    made.loc[made["kl_weight"] == 0, "neg_elbo"] += 1e6
    mesh = plots.heat_map(made, *KEYS).axes[0].collections[0]
    assert mesh.get_clim()[1] < 1e5


def test_the_answer_has_the_best_of_the_second_axis_for_each_value_of_the_first(grid):
    answer = sweep.best_point(grid, KEYS)
    table = grid.groupby(KEYS)["val/neg_elbo"].agg(["mean", frames.half_width]).reset_index()
    each = table.loc[table.groupby("learning_rate")["mean"].idxmin()]
    written = "; ".join(
        f"learning_rate = {row.learning_rate:g}: {row.kl_weight:g} "
        f"({row['mean']:.2f} ± {row.half_width:.2f})"
        for _, row in each.iterrows()
    )
    assert f"The best kl_weight for each learning_rate: {written}." in answer
    assert sweep.best_point(grid[grid["kl_weight"] == 0.02], KEYS[:1]) == ""


def test_figures_of_runs_without_rate_or_neg_elbo_show_what_there_is(grid):
    lacking = [name for name in grid if re.search("rate$|neg_elbo|distortion|^kl/", name)]
    frame = grid.drop(columns=set(lacking) - {"learning_rate"})
    for study in (sweep.sweep({"kl_weight": (0, 1)}), sweep.sweep(dict.fromkeys(KEYS, (0, 1)))):
        for draw, _ in study.figures.values():
            assert draw(frame).axes
    figure = plots.metrics_along_axis(frame, "kl_weight")
    assert figure.axes[0].get_ylabel() == "loss"
    assert "no run has a rate" in figure.axes[2].texts[0].get_text()
    bar = plots.heat_map(frame, *KEYS).axes[1]
    assert bar.get_ylabel() == "loss"
    answer = sweep.best_point(frame, KEYS)
    assert answer.endswith("Where an axis changes objective or data, loss does not rank runs.")


# --- trained ------------------------------------------------------------------------------------


def test_a_grid_with_a_term_of_a_file_grows_and_is_reported(file, tracking_uri, tmp_path, tiny):
    line = f"--term {file}:pull=1 --seeds 1 --axis pull=%s --axis learning_rate=%s"
    first = trained(line % ("0", "1e-2"), tmp_path, tiny, figures={})
    assert "there is one value" in first.verdict[1]
    before = {run.run_id for run in connect(tracking_uri).runs(first.plan.experiment, role="run")}
    second = trained(line % ("0,100", "1e-3,1e-2"), tmp_path, tiny)
    assert second.table[["pull", "learning_rate"]].to_numpy().tolist() == [
        *([0, 1e-3], [0, 1e-2], [100, 1e-3], [100, 1e-2]),
    ]
    assert second.table["term/pull"].notna().all()
    runs = connect(tracking_uri).runs(first.plan.experiment, role="run")
    assert before < {run.run_id for run in runs}
    assert len(runs) == 4
    assert runs[3].name == "pull=100.0, learning_rate=0.01 seed=0"
    assert load_run(runs[3].run_id, tracking_uri).config.terms == {"pull": 100.0}
    figures = sorted(path.stem for path in (second.folder / "figures").iterdir())
    assert {"heat_map", "metrics_along_axis", "rate_distortion"} <= {*figures}
    page = (second.folder / "report.html").read_text()
    assert "Framed: lowest mean on validation data" in page
    points = [{"pull": pull, "learning_rate": rate} for pull in (0, 100) for rate in (1e-3, 1e-2)]
    best = points.pop(second.table["val/neg_elbo"].argmin())
    assert (second.best, second.not_distinguishable) == (best, points)
    assert second.best_row == second.table["val/neg_elbo"].argmin()
    assert second.groups.keys() == {"0.0", "100.0"}
    assert "--axis learning_rate=" in second.next_command
    assert f"python -m studies.sweep --axis {file}:pull=0.0,100.0 --axis" in page


@pytest.mark.slow
def test_runs_without_neg_elbo_are_compared_by_loss(tracking_uri, tmp_path, tiny):
    both = trained("--axis latent=stochastic,deterministic --seeds 1", tmp_path, tiny)
    assert {"val/loss", "best/val/loss", "loss"} <= {*both.table.columns}
    assert "Its mean validation loss is the lowest of 2 values: 0." in both.verdict[0]
    assert len(list((both.folder / "figures").iterdir())) == 5


@pytest.mark.slow
def test_a_command_with_a_file_trains_by_workers_and_its_printed_command_repeats_it(file, tmp_path):
    places = ["--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    places += ["--storage", f"sqlite:///{tmp_path}/o.db"]
    line = f"--axis model=mlp,{file}:small --axis {file}:pull=0,1 --seeds 1 --epochs 1 --workers 2"

    def printed(words):
        command = [sys.executable, "-m", *words, *places]
        here = {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **here}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = printed(["studies.sweep", *shlex.split(line)])
    assert "is the lowest of 4 combinations" in " ".join(first.split())
    name = "sweep-model-pull-digits"
    summary = json.loads((tmp_path / "reports" / name / "summary.json").read_text())
    again = printed(shlex.split(summary["command"].removeprefix("python -m ")))
    assert "4 runs are finished; 0 are left." in again
