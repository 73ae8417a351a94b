"""A user's mistake is found on one step; what fails at the end loses nothing else."""

import json
import math
import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from torch import nn

import harness
from analysis import frames, plots
from harness import RunConfig, registry, tracking
from harness.errors import UserError
from harness.tracking.record import FAILED
from studies import Axis, Study, kl_weight, search
from studies.runner import cli, summary, tryout, workers
from studies.runner.options import Options
from studies.runner.study import make_plan

pytestmark = pytest.mark.usefixtures("registered")


def draw(frame, axis="learning_rate"):
    return plots.metrics_along_axis(frame, axis=axis)


def answer(frame):
    best = frames.best_value(frame, "learning_rate")
    return f"The best is {best}; {frame['frechet'].mean():.1f}, {frame['best/epoch'].max():.0f}."


STUDY = Study(
    name="own",
    question="Which rate?",
    base=RunConfig(hidden=(8,), latent_size=2, batch_size=16, kl_weight=0.02, epochs=1),
    axis=Axis("learning_rate", (1e-3, 1e30)),
    figures={"rates": (draw, "Rates.")},
    answer=answer,
    seeds=2,
)


def try_out(study, data, **settings):
    tryout.try_out(make_plan(study, Options(settings=settings)), data)


def at(comment: str) -> str:
    """Return how an error names the line of this file that ends with a comment."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"# {comment}"))
    return f"(test_tryout.py, line {found}: "


def test_a_study_without_mistakes_passes_whatever_it_sweeps(tiny):
    try_out(STUDY, tiny)
    for config in (
        {"sigma": "learned", "free_bits": 0.1},
        {"kl_weight": 0.0, "batch_size": 1},
        {"likelihood": "bernoulli", "binarization": "stochastic", "precision": "tf32"},
        {"kl_warmup_epochs": 2, "epochs": 6, "kl_cycles": 3, "model": "linear"},
    ):
        base = STUDY.base.replace(**config)
        try_out(replace(STUDY, base=base, figures={}), tiny, epochs=base.epochs)


def test_only_code_of_a_user_is_tried_and_by_one_process(monkeypatch):
    own, page = (make_plan(study, Options()) for study in (STUDY, kl_weight.STUDY))
    assert tryout.is_needed(own)
    assert not tryout.is_needed(page)
    assert not tryout.is_needed(search.make_plan(search.SearchOptions()))
    harness.metric("mine")(lambda model, split: 1.0)
    assert tryout.is_needed(page)
    monkeypatch.setenv(workers.NUMBER, "1/2")
    assert not tryout.is_needed(own)


class Half(nn.Module):
    """A layer that fails in training alone."""

    def forward(self, x):
        """Return x."""
        if self.training:
            raise ZeroDivisionError("no half")  # in training alone
        return x


def fails_in_training(data_shape, latent_size):
    encoder = nn.Sequential(nn.Flatten(), Half(), nn.Linear(64, 2 * latent_size))
    decoder = nn.Sequential(nn.Linear(latent_size, 64), nn.Unflatten(1, data_shape))
    return encoder, decoder


def no_number(data_shape, latent_size):
    encoder, decoder = fails_in_training(data_shape, latent_size)
    decoder[0].bias.data.fill_(math.nan)
    return nn.Sequential(encoder[0], encoder[2]), decoder


def broken(*_):
    return {}["nothing"]  # of a user


def misread(*_):
    return json.loads("{")  # by the standard library


MISTAKES = {
    "network": ({"model": "training"}, "network 'training'.*: no half .*# in training alone"),
    "nan": ({"model": "nan"}, "network 'nan': after one step its loss is no finite number"),
    "term": ({"terms": {"broken": 1.0}}, "term 'broken' fails on .*KeyError: 'nothing' .*# of"),
    "shape": ({"terms": {"vector": 1.0}}, r"term 'vector' returns shape \(16, 2\): return a"),
    "float": ({"terms": {"zero": 1.0}}, r"term 'zero' returns float: return a tensor of shape"),
}


@pytest.mark.parametrize(("config", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_networks_and_terms_that_fail_on_the_first_step(tiny, config, expected):
    harness.network("training")(fails_in_training)
    harness.network("nan")(no_number)
    harness.term("broken")(broken)
    harness.term("vector")(lambda batch: batch.z)
    harness.term("zero")(lambda batch: 0.0)
    base = RunConfig(latent_size=2, batch_size=16, **config)
    with pytest.raises(UserError, match=expected) as refused:
        try_out(replace(STUDY, base=base), tiny)
    assert "\n" not in str(refused.value)


def test_networks_with_every_option_that_is_swept_are_tried(tiny):
    @harness.network("wide")
    def wide(data_shape, latent_size, *, width=1):
        return no_number(data_shape, latent_size) if width > 2 else linear(data_shape, latent_size)

    def linear(data_shape, latent_size):
        return registry.NETWORKS["linear"].build(data_shape, latent_size)

    def width(config, value, source):
        return config.replace(model_options={"width": value})

    base = RunConfig(model="wide", latent_size=2, batch_size=16)
    study = replace(STUDY, base=base, figures={}, answer=lambda frame: "So.")
    try_out(replace(study, axis=Axis("width", (1, 2), width)), tiny)
    with pytest.raises(UserError, match="network 'wide': after one step"):
        try_out(replace(study, axis=Axis("width", (1, 3), width)), tiny)


def test_a_metric_that_fails_is_refused_and_one_without_a_value_yet_is_not(tiny):
    harness.metric("late")(lambda model, split: math.nan)
    try_out(STUDY, tiny)
    harness.metric("broken")(broken)
    expected = f"metric 'broken' .* {re.escape(at('of a user'))}return"
    with pytest.raises(UserError, match=expected):
        try_out(STUDY, tiny)
    with pytest.raises(UserError, match="metric 'broken' fails"):
        tryout.try_out(search.make_plan(search.SearchOptions()), tiny)


WRONG = {
    "the answer": {"answer": broken},
    "the answer ": {"answer": lambda frame: None},
    "the answer fails on a run of one step: JSONDecodeError": {"answer": misread},
    "figure 'x'": {"figures": {"x": (broken, "")}},
    "figure 'x' ": {"figures": {"x": (lambda frame: None, "")}},
    "figure 'y'": {"figures": {"x": (draw, ""), "y": (partial(draw, frame=1), "")}},
    "objective='val/nothing'": {"objective": "val/nothing"},
}


@pytest.mark.parametrize(("part", "change"), WRONG.items(), ids=WRONG.keys())
def test_figures_and_answers_that_fail_are_refused(tiny, part, change):
    with pytest.raises(UserError, match=f"^{part.strip()}") as refused:
        try_out(replace(STUDY, **change), tiny)
    expected = str(refused.value)
    assert "\n" not in expected
    if broken in (change.get("answer"), *change.get("figures", {}).get("x", ())):
        assert f"KeyError: 'nothing' {at('of a user')}" in expected
    if change.get("answer") is misread:
        assert at("by the standard library") in expected


def test_an_answer_that_loads_runs_is_not_refused(tiny):
    def loads(frame):
        raise UserError(f"no run {frame['run_id'][0]!r}")

    try_out(replace(STUDY, answer=loads, figures={"x": (loads, "")}), tiny)


def test_warnings_of_the_tried_code_are_not_shown(tiny):
    def warns(frame):
        warnings.warn("here", stacklevel=1)
        return "So."

    try_out(replace(STUDY, answer=warns, figures={}), tiny)


@pytest.fixture
def command(tracking_uri, tmp_path, tiny, monkeypatch):
    """Return a function that gives the command of a study and returns its exit code."""
    monkeypatch.setattr(harness, "load_dataset", lambda name, root: tiny)
    places = ["--tracking-uri", tracking_uri, "--storage", f"sqlite:///{tmp_path}/optuna.db"]

    def give(study, *more):
        try:
            cli.main(study, ["--epochs", "1", *places, *more])
        except SystemExit as end:
            return end.code
        return 0

    return give


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_after_a_mistake_nothing_is_recorded(command, tmp_path, capsys, more):
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert command(replace(STUDY, answer=broken), *more) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: the answer fails on a run of one step: KeyError: 'nothing' (")
    assert printed.count("\n") == 1
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_what_fails_at_the_end_loses_nothing_and_tried_frames_are_like_real_ones(
    command, tracking_uri, tmp_path, capsys
):
    shown = []

    @harness.metric("late")
    def late(model, split):
        return 1 / (not next(model.parameters()).requires_grad)  # as when it is tried

    def keeps(frame):
        shown.append(frame)
        return "So."

    def draw_once(frame):
        if len(shown) > 1:
            raise KeyError("gone")  # not when it is tried
        return draw(frame, "latent_size")

    study = replace(STUDY, axis=Axis("latent_size", (1, 3)), answer=keeps, seeds=1)
    figures = {"once": (draw_once, ""), "rates": (partial(draw, axis="latent_size"), "")}
    assert command(replace(study, figures=figures)) == 3
    of_metric = f"late: ZeroDivisionError: division by zero {at('as when it is tried')}"
    of_figure = f"figure 'once' failed: KeyError: 'gone' {at('not when it is tried')}"
    message = capsys.readouterr().err
    assert f"error: everything is trained and recorded, but {of_figure}" in message
    folder = tmp_path / "reports" / "own-digits"
    found = json.loads((folder / "summary.json").read_text())
    answer, _, acts, metrics, figure = found["answer"].split("\n\n")
    assert answer == "So."
    assert re.fullmatch(
        r"Best setting: kl_weight \S+ acts as a decoder standard dev.* of 255\)\.", acts
    )
    assert metrics.startswith(f"Metrics failed in 2 of 2 runs: {of_metric}")
    assert figure.startswith(f"Left out: {of_figure}")
    assert [figure["file"] for figure in found["figures"]] == [
        "figures/rates.png",
        "figures/learning_curves.png",
    ]
    assert "Left out: figure" in (folder / "report.html").read_text()

    # With the mistake mended the same command writes the rest; the metric stays away.
    assert command(replace(study, figures={})) == 3
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(f"error: {metrics}")
    assert "Report: " in printed.out
    assert "Left out" not in (folder / "report.html").read_text()
    assert "Metrics failed in 2 of 2 runs" in (folder / "report.html").read_text()
    runs = tracking.connect(tracking_uri).runs("own-digits")
    assert [(r.status, FAILED in r.tags) for r in runs if r.tags["role"] == "run"] == [
        ("FINISHED", True)
    ] * 2
    assert [r.status for r in runs if r.tags["role"] == "summary"] == ["FINISHED"]

    tried, real = shown[:2]
    assert not set(real.columns) - set(tried.columns)
    assert {"late", "val/late"} <= set(tried.columns) - set(real.columns)
    same = ["latent_size", "seed", "name", "beta", "decoder_variance", "dataset_digest"]
    assert tried[same].equals(real[same])
    assert tried["kl/2"].isna().equals(real["kl/2"].isna())
    assert tried.columns.is_unique
    assert tried["loss"].is_unique


def test_every_error_of_metrics_has_its_sentence(tracking_uri):
    from harness.tracking.runs import Run

    tags = [{FAILED: "a: X"}, {}, {FAILED: "b: Y"}, {FAILED: "a: X"}]
    runs = [Run("", "", "FINISHED", {}, {}, each) for each in tags]
    assert summary.failed_metrics(runs) == [
        "Metrics failed in 2 of 4 runs: a: X.",
        "Metrics failed in 1 of 4 runs: b: Y.",
    ]
