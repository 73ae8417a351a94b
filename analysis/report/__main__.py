"""Write the report of a study again, from its summary in MLflow."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from analysis.report.page import build
from harness.config import UserError, checked_name
from harness.tracking.addresses import reason, without_password


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all options")


def main(args: Sequence[str] | None = None) -> None:
    """Write a report from the command line; bad input ends it with one line and exit code 2."""
    parser = _Parser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument("study", metavar="STUDY", help="such as kl_weight")
    parser.add_argument("--dataset", default="digits", help="the one it ran on (digits)")
    parser.add_argument("--study-name", metavar="NAME", help="its name (STUDY-DATASET)")
    parser.add_argument("--tracking-uri", metavar="URI", help="the MLflow store of its runs")
    try:
        print(build(_fetch(**vars(parser.parse_args(args)))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _fetch(study: str, dataset: str, study_name: str | None, tracking_uri: str | None) -> Path:
    """Download the summary folder of a study into the `reports` folder of its store."""
    experiment = checked_name(f"{study}-{dataset}")
    name = checked_name(study_name or experiment)

    from harness.tracking import connect  # MLflow, which --help does not wait for

    store = connect(tracking_uri)
    runs = store.runs(experiment, study=name, role="summary")
    finished = [run.run_id for run in runs if run.status == "FINISHED"]
    if not finished:
        missing = f"{without_password(store.uri)} has no finished summary of {name!r}"
        raise UserError(f"{missing}; first run python -m studies.{study} with these options")
    folder, run = store.home / "reports" / name, finished[-1]
    with tempfile.TemporaryDirectory() as fresh:
        try:
            store.client.download_artifacts(run, "", fresh)
        except Exception as error:  # of any store: the file system's, a server's, MLflow's
            raise UserError(f"summary run {run} cannot be downloaded ({reason(error)})") from error
        if not Path(fresh, "summary.json").is_file():
            raise UserError(f"run {run} holds no summary.json; run the study with --fresh")
        shutil.copytree(fresh, folder, dirs_exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
