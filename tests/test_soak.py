"""A few kills of the soak, whose many are `make soak`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_study_survives_signals_at_random_moments():
    command = [sys.executable, "-m", "benchmarks.soak", "--kills", "2", "--forked"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout + done.stderr
