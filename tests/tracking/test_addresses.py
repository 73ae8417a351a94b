"""Addresses of stores: what is refused, and what is shown of them."""

import errno
import pickle
import sqlite3
import subprocess
import sys
import threading
import uuid
from contextlib import closing
from pathlib import Path

import pytest
import torch

from harness import RunConfig, UserError, load_run
from harness.models.vae import build
from harness.tracking import addresses, connect, schema
from harness.tracking.addresses import reason, storage_address, trouble, without_password

ADDRESSES = {
    "postgresql+psycopg://user:secret@host/db": "postgresql+psycopg://host/db",
    "http://user:secret@host:5000": "http://host:5000",
    "https://secret@host/path": "https://host/path",
    "postgresql://user:se/cret#1@host/db": "postgresql://host/db",
    "postgresql://user:secret@secret@host/db": "***",
    "mysql://user:my secret@host/db": "mysql://host/db",
    "postgresql://host/db?user=me&password=secret": "postgresql://host/db",
    "http://host:5000/a@b": "http://b",  # as SQLAlchemy reads it; the password may be 5000/a
    "sqlite:////home/me@work/mlflow.db": "sqlite:////home/me@work/mlflow.db",
}


@pytest.mark.parametrize(("address", "shown"), ADDRESSES.items())
def test_an_address_is_shown_without_its_password(address, shown):
    assert without_password(address) == shown
    text = without_password(f"API request to {address} failed")
    assert text == f"API request to {shown} failed"


@pytest.mark.parametrize("uri", ["http://u:secret@host:5000/", "https://secret@host"])
def test_a_server_with_a_password_is_refused_and_the_variables_are_named(uri):
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASS"):
        connect(uri)
    with pytest.raises(UserError) as refusal:
        addresses.tracking_address(uri)
    assert "secret" not in str(refusal.value)


def test_a_server_has_one_address(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/")
    assert addresses.tracking_address(None) == "http://host:5000"
    assert addresses.tracking_address("http://host:5000") == "http://host:5000"


def test_an_empty_address_is_not_the_default_one():
    with pytest.raises(UserError, match="--storage is empty; give an address, or leave it out"):
        storage_address("")
    with pytest.raises(UserError, match="--tracking-uri is empty"):
        connect(" ")


def test_a_reason_is_one_line_without_password():
    error = RuntimeError("cannot open http://u:secret@h/x\nmore of secret")
    assert reason(error) == "cannot open http://h/x"
    assert reason(KeyError()) == "KeyError"


def test_a_shortage_is_found_behind_other_errors():
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("x")
    wrapped.__cause__ = full
    assert trouble(wrapped).startswith("the disk is full (")
    assert trouble(MemoryError()).startswith("there is too little memory (")
    assert trouble(ValueError()) is None
    assert "is full" in trouble(sqlite3.OperationalError("database or disk is full"))


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("sqlite:///HERE/file/x.db", "is not a folder"),
        ("sqlite:///HERE", "is not a file"),
        ("sqlite:///HERE/file", "file is not a database"),
        ("sqlite:////dev/null", "is not a file"),
        ("sqlite:////proc/x/m.db", "--tracking-uri"),
        ("sqlite://", "in memory"),
        ("HERE/mlruns", "--tracking-uri"),
        ("gopher://there", "neither an SQLite file nor a server"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_clear_error(uri, why, tmp_path):
    (tmp_path / "file").write_text("no database at all")
    with pytest.raises(UserError, match=why) as refusal:
        connect(uri.replace("HERE", str(tmp_path)))
    assert len(str(refusal.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_addresses_load_neither_mlflow_nor_torch():
    code = "import sys, harness.tracking.addresses as a; a.tracking_address(None);"
    code += "print([name for name in ('mlflow', 'torch') if name in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert done.stdout.split() == [b"[]"]


def test_models_load_without_pickle(tracking_uri, data, monkeypatch):
    store = connect(tracking_uri)
    log = store.start(store.experiment("e", "Why?"), uuid.uuid4().hex, "a run", {}, {})
    config = RunConfig(hidden=(7,), latent_size=3)
    log.model(config, build(config, data.image_shape))
    log.end()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    assert load_run(log.key, tracking_uri).config.hidden == (7,)


def test_a_database_that_is_written_meanwhile_is_not_refused(tmp_path):
    # Read without its locks it looks corrupt to about one check in a hundred.
    written = threading.Event()

    def write():
        with closing(sqlite3.connect(tmp_path / "busy.db")) as database:
            database.execute("create table studies(study_id, study_name)")
            database.execute("create table version_info(schema_version, library_version)")
            for i in range(150):
                database.execute(f"create table t{i}(a)")
                database.commit()
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not written.is_set():
        schema.check_database(f"sqlite:///{tmp_path}/busy.db", "--storage")
    writer.join()
