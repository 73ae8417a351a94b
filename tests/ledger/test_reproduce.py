"""The ledger from training to report, on cut digits: what is trained, judged, kept and repeated."""

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

from harness import RunConfig, UserError, tracking, view
from harness.data.dataset import Dataset
from studies import reproduce
from studies.claims import Row, about, count, judge
from studies.forms import Form
from studies.reproduce import reproduction
from studies.reproducing import Check, open_check, run, summarize, train_missing
from studies.runner.options import ReproduceOptions
from studies.runner.terminal import Terminal
from studies.runs import Runs
from studies.stack import train_stack
from studies.summary import Outcome
from studies.trained_claims import mean

# MLflow's own type hints, when the best model is logged
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")

EXPERIMENT = "reproduce-digits"
TINY = Form("short", blog_epochs=1, blog_seeds=2, seeds=1)
RUNS = 3 + 2 + 1 + 6
"""Linear VAEs, blog's recipe, the same undivided, five weights and one with 20 latents."""


@dataclass(frozen=True)
class Checked:
    """A ledger that was checked in a folder."""

    folder: Path
    rows: list[Row]
    outcome: Outcome

    @property
    def uri(self) -> str:
        """Address of the MLflow database."""
        return f"sqlite:///{self.folder}/mlflow.db"

    def runs(self, role: str = "run") -> list[dict]:
        """Read the MLflow runs."""
        return tracking.read_runs(tracking.connect(self.uri), EXPERIMENT, f"tags.role = '{role}'")


def check(folder: Path, data: Dataset, form: Form = TINY, **options) -> Checked:
    given = ReproduceOptions(tracking_uri=f"sqlite:///{folder}/mlflow.db", **options)
    rows, outcome = run(reproduction(form), data, given, Terminal())
    Terminal().ledger(rows, outcome, given.tracking_uri)
    return Checked(folder, rows, outcome)


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


# --- what a check leaves behind -------------------------------------------------------------------


def test_every_configuration_and_seed_is_one_finished_run(checked):
    runs = checked.runs()
    assert len(runs) == len({r["name"] for r in runs}) == RUNS
    assert {r["status"] for r in runs} == {"FINISHED"}
    assert sum(r["tags"]["configuration"] == TINY.blog.label for r in runs) == 2


def test_every_claim_has_a_verdict(checked):
    rows = {row.claim.name: row for row in checked.rows}
    assert len(rows) == 40 + 3 + 7 + 6 + 2
    assert {n for n, row in rows.items() if row.verdict == "not run"} == {
        n for n in rows if n.startswith("-log p(x)")
    }
    assert rows["total variance"].verdict == "fail"  # of digits, where MNIST's is stated
    undivided = rows["KL undivided: active latents"]
    assert (undivided.obtained, undivided.verdict) in {("0", "pass"), ("10", "fail")}


def test_what_is_obtained_is_the_mean_over_the_runs_in_mlflow(checked):
    row = next(row for row in checked.rows if row.claim.name == "active latents of 10")
    mine = [r for r in checked.runs() if r["tags"]["configuration"] == TINY.blog.label]
    mean = sum(r["metrics"]["test/active_units"] for r in mine) / 2
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
    assert page.count("<td>fail</td>") == count(checked.rows, "fail")
    assert "figures/batches.png" in [figure["file"] for figure in summary["figures"]]


def test_the_answer_says_what_fails_and_what_the_blogs_recipe_is_worth(checked):
    said = checked.outcome.answer
    assert f"{count(checked.rows, 'fail')} fail" in said
    assert "total variance (" in said
    assert "of its 10 latents active" in said
    assert "than a linear model" in said
    assert "loss 0.047659844 is " in said


def test_the_summary_run_counts_verdicts(checked):
    (summary,) = checked.runs("summary")
    assert summary["status"] == "FINISHED"
    assert summary["metrics"]["claims/fail"] == count(checked.rows, "fail")
    assert "| claim | reference |" in summary["tags"]["mlflow.note.content"]
    assert summary["tags"]["mlflow.source.type"] == "LOCAL"
    assert summary["tags"]["versions"] == checked.runs()[0]["tags"]["versions"]


def test_the_view_of_the_runs_shows_what_the_ledger_is_about(checked):
    store = tracking.connect(checked.uri)
    experiment = store.client.get_experiment_by_name(EXPERIMENT)
    packed = json.loads(experiment.tags[view.TAG])["state"].removeprefix("deflate;")
    shown = json.loads(zlib.decompress(base64.b64decode(packed)))["selectedColumns"]
    assert {"params.`latent_size`", "metrics.`val/neg_elbo`", "metrics.`test/mse`"} <= set(shown)


# --- repeating ------------------------------------------------------------------------------------


def test_the_same_check_again_trains_nothing_and_says_the_same(checked, tiny, capsys):
    before = checked.runs()
    again = check(checked.folder, tiny)
    assert "nothing is trained again" in capsys.readouterr().out
    assert checked.runs() == before
    assert len(checked.runs("summary")) == 1
    assert [row.obtained for row in again.rows] == [row.obtained for row in checked.rows]


def opened(home: Checked, data: Dataset, form: Form = TINY, **options) -> Check:
    """Open a ledger as a command does, without presenting it."""
    return open_check(reproduction(form), data, ReproduceOptions(tracking_uri=home.uri, **options))


def missing(check: Check) -> list[str]:
    """Name the runs that have not finished."""
    evidence = check.evidence()
    return [
        f"{runs.label} seed={config.seed}"
        for runs in check.page.trained_on("cpu")
        for config in evidence.unfinished(runs)
    ]


def test_a_larger_form_trains_only_what_is_new(copied, tiny):
    before = {r["run_id"] for r in copied.runs()}
    larger = opened(copied, tiny, replace(TINY, blog_seeds=3))
    assert missing(larger) == [f"{TINY.blog.label} seed=2"]
    train_missing(larger, Terminal())
    new = [r["name"] for r in copied.runs() if r["run_id"] not in before]
    assert new == [f"{TINY.blog.label} seed=2"]
    assert missing(larger) == []


def test_what_a_dead_process_left_is_closed_and_trained_again(copied, tiny):
    client = tracking.connect(copied.uri).client
    lost = next(r for r in copied.runs() if r["params"]["model"] == "linear")
    client.set_tag(lost["run_id"], "process", str(2**22 + 1))  # above the largest id
    client.update_run(lost["run_id"], status="RUNNING")
    check = opened(copied, tiny)
    assert missing(check) == [lost["name"]]
    train_missing(check, Terminal())
    runs = copied.runs()
    (buried,) = [r for r in runs if r["run_id"] == lost["run_id"]]
    assert (buried["status"], buried["tags"]["reason"]) == ("KILLED", "its process is gone")
    assert (runs[-1]["name"], runs[-1]["status"]) == (lost["name"], "FINISHED")
    assert len(runs) == RUNS + 1


def test_a_check_that_another_process_is_making_is_refused(copied, tiny):
    client = tracking.connect(copied.uri).client
    client.update_run(copied.runs()[0]["run_id"], status="RUNNING")  # by this living process
    with pytest.raises(UserError, match="is being run by process"):
        opened(copied, tiny)


def test_runs_on_other_images_do_not_count(copied, tiny):
    assert missing(opened(copied, tiny)) == []
    assert len(missing(opened(copied, replace(tiny, digest="other")))) == RUNS


def test_fresh_begins_a_ledger_of_its_own(copied, tiny):
    fresh = opened(copied, tiny, fresh=True)
    assert fresh.name == f"{EXPERIMENT}-2"
    assert len(missing(fresh)) == RUNS


def test_a_claim_that_nothing_here_can_train_is_not_run(copied, tiny):
    large = Runs("large network", RunConfig(hidden=(9,)), 1, gpu=True)
    claim = about("far", "nobody", "1", 1.0, "none", lambda e: e.mean(large, "mse"), (large,))
    check = opened(copied, tiny)
    check = replace(check, page=replace(check.page, ledger={"x": [claim]}))
    train_missing(check, Terminal())
    (row,) = judge(check.page.ledger, check.evidence())
    assert (row.obtained, row.verdict, row.note) == ("", "not run", "needs --full on a GPU")
    assert len(copied.runs()) == RUNS
    full = replace(check.page, full=True)
    assert [full.trained_on(device) for device in ("cpu", "cuda")] == [[], [large]]
    assert check.page.trained_on("cuda") == []


def test_a_run_that_diverged_is_not_trained_again_and_no_gpu_is_asked_for(copied, tiny):
    wild = RunConfig(hidden=(16,), epochs=1, learning_rate=1e30)
    runs = Runs("wild", wild, 1, gpu=True)
    claim = about("far", "nobody", "1", 1.0, "none", lambda e: e.mean(runs, "mse"), (runs,))
    check = opened(copied, tiny)
    check = replace(check, page=replace(check.page, full=True, ledger={"x": [claim]}))
    train_stack([check.planned(runs, wild)], check.place)  # as on a GPU
    before = copied.runs()
    here = replace(claim, needs=(replace(runs, gpu=False),))
    train_missing(replace(check, page=replace(check.page, ledger={"x": [here]})), Terminal())
    assert copied.runs() == before
    (row,) = judge(check.page.ledger, check.evidence())
    assert (row.verdict, row.note) == ("not run", "'wild' diverged")


def test_a_published_likelihood_is_read_off_binary_pixels(copied, tiny):
    # The network of the paper, on digits and without a GPU.
    small = replace(
        TINY.burda, gpu=False, config=TINY.burda.config.replace(batch_size=32, epochs=1)
    )
    check = opened(copied, tiny)
    claim = about(
        "x", "y", "44", 4.0, "z", lambda e: mean(e.neg_log_likelihoods(small, 9)), (small,)
    )
    check = replace(check, page=replace(check.page, ledger={"x": [claim]}))
    train_missing(check, Terminal())
    (row,) = judge(check.page.ledger, check.evidence())
    assert row.verdict == "pass"  # untrained: 64 ln 2 = 44.4 nats


def test_a_ledger_that_says_something_new_is_recorded_anew(copied, tiny):
    check = opened(copied, tiny)
    wider = [about("new", "nobody", "1", 1.0, "none", lambda e: 1.0, (TINY.blog,))]
    page = replace(check.page, ledger={"x": wider}, pictured=())
    check = replace(check, page=page)
    for _ in range(2):
        evidence = check.evidence()
        summarize(check, judge(page.ledger, evidence), evidence)
        assert len(copied.runs("summary")) == 2
    assert len(copied.runs()) == RUNS


# --- the command line -----------------------------------------------------------------------------


def test_help_says_all_options_and_loads_neither_torch_nor_mlflow():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['reproduce', '--help']\n"
        "try:\n    runpy.run_module('studies.reproduce', None, '__main__', True)\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'mlflow', 'optuna.study', 'seaborn.utils', 'pandas', 'sklearn'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in ("--data-dir", "--full", "--device", "--tracking-uri", "--fresh", "--dry-run"):
        assert option in done.stdout


def test_a_dry_run_says_what_is_trained_and_writes_nothing(mnist_folder, tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/m.db"
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--dry-run", "--data-dir", str(mnist_folder), "--tracking-uri", uri])
    assert stop.value.code == 0
    assert "blog's recipe, 20 epochs: 3 x 20 epochs" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
