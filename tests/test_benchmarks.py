"""Benchmarks end as studies do at a user's error, and measure functions that exist."""

import re
from pathlib import Path

import pytest

from benchmarks import machine, study_time
from harness.config import UserError


def test_a_users_error_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop, machine.clear_errors():
        raise UserError("device='cuda': none here")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: device='cuda': none here\n"


def test_every_kind_of_work_has_a_file_of_this_tree():
    root = Path(__file__).resolve().parents[1]
    files = [str(f) for package in ("harness", "studies") for f in (root / package).rglob("*.py")]
    for kind, pattern in study_time.KINDS:
        ours = re.search("harness|studies", pattern)
        names = [f"{file}:picture" for file in files] + [f"{file}:_work" for file in files]
        assert not ours or any(re.search(pattern, name) for name in names), kind
