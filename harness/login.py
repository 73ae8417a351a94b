"""User and password of a tracking server: taken out of its address, given where MLflow reads."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

from harness.config import UserError
from harness.places import is_server, without_password

LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""Where MLflow reads user and password of a server."""

_signed_in: dict[str, tuple[str, str]] = {}
"""Server -> user and password given with its address."""


def signed_in(uri: str) -> str:
    """Return a server's one address, without user and password, which go where MLflow reads them.

    MLflow knows one user for all servers, and would send it to any.

    Raises:
        UserError: another server was signed in to, or this one as somebody else.
    """
    if not is_server(uri):
        return uri
    server, login = without_password(uri).rstrip("/"), _login(uri)
    told = tuple(os.environ.get(name) for name in LOGIN)
    for known, other in _signed_in.items():
        # Only while MLflow still has it: who sets the variables anew decides for all servers.
        if other == told and (known != server or login not in (None, other)):
            raise UserError(
                f"{known} was signed in to with a user of its own, and MLflow knows one user at a "
                f"time; use {server} in another process, or set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD and leave users out of the addresses"
            )
    if login is not None:
        _signed_in.clear()
        _signed_in[server] = login
        os.environ.update(zip(LOGIN, login, strict=True))
    return server


def _login(uri: str) -> tuple[str, str] | None:
    if without_password(uri) == uri:
        return None
    user, _, password = urlsplit(uri).netloc.rpartition("@")[0].partition(":")
    return unquote(user), unquote(password)
