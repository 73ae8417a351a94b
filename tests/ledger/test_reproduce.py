"""The ledger from training to report, on cut digits: plan, verdicts, records and repetition."""

import base64
import json
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest

from harness import RunConfig, UserError, tracking
from harness.data.dataset import Dataset
from harness.tracking import page
from harness.tracking.store import Run
from studies import reproduce
from studies.ledger.references import Claim, Form, Ledger, Runs, claims, loss
from studies.reproduce import ReproduceOptions, make_plan
from studies.runner.run import run
from studies.runner.summary import Outcome
from studies.runner.terminal import Terminal

EXPERIMENT = "reproduce-digits"
TINY = Form(full=False, blog_epochs=1, blog_seeds=2, seeds=1)
RUNS = 3 + 2 + 1 + 6
"""Linear VAEs, blog's recipe, the same undivided, five weights and one with 20 latents."""


@dataclass(frozen=True)
class Checked:
    """A ledger that was checked in a folder."""

    folder: Path
    outcome: Outcome

    @property
    def rows(self) -> list:
        """The judged claims: claim, reference, obtained, tolerance and verdict as text."""
        return list(self.outcome.table.itertuples(index=False))

    def count(self, verdict: str) -> int:
        """Count the claims of a verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    def runs(self, role: str = "run") -> list[Run]:
        """Read the MLflow runs."""
        return tracking.connect(options(self.folder).tracking_uri).runs(EXPERIMENT, role=role)


def options(folder: Path, **given) -> ReproduceOptions:
    uris = {"tracking_uri": f"sqlite:///{folder}/mlflow.db"}
    return ReproduceOptions(storage=f"sqlite:///{folder}/optuna.db", **uris, **given)


def check(folder: Path, data: Dataset, ledger: Ledger | None = None, form: Form = TINY) -> Checked:
    given = options(folder)
    plan = make_plan(claims(form) if ledger is None else ledger, form, data, "cpu", given)
    return Checked(folder, run(plan, data, given, Terminal()))


@pytest.fixture(scope="module")
def checked(empty_database, tmp_path_factory, tiny) -> Checked:
    """Check the whole ledger once, on digits, where MNIST's numbers do not hold."""
    folder = tmp_path_factory.mktemp("ledger")
    shutil.copy(empty_database, folder / "mlflow.db")
    return check(folder, tiny)


@pytest.fixture
def copied(checked, tmp_path) -> Checked:
    """Return a copy of that ledger's databases, which a test may change."""
    shutil.copytree(checked.folder, tmp_path / "home")
    return replace(checked, folder=tmp_path / "home")


@pytest.fixture
def home(empty_database, tmp_path) -> Path:
    """Return a folder with an empty MLflow database."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


# --- the plan -------------------------------------------------------------------------------------

SMALL = Runs("small", RunConfig(hidden=(9,), epochs=1), 2)
LARGE = replace(SMALL, label="large", config=RunConfig(hidden=(8,), epochs=1), gpu=True)


def claim(name: str, *needs: Runs):
    return Claim(name, "nobody", "1", 1.0, "none", loss, needs)


def test_a_trial_is_a_configuration_and_a_seed(tiny, tmp_path):
    plan = make_plan({"x": [claim("a", SMALL)]}, TINY, tiny, "cpu", options(tmp_path))
    cells = plan.proposer.cells
    assert [cell.config for cell in cells] == list(plan.configs)
    assert plan.configs == [SMALL.config, SMALL.config.replace(seed=1)]
    assert [cell.identity["seed"] for cell in cells] == [0, 1]
    assert {cell.identity["label"] for cell in cells} == {"small"}
    assert plan.experiment == plan.name == EXPERIMENT


def test_only_the_full_form_on_a_gpu_trains_the_large_networks(tiny, tmp_path):
    ledger = {"x": [claim("near", SMALL), claim("far", LARGE)]}

    def labels(form: Form, device: str) -> set[str]:
        plan = make_plan(ledger, form, tiny, device, options(tmp_path))
        return {cell.identity["label"] for cell in plan.proposer.cells}

    full = replace(TINY, full=True)
    assert labels(TINY, "cuda") == labels(full, "cpu") == {"small"}
    assert labels(full, "cuda") == {"small", "large"}


def test_the_key_of_the_summary_changes_with_claims_and_form_alone(tiny, tmp_path):
    def key(ledger: Ledger, form: Form = TINY, **given) -> str:
        return make_plan(ledger, form, tiny, "cpu", options(tmp_path, **given)).summary_key

    ledger = {"x": [claim("a", SMALL)]}
    assert key(ledger) == key({"x": [claim("a", SMALL)]}, dry_run=True, study_name="other")
    wider = {"x": [replace(ledger["x"][0], within=2.0)]}
    assert len({key(ledger), key(wider), key({"y": ledger["x"]}), key({"x": []})}) == 4
    assert key(claims(TINY)) != key(claims(replace(TINY, seeds=2)))


def test_the_command_of_a_report_repeats_the_form(tiny, tmp_path):
    given = options(tmp_path, full=True, study_name="mine", device="cpu")
    plan = make_plan({"x": [claim("a", SMALL)]}, TINY, tiny, "cpu", given)
    assert plan.command == "python -m studies.reproduce --full --study-name mine"


# --- the records of a check -----------------------------------------------------------------------


def test_every_configuration_and_seed_is_one_finished_run(checked):
    runs = checked.runs()
    assert len(runs) == len({run.name for run in runs}) == RUNS
    assert {run.status for run in runs} == {"FINISHED"}
    assert sum(run.tags["configuration"] == TINY.blog.label for run in runs) == 2


def test_every_claim_has_a_verdict(checked):
    rows = {row.claim: row for row in checked.rows}
    assert len(rows) == 40 + 3 + 7 + 6 + 2
    assert {n for n, row in rows.items() if row.verdict.startswith("not run")} == {
        n for n in rows if n.startswith("-log p(x)")
    }
    assert rows["total variance"].verdict == "fail"  # of digits, where MNIST's is stated
    undivided = rows["KL undivided: active latents"]
    assert (undivided.obtained, undivided.verdict) in {("0", "pass"), ("10", "fail")}


def test_an_obtained_value_is_the_mean_over_the_runs_in_mlflow(checked):
    row = next(row for row in checked.rows if row.claim == "active latents of 10")
    runs = [run for run in checked.runs() if run.tags["configuration"] == TINY.blog.label]
    mean = sum(run.metrics["test/active_units"] for run in runs) / 2
    assert row.obtained == f"{mean:.1f}"


def test_the_report_holds_every_claim_with_its_source_and_verdict(checked):
    folder = checked.outcome.folder
    summary = json.loads((folder / "summary.json").read_text())
    tables = [pd.read_csv(folder / t["file"], dtype=str) for t in summary["tables"]]
    assert [len(table) for table in tables] == [40, 3, 7, 6, 2]
    for table in tables[:4]:
        assert table[["claim", "reference", "obtained", "verdict"]].notna().all(axis=None)
    assert "Source: brief 3" in summary["tables"][0]["caption"]
    page = (folder / "report.html").read_text()
    assert page.count("<td>fail</td>") == checked.count("fail")


def test_the_answer_names_failures_and_compares_the_blogs_recipe(checked):
    answer = checked.outcome.answer
    assert f"{checked.count('fail')} fail" in answer
    assert "total variance (" in answer
    assert "of its 10 latents active" in answer
    assert "% below the exact linear model's (2 seeds)" in answer


def test_the_summary_run_counts_verdicts(checked):
    (summary,) = checked.runs("summary")
    assert summary.status == "FINISHED"
    assert summary.metrics["claims/fail"] == checked.count("fail")
    assert "| claim | reference |" in summary.tags["mlflow.note.content"]
    assert summary.tags["mlflow.source.type"] == "LOCAL"
    assert summary.tags["versions"] == checked.runs()[0].tags["versions"]


def test_the_view_of_the_runs_shows_the_ledgers_settings_and_metrics(checked):
    store = tracking.connect(options(checked.folder).tracking_uri)
    experiment = store.client.get_experiment_by_name(EXPERIMENT)
    packed = json.loads(experiment.tags[page.TAG + EXPERIMENT])["state"].removeprefix("deflate;")
    shown = json.loads(zlib.decompress(base64.b64decode(packed)))["selectedColumns"]
    assert {"params.`latent_size`", "metrics.`val/neg_elbo`", "metrics.`test/mse`"} <= set(shown)


# --- repeating ------------------------------------------------------------------------------------


def test_other_images_are_refused_under_the_same_name(copied, tiny):
    with pytest.raises(UserError, match="dataset_digest"):
        check(copied.folder, replace(tiny, digest="other"))


@pytest.mark.slow
def test_a_check_again_trains_only_what_is_new(home, tiny):
    diverging = Runs("diverging", SMALL.config.replace(learning_rate=1e30), 1)
    # The network of the paper, on digits and without a GPU.
    likelihood = claims(TINY)["Published likelihoods"][0]
    config = likelihood.needs[0].config.replace(batch_size=32, epochs=1)
    binary = replace(likelihood.needs[0], gpu=False, config=config)
    published = Claim("published", "x", "44", 4.0, "z", likelihood.measure, (binary,))
    ledger = {"x": [claim("one", SMALL), claim("far", diverging), published]}
    first = check(home, tiny, ledger)
    before = first.runs()
    assert [run.status for run in before] == ["FINISHED"] * 2 + ["FAILED", "FINISHED"]
    _, lost, found = first.rows
    assert lost.verdict == "not run: 'diverging' diverged"
    assert found.verdict == "pass"  # untrained: 64 ln 2 = 44.4 nats
    wider = {"x": [*ledger["x"], claim("two", SMALL)]}
    for given, summaries in ((ledger, 1), (wider, 2)):
        again = check(home, tiny, given)
        assert again.runs() == before
        assert len(again.runs("summary")) == summaries
        assert [row.obtained for row in again.rows][:3] == [row.obtained for row in first.rows]
    larger = {"x": [claim("one", replace(SMALL, seeds=3)), *ledger["x"][1:]]}
    names = [run.name for run in check(home, tiny, larger).runs()]
    third = names.index("small seed=2")  # in the order of the plan
    assert names[:third] + names[third + 1 :] == [run.name for run in before]
    assert third == 2


# --- the command line -----------------------------------------------------------------------------


def test_help_lists_all_options_and_loads_neither_torch_nor_mlflow():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['reproduce', '--help']\n"
        "try:\n    runpy.run_module('studies.reproduce', None, '__main__', True)\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'mlflow', 'optuna.study', 'seaborn.utils', 'pandas.core', 'sklearn'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in ("--data-dir", "--full", "--device", "--storage", "--fresh", "--dry-run"):
        assert option in done.stdout


def test_a_dry_run_lists_what_is_trained_and_writes_nothing(mnist_folder, tmp_path, capsys):
    words = [f"--data-dir={mnist_folder}", f"--tracking-uri=sqlite:///{tmp_path}/m.db"]
    words.append(f"--storage=sqlite:///{tmp_path}/o.db")
    reproduce.main(["--dry-run", *words])
    assert "blog's recipe, 20 epochs: 3 x 20 epochs" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
