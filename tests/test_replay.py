"""A finished run comes out again, bit for bit; what stands in the way is one clear line."""

import json
import shutil
import sqlite3
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from real_stores import copy_home

from harness import RunConfig, UserError, records, tracking
from harness.places import default_tracking
from harness.records import Logged
from harness.tracking import RunLog
from harness.training.engine import best_epoch, flat_record, train, train_and_evaluate
from studies import agreement, companions, replay
from studies.companions import Companions
from studies.measures import WALL_CLOCK
from studies.origin import description
from studies.place import Place
from studies.runner.terminal import Terminal
from studies.stack import End, train_stack

CONFIG = RunConfig(hidden=(16, 12), epochs=5)
STACK = [CONFIG.replace(seed=seed) for seed in range(3)]
ENDS = {1: End("KILLED", "tested"), 2: End("FAILED", "tested")}
"""Epoch -> why the last run of the stack ends."""
TAGS = {"study": "s", "role": "run", "trial": "0", "configuration": "c"}


def ran(arguments: list[str], capsys) -> tuple[int, str]:
    """Run the command; return its exit code and all that it printed."""
    with pytest.raises(SystemExit) as stop:
        replay.main(arguments)
    said = capsys.readouterr()
    return stop.value.code, said.out + said.err


@dataclass(frozen=True)
class Trained:
    """Runs of one stack in a store of their own."""

    folder: Path
    runs: list[dict]

    @property
    def uri(self) -> str:
        """Address of the store."""
        return f"sqlite:///{self.folder}/mlflow.db"

    def run_id(self, row: int) -> str:
        """Return the id of a row's run."""
        return self.runs[row]["run_id"]

    def artifact(self, row: int, name: str) -> Path:
        """Return the file of an artifact of a row's run."""
        return self.folder / "mlruns" / "s-digits" / self.run_id(row) / "artifacts" / name

    def replayed(self, row: int, capsys) -> tuple[int, str]:
        """Run the command on a row's run."""
        return ran([self.run_id(row), "--tracking-uri", self.uri], capsys)


@pytest.fixture(scope="module")
def stack(empty_database, tmp_path_factory, data) -> Trained:
    """Train a stack that all runs but the first leave early; tests only read it."""
    folder = tmp_path_factory.mktemp("stack")
    shutil.copy(empty_database, folder / "mlflow.db")
    return trained(folder, data)


@pytest.fixture
def own_stack(stack, tmp_path) -> Trained:
    """Return a copy of that stack for one test, which may spoil it."""
    copy_home(stack.folder, tmp_path / "own")
    return replace(stack, folder=tmp_path / "own")


def trained(folder: Path, data) -> Trained:
    store = tracking.connect(f"sqlite:///{folder}/mlflow.db")
    experiment = tracking.open_experiment(store, "s-digits", "Why?")
    place = Place(None, data, "cpu", store, experiment, lambda record: None)

    def judge(record):
        return {len(record.rows) - 1: ENDS[record.epoch]} if record.epoch in ENDS else {}

    train_stack([(config, {}, TAGS) for config in STACK], place, judge)
    runs = {run["params"]["seed"]: run for run in tracking.read_runs(store, "s-digits")}
    return Trained(folder, [runs[str(config.seed)] for config in STACK])


# --- what comes out again -----------------------------------------------------------------------


def test_a_run_of_a_study_comes_out_again_bit_for_bit(finished, capsys):
    store = tracking.connect(finished.tracking_uri)
    run = tracking.read_runs(store, "kl_weight-digits", "params.kl_weight = '0.02'")[0]
    entries = [
        len(store.client.get_metric_history(run["run_id"], name))
        for name in run["metrics"]
        if name not in WALL_CLOCK
    ]
    code, said = ran([run["run_id"], "--tracking-uri", finished.tracking_uri], capsys)
    assert code == 0, said
    assert f"all {sum(entries):,} values of {len(entries)} metrics are equal" in said


def test_a_run_whose_companions_left_comes_out_again_alone(stack, capsys):
    assert [run["status"] for run in stack.runs] == ["FINISHED", "FAILED", "KILLED"]
    code, said = stack.replayed(0, capsys)
    assert code == 0, said
    assert "in its stack" not in said


def test_a_stack_is_trained_again_with_who_left_it_and_when(stack, data):
    # As on a GPU, where the company of a run can change its last bits.
    record = records.read_record(records.open_existing(stack.uri), stack.run_id(0))
    company = Companions(STACK, {2: 1, 1: 2})
    widths = []

    class Counting(Terminal):
        def bar(self, runs, epochs):
            return nullcontext(lambda record: widths.append(len(record.rows)))

    values = replay.retrain(replay.Replay(company, 0, None, data, "cpu"), Counting())
    assert widths == [3, 2, 1, 1, 1]
    assert agreement.compare(record.values, values, leave_out=WALL_CLOCK).reproduces
    assert companions.from_json(json.loads(company.to_json(own=0))) == (company, 0)


def test_nothing_is_written_to_the_store(own_stack, capsys):
    def contents() -> tuple[list[str], set[Path]]:
        with sqlite3.connect(own_stack.folder / "mlflow.db") as connection:
            lines = list(connection.iterdump())
        connection.close()
        return lines, set(own_stack.folder.rglob("*"))

    lines, files = contents()
    assert own_stack.replayed(0, capsys)[0] == 0
    assert contents()[0] == lines
    new = {path.name for path in contents()[1] - files}
    assert new <= {"mlflow.db-wal", "mlflow.db-shm", "mlflow.db.lock"}


def test_another_value_in_the_record_is_found_and_named(own_stack, capsys):
    store = tracking.connect(own_stack.uri)
    store.client.log_metric(own_stack.run_id(0), "val/mse", 0.5, step=2)
    code, said = own_stack.replayed(0, capsys)
    assert code == 1
    assert "Not reproduced: 1 of" in said
    assert "worst val/mse in epoch 2: 0.5 logged" in said


def test_a_metric_that_nobody_computes_is_found_and_named(own_stack, capsys):
    store = tracking.connect(own_stack.uri)
    store.client.log_metric(own_stack.run_id(0), "test/wishful", 0.5, step=CONFIG.epochs)
    code, said = own_stack.replayed(0, capsys)
    assert code == 1
    assert "logged but not computed now: test/wishful" in said


def test_another_device_is_judged_by_the_tolerance_and_other_code_is_named(own_stack, capsys):
    file = own_stack.artifact(0, "provenance.json")
    made = json.loads(file.read_text())
    made["device"]["name"], made["code"]["sources"] = "Z80", "0" * 64
    file.write_text(json.dumps(made))
    store = tracking.connect(own_stack.uri)
    value = own_stack.runs[0]["metrics"]["test/mse"]
    store.client.log_metric(own_stack.run_id(0), "test/mse", 1.001 * value, step=CONFIG.epochs)
    code, said = own_stack.replayed(0, capsys)
    assert code == 0
    assert "device name: Z80 then" in said
    assert "other files now" in said
    assert "where 10 % is allowed on another device" in said


def test_other_rounding_is_within_the_tolerance_and_another_seed_is_not(data):
    # float64 in place of float32 stands for a device that rounds otherwise.
    def values(config, dtype):
        return {
            (name, record.epoch): value
            for record in train([config], data, "cpu", dtype)
            for name, value in flat_record(record, 0).items()
        }

    logged = [Logged(*key, value) for key, value in values(CONFIG, torch.float32).items()]
    rule = agreement.rounding(len(data.train) // CONFIG.batch_size)
    found = agreement.compare(logged, values(CONFIG, torch.float64), rule)
    assert found.equal < len(logged)
    assert found.reproduces
    other = values(CONFIG.replace(seed=9), torch.float32)
    assert not agreement.compare(logged, other, rule).reproduces


@pytest.mark.gpu
def test_a_run_of_the_cpu_comes_out_on_the_gpu_within_the_tolerance(stack, capsys):
    arguments = [stack.run_id(0), "--tracking-uri", stack.uri, "--device", "cuda"]
    code, said = ran(arguments, capsys)
    assert code == 0, said
    assert "device kind: cpu then, cuda now" in said


# --- what stands in the way ---------------------------------------------------------------------


def refused(arguments: list[str], capsys) -> str:
    code, said = ran(arguments, capsys)
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_a_summary_is_refused(finished, capsys):
    store = tracking.connect(finished.tracking_uri)
    (summary,) = tracking.read_runs(store, "kl_weight-digits", "tags.role = 'summary'")
    arguments = [summary["run_id"], "--tracking-uri", finished.tracking_uri]
    assert "is a summary" in refused(arguments, capsys)


@pytest.mark.parametrize(("row", "status"), [(1, "FAILED"), (2, "KILLED")])
def test_a_run_that_did_not_finish_is_refused(stack, row, status, capsys):
    said = refused([stack.run_id(row), "--tracking-uri", stack.uri], capsys)
    assert f"is {status}; only a FINISHED run" in said


def test_a_run_without_a_record_is_refused(tracking_uri, capsys):
    store = tracking.connect(tracking_uri)
    log = RunLog(store, tracking.open_experiment(store, "s-digits", "Why?"), "old", TAGS, {})
    log.end()
    said = refused([log.run_id, "--tracking-uri", tracking_uri], capsys)
    assert "has no record to repeat it from: provenance.json" in said


def test_other_pixels_are_refused_before_training(own_stack, capsys):
    file = own_stack.artifact(0, "provenance.json")
    made = json.loads(file.read_text())
    digest = made["dataset"]["digest"]
    file.write_text(json.dumps(made).replace(digest, "f" * 64))
    said = refused([own_stack.run_id(0), "--tracking-uri", own_stack.uri], capsys)
    assert f"digest {'f' * 64} then, {digest} now" in said


def test_another_split_is_refused(stack, tiny):
    record = records.read_record(records.open_existing(stack.uri), stack.run_id(0))
    made = record.made_with | {"dataset": record.made_with["dataset"] | {"images": {"train": 96}}}
    with pytest.raises(UserError, match="images {'train': 96} then"):
        replay.load(replace(record, made_with=made), Path("data"))


def test_a_setting_that_an_earlier_version_lacked_is_its_default(own_stack):
    file = own_stack.artifact(0, "model/config.json")
    values = json.loads(file.read_text())
    del values["precision"]
    file.write_text(json.dumps(values))
    with sqlite3.connect(own_stack.folder / "mlflow.db") as connection:
        connection.execute("DELETE FROM params WHERE key = 'precision'")
    store = records.open_existing(own_stack.uri)
    assert records.read_record(store, own_stack.run_id(0)).config == CONFIG


def test_a_configuration_that_was_changed_is_refused(own_stack, capsys):
    file = own_stack.artifact(0, "model/config.json")
    file.write_text(CONFIG.replace(kl_weight=0.5).to_json())
    said = refused([own_stack.run_id(0), "--tracking-uri", own_stack.uri], capsys)
    assert "kl_weight is 1.0 among its parameters and 0.5 in its model" in said


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is no JSON object"),
        ("{}", "lacks study; it cannot be repeated"),
        ('{"study": null, "device": {"kind": "cpu"}, "threads": [1]}', "lacks threads.blas"),
    ],
    ids=len,
)
def test_a_broken_record_is_refused(own_stack, record, says, capsys):
    own_stack.artifact(0, "provenance.json").write_text(record)
    assert says in refused([own_stack.run_id(0), "--tracking-uri", own_stack.uri], capsys)


@pytest.mark.parametrize("broken", ["{}", '{"configs": [1], "left": {}, "own": 0}'])
def test_a_broken_record_of_the_stack_is_refused(own_stack, broken):
    store = records.open_existing(own_stack.uri)
    record = records.read_record(store, own_stack.run_id(0))
    record = replace(record, made_with=record.made_with | {"device": {"kind": "cuda"}})
    own_stack.artifact(0, "stack.json").write_text(broken)
    with pytest.raises(UserError, match="stack.json of run .* is broken|configuration has"):
        companions.read(store, record, "cuda")


def test_a_study_that_is_not_known_here_is_refused(stack):
    record = records.read_record(records.open_existing(stack.uri), stack.run_id(0))
    assert replay.study_of(record) is None
    other = replace(record, made_with=record.made_with | {"study": "mine"})
    with pytest.raises(UserError, match=r"add it to STUDIES in studies/all\.py"):
        replay.study_of(other)


# --- what a run records -------------------------------------------------------------------------


def test_every_run_of_a_stack_has_tags_record_and_the_command_that_repeats_it(stack):
    for run in stack.runs:
        assert {"git_commit", "git_dirty", "versions", "device_name"} <= run["tags"].keys()
        note = run["tags"]["mlflow.note.content"]
        assert f"python -m studies.replay {run['run_id']} --tracking-uri {stack.uri}" in note
    made = [json.loads(stack.artifact(row, "provenance.json").read_text()) for row in range(3)]
    assert made == [made[0]] * 3
    dirty = made[0]["code"]["dirty"]
    has_diff = stack.artifact(0, "provenance/diff.patch").exists()
    assert has_diff <= bool(dirty)


def test_the_command_names_no_password_and_no_default_store():
    said = description("abc", "https://me:secret@host:5000")
    assert said.endswith("python -m studies.replay abc --tracking-uri https://host:5000")
    assert description("abc", default_tracking()).endswith("python -m studies.replay abc")


# --- the best epoch -----------------------------------------------------------------------------


def test_the_best_epoch_is_the_first_of_the_lowest():
    assert best_epoch([3.0, 1.0, 2.0, 1.0]) == 2
    assert best_epoch([float("inf"), 5.0]) == 2
    assert best_epoch([1.0]) == 1


def test_a_result_knows_its_best_epoch(tiny):
    plain = CONFIG.replace(kl_weight=0.0, latent="deterministic")
    for result in train_and_evaluate([CONFIG.replace(kl_weight=0.0), plain], tiny, device="cpu"):
        metric = "val/loss" if result.config == plain else "val/neg_elbo"
        course = [epoch[metric] for epoch in result.history]
        assert course[result.best_epoch - 1] == min(course)


def test_every_run_logs_its_best_epoch_beside_the_last(finished):
    store = tracking.connect(finished.tracking_uri)
    for run in tracking.read_runs(store, "kl_weight-digits", "tags.role = 'run'"):
        history = store.client.get_metric_history(run["run_id"], "val/neg_elbo")
        best = min(history, key=lambda entry: (entry.value, entry.step))
        assert run["metrics"]["best/epoch"] == best.step
        assert run["metrics"]["best/val/neg_elbo"] == best.value


def test_the_best_epoch_is_in_the_table_on_the_screen_and_in_the_report(finished):
    folder = finished.folder / "reports" / "kl_weight-digits"
    header = (folder / "table.csv").read_text().splitlines()[0].split(",")
    assert {"val/neg_elbo", "best/val/neg_elbo", "best/epoch"} <= set(header)
    assert "best/" in finished.printed
    page = (folder / "report.html").read_text()
    assert page.count("best/<wbr>epoch") == 2
