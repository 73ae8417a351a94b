"""A real `mlflow server`, and a proxy in front of it that loses answers, stalls or is gone."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple


def free_port() -> int:
    """Return a local port that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class MlflowServer:
    """An MLflow server on its SQLite database, that can be stopped, killed and started again.

    Args:
        folder: for its database and artifacts.
        empty_database: copied for it.
        options: of `mlflow server`; by default, artifacts go through the server.
    """

    def __init__(self, folder: Path, empty_database: Path, *options: str) -> None:
        self.folder, self.port = folder, free_port()
        self._options = options or ("--artifacts-destination", str(folder / "artifacts"))
        self.uri = f"http://127.0.0.1:{self.port}"
        shutil.copy(empty_database, folder / "server.db")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += [*self._options, "--host", "127.0.0.1", "--port", str(self.port)]
        own = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **own}, stdout=log, stderr=log, start_new_session=True
            )
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server and its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kill it."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None


class Request(NamedTuple):
    """A request as it came."""

    command: str
    path: str
    body: bytes
    headers: dict[str, str]

    @property
    def line(self) -> str:
        """Its first line."""
        return f"{self.command} {self.path}"


class Proxy:
    """Forwards requests to a server, but for those that it is told to lose.

    Attributes:
        uri: address of the proxy.
        down: whether connections are closed unanswered, and nothing reaches the server.
        lose: part of a request line ("POST /path") -> how many answers to such requests are lost,
            after the server has written.
        fall_after: requests that are forwarded until the proxy is down; None: any number.
        rise_after: requests that are refused until it is up again; None: any number.
        hold: as `lose`, for requests that reach the server only when they are released.
        answer: part of a request line -> HTTP code that the proxy answers in the server's place.
        seen: request lines that reached the server.
    """

    def __init__(self, port: int) -> None:
        self.down = False
        self.lose: dict[str, int] = {}
        self.hold: dict[str, int] = {}
        self.answer: dict[str, int] = {}
        self._held: list[Request] = []
        self.fall_after: int | None = None
        self.rise_after: int | None = None
        self.seen: list[str] = []
        self.server_port = port
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._listener.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._listener.server_port}"
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End it."""
        self._listener.shutdown()
        self._listener.server_close()

    def is_down(self) -> bool:
        """Count a request and say whether it is refused."""
        if not self.down and self.fall_after is not None:
            self.fall_after -= 1
            if self.fall_after < 0:
                self.down, self.fall_after = True, None
        if self.down and self.rise_after is not None:
            self.rise_after -= 1
            if self.rise_after < 0:
                self.down, self.rise_after = False, None
        return self.down

    def holds(self, request: Request) -> bool:
        """Count a request and say whether it is held back."""
        if not _counted(self.hold, request.line):
            return False
        self._held.append(request)
        return True

    def loses(self, line: str) -> bool:
        """Count an answer and say whether it is lost."""
        return _counted(self.lose, line)

    def release(self) -> None:
        """Let the requests that were held reach the server, in order."""
        for request in self._held:
            self.forward(request)
        self._held.clear()

    def forward(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        """Let a request reach the server; returns status, headers and content of its answer."""
        self.seen.append(request.line)
        connection = http.client.HTTPConnection("127.0.0.1", self.server_port)
        try:
            connection.request(request.command, request.path, request.body, request.headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


def _counted(left: dict[str, int], line: str) -> bool:
    for part, times in left.items():
        if part in line and times > 0:
            left[part] -= 1
            return True
    return False


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            """Forward one request."""
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, body, dict(self.headers))
            if proxy.is_down() or proxy.holds(request):
                self.close_connection = True
                return
            codes = [code for part, code in proxy.answer.items() if part in request.line]
            answer = (codes[0], [], b"no") if codes else None
            try:
                status, headers, content = answer or proxy.forward(request)
            except (OSError, http.client.HTTPException):  # the server itself is gone
                self.close_connection = True
                return
            if proxy.loses(request.line):
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def log_message(self, format: str, *args: object) -> None:
            """Stay silent."""

    return Handler
