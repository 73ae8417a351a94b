"""Every study of a dataset, one after the other, and an index page of their reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from harness.config import RunConfig, UserError
from studies import elbo_vs_mse, kl_normalization, kl_weight, latent_size, search
from studies.runner.cli import clear_errors, execute, read
from studies.runner.options import Options, setting_options
from studies.runner.study import make_plan, read_own
from studies.search import SearchOptions

STUDIES = (kl_weight.STUDY, latent_size.STUDY, kl_normalization.STUDY, elbo_vs_mse.STUDY)

DIFFERENT = ("values", "study_name", "kl_weight", "latent_size", "kl_normalization")
"""Options in which the studies differ."""


def main(args: Sequence[str] | None = None) -> None:
    """Run all studies with the same options, each under its default name."""
    with clear_errors(args) as terminal:
        terminal.several = True
        settings = setting_options(RunConfig(), dict.fromkeys(DIFFERENT, "swept by a study"))
        defaults = {"values": "those of each study", "seeds": "those of each study"}
        options = read(Options, "all", __doc__ or "", args, settings, defaults)
        for name in DIFFERENT:
            if name in options.settings or getattr(options, name, None) is not None:
                raise UserError(f"--{name.replace('_', '-')}: studies differ in it; leave it out")
        own = read_own(options)
        shared = {f.name for f in fields(SearchOptions)} - {"seeds"}  # it has its default seeds
        given = SearchOptions(**{k: v for k, v in vars(options).items() if k in shared})
        plans: dict[str, Any] = {
            study.name: partial(make_plan, study, options) for study in STUDIES
        }
        plans[search.NAME] = partial(search.make_plan, given)
        for name, plan in plans.items():  # before one trains, the others are checked
            try:
                plan(own)
            except UserError as error:
                raise UserError(f"studies.{name}: {error}") from None
        outcomes = [execute(plan, given, terminal) for plan in plans.values()]
        reports = [outcome.folder / "report.html" for outcome in outcomes if outcome is not None]
        if reports:
            from analysis import report

            folder = reports[0].parents[1]
            index = report.index(reports, folder / "index.html")
            terminal.document["index"] = str(index)
            terminal.line(f"Index of the reports: {index}")


if __name__ == "__main__":
    main()
