"""Make a tracking database that was moved or copied name the artifacts beside it.

`mlflow ui` then shows their pictures. A study's own command does the same before it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.config import UserError
from harness.tracking import addresses
from studies.runner.cli import clear_errors, read


@dataclass(frozen=True)
class RebaseOptions:
    """Options of a rebase.

    Attributes:
        tracking_uri: the database (MLFLOW_TRACKING_URI, or mlflow.db in the repository).
    """

    tracking_uri: str | None = None


def main(args: Sequence[str] | None = None) -> None:
    """Rebase a database from the command line; exit code 0, or 2 for bad input."""
    with clear_errors(args) as terminal:
        options = read(RebaseOptions, "rebase", __doc__ or "", args)
        uri = addresses.tracking_address(options.tracking_uri)
        if addresses.is_new(uri):
            raise UserError(f"{uri} does not exist; name the database with --tracking-uri")
        from harness.tracking.store import connect  # --help answers without MLflow

        terminal.line(connect(uri).rebase() or f"{uri} names the artifacts beside it already")


if __name__ == "__main__":
    main()
