"""Benchmarks end as studies do at a user's error, and clock functions that exist."""

import importlib
from functools import reduce

import pytest

from benchmarks import machine, tracking_overhead
from harness.config import UserError


def test_a_users_error_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop, machine.clear_errors():
        raise UserError("device='cuda': none here")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: device='cuda': none here\n"


def test_every_function_that_is_clocked_exists():
    for places in tracking_overhead.WORK.values():
        for place in places:
            owner, names = place.split(":")
            module, _, last = owner.rpartition(".")
            path = (module, last) if last[0].isupper() else (owner,)
            holder = reduce(getattr, path[1:], importlib.import_module(path[0]))
            assert all(callable(getattr(holder, name)) for name in names.split()), place
