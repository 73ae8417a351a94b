"""Every study of a dataset, one after the other, and an index page of their reports."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from harness.config import UserError
from studies import elbo_vs_mse, kl_normalization, kl_weight, latent_size, search
from studies.runner.cli import clear_errors, execute, parse
from studies.runner.options import Common, Options
from studies.runner.study import make_plan, read_own
from studies.search import SearchOptions

log = logging.getLogger("studies.all")  # `__name__` is "__main__" on the command line

STUDIES = (kl_weight.STUDY, latent_size.STUDY, kl_normalization.STUDY, elbo_vs_mse.STUDY)


def main(args: Sequence[str] | None = None) -> None:
    """Run all studies with the same options, each under its own name."""
    with clear_errors(args) as terminal:
        options = parse("all", __doc__, str, args)
        for name in ("values", "study_name", "latent_size", "kl_normalization"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')}: studies differ in it; leave it out")
        check_plans(options)
        plans = [partial(make_plan, study, options) for study in STUDIES]
        outcomes = [execute(plan, options, terminal) for plan in plans]
        given = search_options(options)
        outcomes.append(execute(partial(search.make_plan, given), given, terminal))
        reports = [outcome.folder / "report.html" for outcome in outcomes if outcome is not None]
        if reports:
            from analysis import report

            folder = reports[0].parents[1]
            terminal.line(f"Index of the reports: {report.index(reports, folder / 'index.html')}")


def check_plans(options: Options[Any]) -> None:
    """Plan everything, so that what one study refuses is said before another has trained."""
    log.info("planning every study")  # the first to need PyTorch waits for it
    own = read_own(options.dataset, options.image_size)
    plans: dict[str, Callable[[], object]] = {
        study.name: partial(make_plan, study, options, own) for study in STUDIES
    }
    plans["search"] = partial(search.make_plan, search_options(options), own)
    for name, plan in plans.items():
        try:
            plan()
        except UserError as error:
            raise UserError(f"studies.{name}: {error}") from None


def search_options(options: Options[Any]) -> SearchOptions:
    """Return the search's options: what every command has, trials and seeds its own."""
    return SearchOptions(**{f.name: getattr(options, f.name) for f in fields(Common)})


if __name__ == "__main__":
    main()
