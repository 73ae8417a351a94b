"""A private PostgreSQL server for tests, on a free port; skipped where PostgreSQL is missing."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from real_servers import free_port

PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
SETTINGS = {
    "listen_addresses": "'127.0.0.1'",
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_connections": "100",
}


def program(name: str) -> str | None:
    """Find a program of PostgreSQL, which Debian keeps out of the path."""
    return shutil.which(name, path=os.pathsep.join([*map(str, PLACES), os.environ["PATH"]]))


@dataclass(frozen=True)
class Postgres:
    """A server that can be stopped and started; root runs it as another user, as it demands."""

    folder: Path
    port: int

    def run(self, name: str, *arguments: str) -> None:
        """Run a program of PostgreSQL."""
        found = program(name)
        assert found is not None
        drop = ["setpriv", f"--reuid={_user()}", f"--regid={_user()}", "--clear-groups"]
        command = [*(drop if os.getuid() == 0 else []), found, *arguments]
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )
        assert done.returncode == 0, done.stderr

    def control(self, *words: str) -> None:
        """Start, stop or restart the server, and wait until that is done."""
        self.run("pg_ctl", "-D", str(self.data), "-w", "-l", str(self.folder / "log"), *words)

    @property
    def data(self) -> Path:
        """Folder of the databases."""
        return self.folder / "data"

    def create(self, database: str) -> str:
        """Create a database and return its URL."""
        here = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "sweep"]
        self.run("createdb", *here, database)
        return f"postgresql+psycopg://sweep:secret@127.0.0.1:{self.port}/{database}"


def _user() -> str:
    names = {user.pw_name for user in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def lacking() -> str:
    """Return what is missing for a server, "" where there is everything."""
    if program("initdb") is None or (os.getuid() == 0 and not shutil.which("setpriv")):
        return "no PostgreSQL here (apt-get install postgresql)"
    return "" if find_spec("psycopg") else "no psycopg here (pip install '.[cluster]')"


@contextmanager
def running() -> Iterator[Postgres]:
    """Run a server; the folder is not pytest's, which only its owner may enter."""
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = Postgres(Path(folder), free_port())
        if os.getuid() == 0:
            shutil.chown(folder, _user())
        server.run("initdb", "-D", str(server.data), "-U", "sweep", "-A", "trust", "--no-sync")
        settings = SETTINGS | {"port": str(server.port), "unix_socket_directories": f"'{folder}'"}
        with (server.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())
        server.control("start")
        try:
            yield server
        finally:
            server.control("-m", "immediate", "stop")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Run a server for all tests."""
    if why := lacking():
        pytest.skip(why)
    with running() as server:
        yield server
