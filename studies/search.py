"""Which configuration has the best ELBO when everything is searched at once?

KL weight, KL normalisation, latent size, learning rate, KL warm-up and its cycles, free bits and
decoder variance together, by Optuna's TPE on validation neg_elbo, or on (rate, mse) with its Pareto
front. The best configuration is trained
again with fresh seeds, since the search's own number for it is the luckiest of many.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import harness
from analysis import search_plots
from harness.config import RunConfig
from studies import conditions
from studies.runner.cli import clear_errors, read, start_pool
from studies.search_options import (
    CONFIRMING,
    Range,
    Search,
    SearchOptions,
    Space,
    make_search_plan,
)
from studies.sources import Source, read_own

if TYPE_CHECKING:
    from studies.runner.terminal import Terminal
    from studies.summary import Outcome

log = logging.getLogger("studies.search")  # `__name__` is "__main__" on the command line


def space(epochs: int) -> Space:
    """Return what is tried.

    The weights hold the best one of every normalisation: near 0.02 for "pixels" of 8 x 8 digits,
    1e-5 for "sum", 1e-6 for "sum" of 28 x 28 images; and 1, where the decoder variance is optimal
    or learned. A first warm-up ends before trials are judged.
    """
    return {
        "kl_weight": Range(1e-7, 1.0, log=True),
        "kl_normalization": ("pixels", "batch", "latent", "sum"),
        "latent_size": Range(2, 64, log=True),
        "learning_rate": Range(1e-4, 1e-2, log=True),
        "kl_warmup_epochs": Range(0, max(1, epochs // 3)),
        "kl_cycles": Range(1, min(3, epochs)),
        "free_bits": Range(0.0, 0.5),
        "sigma": ("fixed", "optimal", "learned"),
    }


def calibrated(base: RunConfig, data: Source) -> RunConfig:
    """Return the default configuration with its calibrated KL weight.

    Where no weight sets the decoder's variance the loss is an exact ELBO at beta 1.
    """
    if conditions.sets_variance(base):
        return conditions.weighted(base, data.calibrated, data)
    return conditions.exact(base, data)


SEARCH = Search(
    name="search",
    question=__doc__,
    base=RunConfig(),
    space=space,
    baseline=calibrated,
    figures={
        "history": (
            lambda found: search_plots.history(found.trials),
            "Validation neg_elbo of each trial in the order asked, and the best so far. A pruned "
            "trial stands at its value when it was stopped.",
        ),
        "parameters": (
            lambda found: search_plots.parameters(found.trials),
            "Validation neg_elbo against each searched setting, and against the decoder variance "
            "that weight, normalisation and latent size mean together.",
        ),
        "importances": (
            lambda found: search_plots.importances(found.importances),
            "Share of the variation of ranks that each setting explains on its own and in company "
            "(fANOVA), over finished trials only.",
        ),
    },
    front={
        "front": (
            lambda found: search_plots.front(found.trials),
            "Rate and mse of all trials on validation data; no trial beats those of the front in "
            "both. Numbers are trials; points close to a numbered one have none.",
        ),
    },
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the search from the command line; bad input ends it with one line and exit code 2."""
    with clear_errors(args) as console:
        execute(read(SearchOptions, SEARCH.name, SEARCH.question, args), console)


def execute(options: SearchOptions, console: Terminal) -> Outcome | None:
    """Run the search and show it; None for a dry run, or where another process shows it.

    Raises:
        UserError: an option, the data or a store cannot be used.
    """
    own = read_own(options.dataset, options.image_size)
    plan = make_search_plan(SEARCH, options, own)
    if not options.dry_run and options.workers == 1:
        start_pool(options.device)

    # After parsing, so that --help and misspelt options answer at once.
    from harness.training import engine
    from studies.runner import estimate
    from studies.searching import run

    console.question(SEARCH.question)
    log.info("loading PyTorch and %s", plan.dataset)
    engine.resolve_device(options.device, options.precision or "float32")
    data = own or harness.load_dataset(options.dataset, options.data_dir)
    engine.check_runs([plan.base], data)
    console.plan(plan.name, plan.dataset, plan.sentence(data.pixels))
    if options.dry_run:
        runs = [plan.base] * (plan.trials * plan.seeds + 2 * CONFIRMING)
        expected = estimate.sentence(
            runs,
            data,
            options.device,
            options.tracking_uri,
            lambda width: plan.at_once(width) * plan.seeds,
        )
        console.estimate(options.tracking_uri, options.storage, expected)
        return None
    outcome = run(plan, data, options, console)
    if outcome is None:
        return None
    console.outcome(outcome.folder.name, outcome, options.tracking_uri)
    return outcome


if __name__ == "__main__":
    main()
