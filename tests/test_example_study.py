"""The worked example of `docs/own-study.md`: a study in a file of the user's own."""

import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest

import harness
from analysis import frames, plots
from harness import RunConfig, tracking
from studies import Axis, Study, run
from studies.runner.options import Options
from studies.runner.study import make_plan

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "learning_rate.py"


def test_a_file_outside_the_package_is_a_whole_study(
    tracking_uri, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(harness, "load_dataset", lambda name, root: tiny)
    options = ["--values", "0.001", "0.01", "--seeds", "2", "--epochs", "1"]
    places = ["--tracking-uri", tracking_uri, "--storage", f"sqlite:///{tmp_path}/optuna.db"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options, *places])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 values of learning_rate (0.001, 0.01) x 2 seeds = 4 runs of 1 epoch " in printed
    assert "has the lowest validation neg_elbo of 2. " in printed
    runs = tracking.connect(tracking_uri).runs("learning_rate-digits")
    rates = [run.params["learning_rate"] for run in runs if run.tags["role"] == "run"]
    assert sorted(rates) == ["0.001", "0.001", "0.01", "0.01"]
    folder = tmp_path / "reports" / "learning_rate-digits"
    assert (folder / "report.html").exists()
    assert (folder / "figures" / "metrics_along_axis.png").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["command"].startswith(f"python {EXAMPLE} --dataset digits")
    assert summary["next_command"].startswith(f"python {EXAMPLE} --dataset digits --epochs 50")
    assert len(summary["verdict"]) == 3


def test_the_study_of_the_readme_can_be_planned():
    readme = (EXAMPLE.parents[1] / "README.md").read_text()
    (code,) = re.findall(r"## Your own study.*?```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    plan = make_plan(names["STUDY"], Options())
    assert [config.learning_rate for config in plan.configs[::3]] == [1e-4, 1e-3, 1e-2]


@pytest.mark.slow
def test_widths_are_an_axis_from_the_plan_to_the_report_and_the_study_grows(
    tracking_uri, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(harness, "load_dataset", lambda name, root: tiny)
    study = Study(
        name="widths",
        question="Which widths train best?",
        base=RunConfig(kl_weight=0.02, latent_size=2),
        axis=Axis("hidden", [[8], (6, 4)]),
        figures={
            "metrics": (partial(plots.metrics_along_axis, axis="hidden"), "Along the widths."),
            "plane": (partial(plots.rate_distortion, axis="hidden"), "In the plane."),
        },
        answer=lambda runs: f"The best is {frames.best_value(runs, 'hidden')}.",
    )
    places = {"tracking_uri": tracking_uri, "storage": f"sqlite:///{tmp_path}/optuna.db"}
    first = run(study, epochs=1, seeds=1, **places)
    assert list(first.table["hidden"]) == ["8", "6,4"]
    before = {r.run_id for r in tracking.connect(tracking_uri).runs("widths-digits", role="run")}
    grown = run(study, epochs=1, seeds=2, values=((8,), (6, 4), ()), **places)
    assert list(grown.table["hidden"]) == ["8", "6,4", "none"]
    assert list(grown.table["seeds"]) == [2, 2, 2]
    answer = grown.answer.partition("\n\n")[0]
    assert answer.removeprefix("The best is ").strip(".") in ("8", "6,4", "none")
    runs = tracking.connect(tracking_uri).runs("widths-digits", role="run")
    assert before < {r.run_id for r in runs}
    assert [(r.name, r.params["hidden"]) for r in runs][::2] == [
        *(("hidden=8 seed=0", "8"), ("hidden=6,4 seed=0", "6,4")),
        ("hidden=none seed=0", "none"),
    ]
    loaded = harness.load_run(runs[2].run_id, tracking_uri)
    assert loaded.config.hidden == (6, 4)
    frame = frames.load_study("widths-digits", tracking_uri=tracking_uri)
    assert set(frame["hidden"]) == {"8", "6,4", "none"}
    names = {path.name for path in (grown.folder / "figures").iterdir()}
    assert names == {"metrics.png", "plane.png", "learning_curves.png"}
    values = [[8], [6, 4], []]
    assert grown.best == values[grown.best_row]
    assert [*grown.not_distinguishable, grown.best] == sorted(values, key=lambda v: v == grown.best)
    assert "6,4" in (grown.folder / "report.html").read_text()
