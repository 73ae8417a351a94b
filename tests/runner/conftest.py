"""Fixtures of the tests of queues and their databases."""

import time

import pytest
from opened import STORAGES

from studies.runner import stopping


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """Close the databases that a test opened, and forget the signals that it sent."""
    monkeypatch.setattr(stopping, "_received", [])
    yield
    while STORAGES:
        STORAGES.pop().engine.dispose()


@pytest.fixture
def sqlite_url(tmp_path):
    """Return the address of an empty SQLite database."""
    return f"sqlite:///{tmp_path}/optuna.db"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, sqlite_url):
    """Return the address of an empty database of each kind."""
    if request.param == "sqlite":
        return sqlite_url
    return request.getfixturevalue("postgres").create(f"db{time.monotonic_ns()}")
