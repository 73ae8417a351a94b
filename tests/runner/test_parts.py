"""A user's networks, terms and metrics on the command line and in studies."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from opened import queue_at

from analysis import frames
from harness import RunConfig, UserError, registry
from studies import kl_weight, run, search
from studies.runner import cli
from studies.runner.options import Options, arguments, option_text, option_value
from studies.runner.study import Axis, make_plan

FILE = """
import math

from torch import nn

from harness import likelihood, metric, network, term


@network("small", output="identity")
def small(data_shape, latent_size, *, width=8, act="relu", deep=False, sizes=(1,)):
    pixels = math.prod(data_shape)
    hidden = nn.Linear(pixels, width)
    encoder = nn.Sequential(nn.Flatten(), hidden, nn.Linear(width, 2 * latent_size))
    decoder = nn.Sequential(nn.Linear(latent_size, pixels), nn.Unflatten(1, tuple(data_shape)))
    return encoder, decoder


@term("squares")
def squares(batch, *, power=1.0):
    return batch.z.abs().pow(1 + power).mean()


@likelihood("absolute")
class Absolute:
    def error(x, output):
        return (x - output).abs().flatten(1).sum(-1)

    def neg_log_density(error, scale, D):
        return D * (2 * scale).log() + error / scale

    def mean(output):
        return output


@metric("brightness")
def brightness(model, split):
    return 0.25
"""


@pytest.fixture
def file(tmp_path, monkeypatch, registered):
    """Return the name of a file of parts in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts.py").write_text(FILE)
    return "parts.py"


def words(file):
    model = ["--likelihood", f"{file}:absolute", "--model", f"{file}:small"]
    model += ["--model-options", "width=4", "act=tanh", "deep=true"]
    terms = ["--term", f"{file}:squares=0.5", "--term-options", "squares.power=2"]
    return [*model, "sizes=64,32", *terms, "--metric", f"{file}:brightness", "--seeds", "1"]


def places(tmp_path):
    kept = {"storage": f"sqlite:///{tmp_path}/o.db", "tracking_uri": f"sqlite:///{tmp_path}/m.db"}
    return kept | {"device": "cpu"}


def test_parts_of_a_file_are_settings_and_the_printed_command_repeats_them(file):
    given = cli.parse(kl_weight.STUDY, [*words(file), "--values", "0.1"])
    plan = make_plan(kl_weight.STUDY, given)
    (config,) = plan.configs
    assert config == RunConfig(
        model="small", likelihood="absolute", kl_weight=0.1, epochs=50, terms={"squares": 0.5},
        model_options={"width": 4, "act": "tanh", "deep": True, "sizes": (64, 32)},
        term_options={"squares": {"power": 2}},
    )  # fmt: skip
    assert [*registry.METRICS] == ["brightness"]
    line = shlex.split(plan.command.partition("studies.kl_weight ")[2])
    again = make_plan(kl_weight.STUDY, cli.parse(kl_weight.STUDY, line))
    assert (again.proposer, again.command) == (plan.proposer, plan.command)
    assert cli.parse(kl_weight.STUDY, arguments(given)) == given  # as for --workers
    searched = search.make_plan(search.parse(words(file)))
    assert searched.configs[0].replace(kl_weight=0.1) == config
    assert searched.proposer.settings["parts"] == plan.proposer.settings["parts"]
    assert [*searched.proposer.settings["parts"]] == [
        *("network small", "likelihood absolute", "term squares", "metric brightness")
    ]


@pytest.mark.parametrize("value", [3, 0.1, 1e-7, True, False, "tanh", (64, 32), (8,), ()])
def test_an_option_is_read_as_it_was_written(value):
    read = option_value(option_text(value))
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "value"), [("width", "5"), ("squares", "0.5"), ("squares.power", "2.5")]
)
def test_every_option_and_weight_is_an_axis_under_its_name(file, name, value):
    axis = Axis(name, (2, 3))
    study = replace(kl_weight.STUDY, base=RunConfig(kl_weight=0.1), axis=axis)
    given = ["--model", f"{file}:small", "--term", f"{file}:squares=1", "--seeds", "1"]
    if name == "squares":
        with pytest.raises(UserError, match="kl_weight sweeps it; leave it out"):
            make_plan(study, cli.parse(study, given))
        given = given[:2] + given[-2:]
        registry.load(f"{file}:squares", "term")
    beside = ["--model-options", "act=tanh"]
    plan = make_plan(study, cli.parse(study, [*given, *beside, "--values", "2", value]))
    assert [config.named()[name] for config in plan.configs] == [2, float(value)]
    assert {config.model_options["act"] for config in plan.configs} == {"tanh"}
    assert [cell.params for cell in plan.proposer.cells] == [{name: "2"}, {name: value}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "missing.py:small"], "network missing.py:small: .*missing.py cannot be read"),
        (["--model", "parts.py:large"], "the file registers no network of that name"),
        (["--likelihood", "parts.py:cubic"], "the file registers no likelihood of that name"),
        (["--likelihood", "cubic"], "likelihood='cubic': choose one of gaussian, laplace"),
        (["--term", "parts.py:squares"], r"--term parts.py:squares: write \[FILE.py:\]NAME=WEIGHT"),
        (["--term", "cubes=1"], "term 'cubes': choose one of total_correlation, .*FILE.py:NAME"),
        (["--term", "cubes=x"], "--term cubes=x: write"),
        (["--model-options", "width"], "--model-options width: write NAME=VALUE"),
        (["--model-options", "width=4"], "'width' is no option of network 'mlp'"),
        (["--term-options", "power=2"], "--term-options power=2: write TERM.NAME=VALUE"),
        (["--metric", "brightness"], "--metric brightness: it is not registered; give FILE.py"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_before_anything_is_written(file, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        make_plan(kl_weight.STUDY, cli.parse(kl_weight.STUDY, given))
    assert [path.name for path in tmp_path.iterdir()] == ["parts.py"]


@pytest.mark.slow
def test_a_study_trains_reports_and_is_not_continued_with_a_changed_file(file, tmp_path):
    given = {
        "model": f"{file}:small", "model_options": {"width": 4}, "terms": {f"{file}:squares": 0.5},
        "metric": (f"{file}:brightness",), "epochs": 1, "seeds": 1, **places(tmp_path),
    }  # fmt: skip
    outcome = run(kl_weight.STUDY, values=(0.1,), **given)
    assert outcome.table["brightness"].tolist() == [0.25]
    assert "brightness" in (outcome.folder / "report.html").read_text()
    frame = frames.load_study("kl_weight", "digits", given["tracking_uri"])
    kept = frame[["width", "squares", "brightness", "val/brightness", "model"]]
    assert kept.values.tolist() == [[4, 0.5, 0.25, 0.25, "small"]]
    registry._files.clear()
    (tmp_path / file).write_text(FILE + "# changed\n")
    for dry_run in (True, False):
        with pytest.raises(UserError, match="the file of metric brightness has changed"):
            run(kl_weight.STUDY, values=(0.1, 0.2), dry_run=dry_run, **given)


def test_a_file_that_has_changed_is_refused_and_an_axis_may_add_one(file, tmp_path, sqlite_url):
    other = tmp_path / "other.py"
    network = FILE.partition("@term")[0]
    (tmp_path / file).write_text(network)
    other.write_text(network.replace('"small"', '"other"'))
    axis = Axis("model", (f"{file}:small", "other.py:other", "mlp"))
    study = replace(kl_weight.STUDY, base=RunConfig(kl_weight=0.1), axis=axis)

    def continued(*values):
        proposer = make_plan(study, cli.parse(study, ["--values", *values])).proposer
        return queue_at(sqlite_url, proposer).study.user_attrs["settings"]["parts"]

    assert [*continued("parts.py:small")] == ["network small"]
    assert [*continued("parts.py:small", "other.py:other")] == ["network small", "network other"]
    registry._files.clear()
    other.write_text(other.read_text() + "# changed")
    with pytest.raises(UserError, match="the file of network other has changed since its first"):
        continued("parts.py:small", "other.py:other")


@pytest.mark.slow
def test_a_command_trains_with_parts_of_a_file(file, tmp_path):
    kept = Options(**places(tmp_path), workers=2, settings={"epochs": 1})
    here = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = ["-m", "studies.kl_weight", *words(file), *arguments(kept), "--values", "0.1", "1"]
    done = subprocess.run(
        [sys.executable, *command], env=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "brightness" in done.stdout
