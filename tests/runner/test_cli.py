"""The command line: exit codes, dry runs, light start; `--json`: test_json.py."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest

from harness import RunConfig
from harness.errors import SummaryError, UserError
from studies import all as all_studies
from studies import kl_weight, search, sweep
from studies.runner import cli, stopping, usage
from studies.runner.options import SETTINGS, Common, flag

ROOT = Path(__file__).resolve().parents[2]


def stopped_by(number):
    signal.raise_signal(number)
    stopping.check()


def stopped_twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    pytest.fail("the second signal stops at once")


def fails(error):
    raise error


ENDINGS = {
    # what a command does -> exit code, last line on standard error
    "refused": (lambda: fails(UserError("seeds=0")), 2, "error: seeds=0"),
    "full": (lambda: fails(OSError(28, "No space left")), 2, "error: the disk is full ("),
    "no memory": (lambda: fails(MemoryError()), 2, "error: there is too little memory ("),
    "no figure": (lambda: fails(SummaryError("figure x")), 3, "error: figure x"),
    "SIGTERM": (lambda: stopped_by(signal.SIGTERM), 75, cli.STOPPED),
    "Ctrl-C": (lambda: stopped_by(signal.SIGINT), 130, cli.STOPPED),
    "Ctrl-C twice": (stopped_twice, 130, cli.STOPPED),
    "a claim fails": (lambda: sys.exit(1), 1, ""),
}


@pytest.mark.parametrize(("work", "code", "line"), ENDINGS.values(), ids=ENDINGS.keys())
@pytest.mark.parametrize("words", [[], ["--json"]], ids=["text", "json"])
def test_every_ending_has_its_exit_code_and_its_line(words, work, code, line, capfd):
    with pytest.raises(SystemExit) as stop, cli.clear_errors(words):
        work()
    printed = capfd.readouterr()
    assert stop.value.code == code
    assert (printed.err.splitlines() or [""])[-1].startswith(line)
    if not words:
        assert printed.out == ""
        return
    found = json.loads(printed.out)
    assert found.pop("exit_code") == code
    assert found.pop("error", "").startswith(line.removeprefix("error: "))
    assert found == {}


def test_a_command_that_is_done_goes_on_to_its_end_and_a_fault_is_a_traceback():
    with cli.clear_errors([]):
        pass
    with pytest.raises(ZeroDivisionError), cli.clear_errors([]):
        1 / 0  # noqa: B018


def test_after_a_study_signals_do_what_they_did_before():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with cli.clear_errors([]):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


# --- standard output that nobody reads ----------------------------------------------------------


def python(code: str, stdout: int) -> tuple[int, str]:
    """Run code and return exit code and standard error."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
    )
    return done.returncode, done.stderr


@pytest.fixture
def closed_pipe():
    """Return the end of a pipe whose reader is gone."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


COMMAND = """
import sys
from studies.runner import cli
with cli.clear_errors({args}) as terminal:
    {body}
"""


@pytest.mark.parametrize(
    ("args", "body"),
    [
        ([], "terminal.line('x')"),
        ([], "print('x')"),
        ([], "print('x' * 100_000)"),
        ([], "from studies import kl_weight; cli.main(kl_weight.STUDY, ['--help'])"),
        (["--json"], "terminal.document['answer'] = 'so'"),
        (["--json"], "terminal.document['answer'] = 'so' * 100_000"),
    ],
)
def test_a_closed_standard_output_is_exit_code_141_also_at_the_end(args, body, closed_pipe):
    code, printed = python(COMMAND.format(args=args, body=body), closed_pipe)
    assert code == 141
    assert "Error" not in printed


def test_ctrl_c_that_ended_the_reader_too_is_ctrl_c(closed_pipe):
    body = "import signal; signal.raise_signal(signal.SIGINT); terminal.line('x')"
    assert python(COMMAND.format(args=[], body=body), closed_pipe)[0] == 130


def test_a_full_disk_behind_standard_output_is_exit_code_2():
    with open("/dev/full", "w") as full:
        code, printed = python(COMMAND.format(args=[], body="terminal.line('x')"), full.fileno())
    assert code == 2
    assert printed.startswith("error: the disk is full (")
    assert printed.count("\n") == 1


# --- what it does before it trains --------------------------------------------------------------


def test_a_dry_run_names_both_stores_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracking_uri, storage = f"sqlite:///{tmp_path}/m.db", f"sqlite:///{tmp_path}/o.db"
    stores = ["--tracking-uri", tracking_uri, "--storage", storage]
    words = ["--dry-run", "--values", "0.5", "1", *stores]
    cli.main(kl_weight.STUDY, words)
    message = capsys.readouterr().out
    assert "2 values of kl_weight (0.5, 1) x 3 seeds = 6 runs" in message
    assert f"Tracking: {tracking_uri}\nStorage: {storage}\n" in message
    assert "Runs: 0 are finished, 6 are missing; nothing is refused.\n" in message
    assert "Disk: not known (no finished run like these here)\n" in message
    assert "duration: not known (no finished run like these here)" in " ".join(message.split())
    assert list(tmp_path.iterdir()) == []


def test_help_loads_neither_torch_nor_mlflow_nor_optuna_nor_pandas():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['kl_weight', '--help']\n"
        "try:\n    runpy.run_module('studies.kl_weight', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        # optuna, pandas and seaborn themselves are there as empty stand-ins
        "heavy = {'torch', 'mlflow', 'optuna.study', 'seaborn.utils', 'pandas.core', 'sklearn'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in ("--dataset", "--values", "--seeds", "--storage", "--tracking-uri", "--json"):
        assert option in done.stdout


OWN = replace(kl_weight.STUDY, base=RunConfig(hidden=(7, 5), learning_rate=0.5))


@pytest.mark.parametrize(
    ("command", "brief", "shown"),
    [
        (
            partial(cli.main, OWN),
            ("--hidden 7 5 ", "--learning-rate 0.5 ", "(default: 0 0.001 0.00215 0.00464 ... 10"),
            ("(default: 7 5)", "(default: 0.5)", "(swept by this study)"),
        ),
        (
            search.main,
            ("--hidden 256 64 ", "(default: median; none with", "--kl-cycles (searched) "),
            ("(default: 256 64)", "(searched, unless it is given)"),
        ),
        (
            all_studies.main,
            ("--batch-size 32 ", "--checkpoint-every 0 ", "--latent-size (swept by a study)"),
            ("(default: 256 64)", "(default: 0.001)", "(swept by a study)"),
        ),
        (sweep.main, ("(default: 3) ", "NAME=VALUE,VALUE", "--label none "), ("(repeatable)",)),
    ],
)
def test_every_setting_is_an_option_and_the_help_shows_the_studys_value(
    command, brief, shown, capsys
):
    for word, texts in (("--help", brief), ("--help-all", shown)):
        command([word])
        printed = capsys.readouterr().out
        lines = printed.splitlines()
        if word == "--help":
            assert len(lines) < 40
            assert max(map(len, lines)) <= 80
        printed = " ".join(printed.replace("│", " ").split())
        names = [*SETTINGS, *(field.name for field in fields(Common) if field.name != "settings")]
        assert all(f"{flag(name)} " in printed for name in names)
        assert "--seed " not in printed
        assert all(text in printed for text in texts)


def test_every_group_of_the_help_has_options_and_no_option_is_in_two():
    grouped = " ".join(usage.GROUPS.values()).split()
    assert len({*grouped}) == len(grouped)
    assert {*SETTINGS} < {*grouped} < {*SETTINGS, *(field.name for field in fields(Common))}


def test_the_public_names_of_studies_load_nothing_heavy():
    code = (
        "import sys\nfrom studies import Axis, Study, main, run\n"
        "assert not {'torch', 'mlflow', 'pandas'} & sys.modules.keys()\n"
    )
    assert python(code, subprocess.DEVNULL) == (0, "")
