"""The worked example of `docs/own-study.md`: a study in a file of the user's own."""

import json
import re
import runpy
import sys
from pathlib import Path

import harness
from harness import tracking
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
    said = " ".join(capsys.readouterr().out.split())
    assert "2 values of learning_rate (0.001, 0.01) x 2 seeds = 4 runs of 1 epochs" in said
    assert "has the lowest validation neg_elbo of 2. " in said
    runs = tracking.connect(tracking_uri).runs("learning_rate-digits")
    rates = [run.params["learning_rate"] for run in runs if run.tags["role"] == "run"]
    assert sorted(rates) == ["0.001", "0.001", "0.01", "0.01"]
    folder = tmp_path / "reports" / "learning_rate-digits"
    assert (folder / "report.html").exists()
    assert (folder / "figures" / "metrics_along_axis.png").exists()
    command = json.loads((folder / "summary.json").read_text())["command"]
    assert command.startswith(f"python {EXAMPLE} --dataset digits")


def test_the_study_of_the_readme_can_be_planned():
    readme = (EXAMPLE.parents[1] / "README.md").read_text()
    (code,) = re.findall(r"## Your own study.*?```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    plan = make_plan(names["STUDY"], Options())
    assert [config.learning_rate for config in plan.configs[::3]] == [1e-4, 1e-3, 1e-2]
