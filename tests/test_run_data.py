"""Studies of data that are given in Python: `run(STUDY, data=...)`, continued and replayed."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from analysis import frames
from harness import Dataset, RunConfig, UserError, tracking
from studies import Axis, Study, elbo_vs_mse, kl_weight, replay, run
from studies.runner.options import Options
from studies.runner.study import make_plan

IMAGES = torch.randint(0, 256, (60, 4, 5), dtype=torch.uint8)
DATA = Dataset.from_tensors("mine", IMAGES)
RATES = Study(
    name="rates",
    question="Which learning rate trains best?",
    base=RunConfig(kl_weight=0.02, latent_size=2, hidden=(8,)),
    axis=Axis("learning_rate", (1e-3, 1e-2)),
    figures={},
    answer=lambda runs: f"The best is {frames.best_value(runs, 'learning_rate'):g}.",
)
SMALL = {"seeds": 1, "epochs": 1, "batch_size": 16}


@pytest.mark.slow
def test_a_study_of_tensors_is_trained_continued_and_replayed(tracking_uri, tmp_path, capsys):
    places = {"tracking_uri": tracking_uri, "storage": f"sqlite:///{tmp_path}/optuna.db"}
    again = partial(run, RATES, data=DATA, **SMALL, **places)
    outcome = again()
    assert list(outcome.table["learning_rate"]) == [1e-3, 1e-2]

    # The recorded command is the call, which makes the same plan.
    command = json.loads((outcome.folder / "summary.json").read_text())["command"]
    call, _, about = command.partition("  # ")
    assert about == f"STUDY: 'rates', DATA: dataset 'mine', digest {DATA.digest[:12]}"
    assert call.startswith("run(STUDY, data=DATA, ")
    assert call.endswith(", study_name='rates-mine')")
    planned = eval(call, {"run": lambda study, data, **given: given, "STUDY": RATES, "DATA": DATA})
    assert planned == {**SMALL, "study_name": "rates-mine"}
    assert "--dataset" not in (outcome.folder / "report.html").read_text()

    # A second call continues the study: it trains what is missing.
    read = partial(tracking.connect(tracking_uri).runs, "rates-mine", role="run")
    before = [one.run_id for one in read()]
    assert len(before) == 2
    again(values=(1e-3, 1e-2, 1e-1))
    assert {*before} < {one.run_id for one in read()}
    assert len(read()) == 3
    assert read()[0].params["dataset_digest"] == DATA.digest

    # Other images, or another split, under the same name are another study.
    other = Dataset.from_tensors("mine", IMAGES, rows={"train": range(60)[::-1]})
    with pytest.raises(UserError, match="dataset_digest: ") as refused:
        again(data=other)
    assert "\n" not in str(refused.value)

    # A command line has no tensors: its line names the call, and so does the page of the run.
    first, _ = before[0], capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        replay.main([first, "--tracking-uri", tracking_uri])
    line = capsys.readouterr().err
    assert (ended.value.code, line.count("\n")) == (2, 1)
    assert f"dataset 'mine'; repeat it from Python: studies.replay.replay('{first}', DATA)" in line
    page = tracking.connect(tracking_uri).run(first).tags["mlflow.note.content"]
    assert "studies.replay.replay(" in page
    assert "python -m" not in page
    assert replay.replay(first, DATA, tracking_uri=tracking_uri)
    assert "Reproduced: all" in capsys.readouterr().out
    with pytest.raises(UserError, match="give the tensors and rows that it was trained on"):
        replay.replay(first, other, tracking_uri=tracking_uri)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dataset": "digits"}, "dataset='digits' beside data="),
        ({"image_size": (4, 4)}, r"image_size=\(4, 4\) beside data="),
        ({"label": "kind"}, "label='kind' beside data="),
        ({"workers": 2}, "workers=2: workers start a command line"),
    ],
)
def test_options_that_data_replace_are_refused(given, expected):
    with pytest.raises(UserError, match=expected):
        run(kl_weight.STUDY, data=DATA, **given)


def test_a_dataset_with_a_name_is_given_by_its_name(tiny):
    with pytest.raises(UserError, match="give dataset='digits' in its place"):
        run(kl_weight.STUDY, data=tiny)


def test_workers_cannot_start_the_study_of_a_script():
    with pytest.raises(UserError, match="workers=2: .*nor your study"):
        run(RATES, workers=2)


def test_values_may_be_an_array():
    plan = make_plan(kl_weight.STUDY, Options(values=np.logspace(-2, 0, 3), seeds=1), DATA)
    assert [config.kl_weight for config in plan.configs] == [0.01, 0.1, 1.0]
    assert "values=(0.01, 0.1, 1.0)" in plan.command


@pytest.mark.parametrize("study", [kl_weight.STUDY, elbo_vs_mse.STUDY])
def test_every_study_plans_on_tensors(study):
    plan = make_plan(study, Options(seeds=1), DATA)
    assert plan.name == f"{study.name}-mine"
    assert plan.command.startswith("run(STUDY, data=DATA, epochs=50, seeds=1, study_name=")
    assert {config.epochs for config in plan.configs} == {50}
