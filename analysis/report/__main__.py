"""Write the report of a study from its summary in MLflow."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from analysis.report.page import build
from analysis.report.summary import fetch
from harness.config import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all options")


def main(args: Sequence[str] | None = None) -> None:
    """Write a report from the command line; bad input ends it with one line and exit code 2."""
    parser = _Parser(prog="python -m analysis.report", description="Write a study's report.")
    parser.add_argument("study", metavar="STUDY", help="such as kl_weight")
    parser.add_argument("--dataset", default="digits", help="the one it ran on (digits)")
    parser.add_argument("--study-name", metavar="NAME", help="its name (STUDY-DATASET)")
    parser.add_argument("--tracking-uri", metavar="URI", help="the MLflow store of its runs")
    try:
        given = parser.parse_args(args)
        name = given.study_name or f"{given.study}-{given.dataset}"
        print(build(fetch(given.study, given.dataset, name, given.tracking_uri)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
