"""Runs that are trained again from their records, and the comparison of the values."""

import json
import math
import shutil
import sqlite3
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from frozen import first_edition
from real_stores import copy_home
from test_json import printed

from harness import RunConfig
from harness.tracking import End, Planned, connect
from harness.tracking.record import WALL_CLOCK, log_in, record
from harness.tracking.runs import Logged
from studies import replay
from studies.replay import compare, difference

CONFIG = RunConfig(hidden=(16, 12), epochs=5)
STACK = [CONFIG.replace(seed=seed) for seed in range(3)]
ENDS = {1: End("KILLED", "tested"), 2: End("FAILED", "tested")}
"""Epoch -> why the last run of the stack ends."""


def ran(arguments: list[str], capsys) -> tuple[int, str]:
    """Run the command; return its exit code and all that it printed."""
    code = 0
    try:
        replay.main(arguments)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@dataclass(frozen=True)
class Trained:
    """Runs of one stack, and their store."""

    folder: Path

    @property
    def uri(self) -> str:
        """Address of the store."""
        return f"sqlite:///{self.folder}/mlflow.db"

    def run(self, row: int):
        """Return a row's run."""
        return connect(self.uri).runs("s-digits")[row]

    def artifact(self, row: int, name: str) -> Path:
        """Return the file of an artifact of a row's run."""
        return self.folder / "mlruns" / "s-digits" / self.run(row).run_id / "artifacts" / name

    def replayed(self, row: int, capsys) -> tuple[int, str]:
        """Run the command on a row's run."""
        return ran([self.run(row).run_id, "--tracking-uri", self.uri], capsys)


@pytest.fixture(scope="module")
def stack(empty_database, tmp_path_factory, data) -> Trained:
    """Train a stack that all runs but the first leave early; tests only read it."""
    folder = tmp_path_factory.mktemp("stack")
    shutil.copy(empty_database, folder / "mlflow.db")
    trained = Trained(folder)
    planned = [
        Planned(config, f"{row:032x}", f"run {row}", {}, {"role": "run", "place": str(row)})
        for row, config in enumerate(STACK)
    ]
    start = log_in(connect(trained.uri), "s-digits", "Why?")

    def judge(current):
        return {len(current.rows) - 1: ENDS[current.epoch]} if current.epoch in ENDS else {}

    record(planned, data, "cpu", start, judge=judge, objective="val/mse")
    return trained


@pytest.fixture
def copied_stack(stack, tmp_path) -> Trained:
    """Return a copy of that stack for one test, which may spoil it."""
    copy_home(stack.folder, tmp_path / "copy")
    return replace(stack, folder=tmp_path / "copy")


# --- replays -------------------------------------------------------------------------------------


def test_a_run_of_a_stack_is_reproduced_bit_for_bit(stack, capsys):
    store, run = connect(stack.uri), stack.run(0)
    values = [v for v in store.history(run.run_id) if v.metric not in WALL_CLOCK]
    assert {"test/pca_floor", "best/epoch", "test/frechet"} <= {value.metric for value in values}
    code, printed = stack.replayed(0, capsys)
    assert code == 0, printed
    assert f"Reproduced: all {len(values):,} values are equal to the last bit." in printed


def test_a_run_of_a_command_is_reproduced_bit_for_bit(finished, capsys):
    run = connect(finished.tracking_uri).runs("kl_weight-digits", role="run")[0]
    code, printed = ran([run.run_id, "--tracking-uri", finished.tracking_uri], capsys)
    assert code == 0, printed
    assert "Reproduced: all " in printed


def test_every_value_of_a_run_of_the_first_edition_is_computed_again(tmp_path, capsys):
    uri = first_edition.unpack(tmp_path)
    run = connect(uri).runs("kl_weight-digits", role="run", study="kl_weight-digits")[0]
    _, printed = ran([run.run_id, "--tracking-uri", uri], capsys)
    assert "again: 2 epochs on digits, on cpu" in printed
    assert printed.splitlines()[-1].startswith(("Reproduced: ", "Compared: ", "Not reproduced: "))
    assert "not computed now" not in printed


def test_a_run_is_named_by_its_key_too(stack, capsys):
    code, printed = ran([stack.run(0).key, "--tracking-uri", stack.uri], capsys)
    assert code == 0, printed


def test_nothing_is_written_to_the_store(copied_stack, capsys):
    def contents() -> tuple[list[str], set[Path]]:
        with sqlite3.connect(copied_stack.folder / "mlflow.db") as connection:
            lines = list(connection.iterdump())
        connection.close()
        return lines, set(copied_stack.folder.rglob("*"))

    lines, files = contents()
    assert copied_stack.replayed(0, capsys)[0] == 0
    assert contents()[0] == lines
    new = {path.name for path in contents()[1] - files}
    assert new <= {"mlflow.db-wal", "mlflow.db-shm", "mlflow.db.lock"}


def test_other_values_in_the_record_are_found_and_named(copied_stack, capsys):
    store, run_id = connect(copied_stack.uri), copied_stack.run(0).run_id
    store.client.log_metric(run_id, "val/mse", 0.5, step=2)
    code, printed = copied_stack.replayed(0, capsys)
    assert code == 1
    assert "Not reproduced: 1 of" in printed
    assert "most of all val/mse in epoch 2: 0.5 logged" in printed


def test_a_record_of_an_earlier_version_is_compared_whole(copied_stack, capsys):
    store, run_id = connect(copied_stack.uri), copied_stack.run(0).run_id
    assert ("val/kl/3", 3) not in {value[:2] for value in store.history(run_id)}
    store.client.log_metric(run_id, "val/kl/3", 5e3, step=3)
    code, printed = copied_stack.replayed(0, capsys)
    assert code == 1
    assert "most of all val/kl/3 in epoch 3: 5000.0 logged" in printed


def test_on_another_device_differences_are_shown_without_a_verdict(copied_stack, capsys):
    file = copied_stack.artifact(0, "provenance.json")
    made = json.loads(file.read_text())
    made["device"]["name"], made["code"]["sources"] = "Z80", "0" * 64
    file.write_text(json.dumps(made))
    store, run = connect(copied_stack.uri), copied_stack.run(0)
    value = run.metrics["test/kl/3"] + 1
    store.client.log_metric(run.run_id, "test/kl/3", value, step=CONFIG.epochs)
    code, printed = copied_stack.replayed(0, capsys)
    assert code == 0
    assert "device name: Z80 then" in printed
    assert f"code sources: {'0' * 64} then" in printed
    assert "Compared: 1 of " in printed
    assert f"most of all test/kl/3 in epoch 5: {value!r} logged" in printed


@pytest.mark.gpu
def test_a_run_of_the_cpu_is_compared_on_the_gpu(stack, capsys):
    arguments = [stack.run(0).run_id, "--tracking-uri", stack.uri, "--device", "cuda"]
    code, printed = ran(arguments, capsys)
    assert code == 0, printed
    assert "device kind: cpu then, cuda now" in printed
    assert "Compared: " in printed


# --- refusals ------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys) -> str:
    code, printed = ran(arguments, capsys)
    assert code == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


@pytest.mark.parametrize(("row", "status"), [(1, "FAILED"), (2, "KILLED")])
def test_a_run_that_did_not_finish_is_refused(stack, row, status, capsys):
    printed = refused([stack.run(row).run_id, "--tracking-uri", stack.uri], capsys)
    assert status in printed


def test_a_summary_and_a_run_without_a_record_are_refused(tracking_uri, capsys):
    store = connect(tracking_uri)
    experiment = store.experiment("s-digits", "Why?")
    for role in ("summary", "run"):
        log = store.start(experiment, role * 8, role, {"role": role}, {})
        log.end()
        printed = refused([log.key, "--tracking-uri", tracking_uri], capsys)
        assert role in printed


@pytest.mark.parametrize("name", ["f" * 32, "no-such-key"])
def test_an_unknown_run_is_refused(stack, name, capsys):
    assert "is not in" in refused([name, "--tracking-uri", stack.uri], capsys)


def test_a_missing_store_is_refused_and_not_made(tmp_path, capsys):
    uri = f"sqlite:///{tmp_path}/none.db"
    assert "does not exist" in refused(["0" * 32, "--tracking-uri", uri], capsys)
    assert not any(tmp_path.iterdir())


def test_other_pixels_are_refused_before_training(copied_stack, capsys):
    file = copied_stack.artifact(0, "provenance.json")
    made = json.loads(file.read_text())
    digest = made["dataset"]["digest"]
    file.write_text(json.dumps(made).replace(digest, "f" * 64))
    printed = refused([copied_stack.run(0).run_id, "--tracking-uri", copied_stack.uri], capsys)
    assert f"digest {'f' * 64} then, {digest} now" in printed


# --- the comparison ------------------------------------------------------------------------------

LOGGED = [
    Logged("val/mse", 1, 0.5),
    Logged("val/mse", 2, 0.25),
    Logged("val/kl/3", 2, math.nan),
    Logged("test/mse", 2, 0.0),
]
NOW = {(value.metric, value.step): value.value for value in LOGGED}


def test_equal_values_reproduce_and_the_sign_of_zero_and_nan_do_not_matter():
    for exact in (True, False):
        found = compare(LOGGED, NOW | {("test/mse", 2): -0.0}, exact=exact)
        assert found == (True, "Reproduced: all 4 values are equal to the last bit.")


def test_one_last_bit_is_a_difference():
    now = NOW | {("val/mse", 2): math.nextafter(0.25, 1)}
    text = (
        "1 of 4 values differ, most of all val/mse in epoch 2: 0.25 logged, 0.25000000000000006 "
        "now."
    )
    assert compare(LOGGED, now, exact=True) == (False, f"Not reproduced: {text}")
    assert compare(LOGGED, now, exact=False) == (True, f"Compared: {text}")


def test_the_largest_difference_is_relative():
    now = NOW | {("val/mse", 1): 0.6, ("val/mse", 2): 0.31}
    assert (
        "2 of 4 values differ, most of all val/mse in epoch 2"
        in compare(LOGGED, now, exact=True)[1]
    )


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_a_number_and_none_differ_without_bound(values):
    assert difference(*values) == math.inf


def test_a_value_that_was_not_computed_again_is_missing_on_any_device():
    now = {key: value for key, value in NOW.items() if key[0] != "test/mse"}
    for exact in (True, False):
        found = compare(LOGGED, now, exact=exact)
        assert found == (False, "Not reproduced: logged but not computed now: test/mse.")


def test_the_json_of_a_replay_is_its_outcome(stack, capfd):
    run = stack.run(0).run_id
    found = printed(replay.main, [run, "--tracking-uri", stack.uri], capfd)
    assert (found["run_id"], found["reproduced"], found["differences"]) == (run, True, [])
    assert found["answer"].startswith("Reproduced: all ")
