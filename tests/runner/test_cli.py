"""The command line: its options, dry runs and light start; bad input is in test_bad_input.py."""

import signal
import subprocess
import sys
from pathlib import Path

from studies import kl_weight
from studies.runner import cli


def test_after_a_study_signals_do_what_they_did_before():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with cli.clear_errors():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path, capsys):
    places = ["--tracking-uri", f"sqlite:///{tmp_path}/m.db"]
    cli.main(kl_weight.STUDY, ["--dry-run", "--values", "0.5", "1", *places])
    assert "2 values of kl_weight (0.5, 1) x 3 seeds = 6 runs" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_help_loads_neither_torch_nor_mlflow_nor_optuna_nor_pandas():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['kl_weight', '--help']\n"
        "try:\n    runpy.run_module('studies.kl_weight', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        # optuna and seaborn themselves are there as empty stand-ins
        "heavy = {'torch', 'mlflow', 'optuna.study', 'seaborn.utils', 'pandas', 'sklearn'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    for option in ("--dataset", "--values", "--seeds", "--storage", "--tracking-uri", "--fresh"):
        assert option in done.stdout
