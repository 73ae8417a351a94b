"""Which reference numbers does the harness reproduce?

A ledger of obtained against reference on MNIST: the exact linear models, the linear VAE trained,
the blog's recipe and the two numbers that it prints, and what a linear head and a smaller KL
weight change. Ends with exit code 1 if a claim fails.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from analysis import ledger_plots
from harness.config import checked_name
from studies.answers import worst_class
from studies.claims import FAIL, NOT_RUN, PASS, Reproduction, Row, count
from studies.exact_claims import exact_claims
from studies.forms import FULL, SHORT, Form
from studies.runner.cli import clear_errors, read, start_pool
from studies.runner.options import ReproduceOptions, check_least
from studies.trained_claims import (
    BLOG_KL_TERM,
    BLOG_LOSS,
    batch_range,
    blog_claims,
    head_claims,
    linear_claims,
    loss,
    mean,
    published_claims,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from studies.evidence import Evidence
    from studies.runner.terminal import Terminal

NAME = "reproduce"

log = logging.getLogger("studies.reproduce")  # `__name__` is "__main__" on the command line


def reproduction(form: Form) -> Reproduction:
    """Return the ledger in one of its forms."""
    ledger = {
        "Exact, by linear algebra": exact_claims(),
        "Linear VAE, trained": linear_claims(form),
        "The blog's recipe": blog_claims(form),
        "Linear head, smaller weight": head_claims(form),
        "Published likelihoods": published_claims(form),
    }
    return Reproduction(
        name=NAME,
        full=form is FULL,
        question=__doc__ or "",
        ledger=ledger,
        answer=partial(answer, form=form),
        figures={
            "batches": (
                partial(batch_figure, form=form),
                "Loss and KL term of every training batch, weights as at the end of training, a "
                "colour a seed of the blog's recipe; dotted, the central 95 % over all of them. "
                f"The star is what the blog prints of its last batch, {BLOG_LOSS} and "
                f"{BLOG_KL_TERM}.",
                form.blog,
            )
        },
        pictured=(form.blog, form.gaussian(1.0), form.gaussian(0.05), form.gaussian(0.05, 20)),
    )


def batch_figure(evidence: Evidence, form: Form) -> Figure:
    """Plot the batches of the blog's recipe with the blog's own last batch."""
    batches, active = evidence.batches(form.blog), evidence.frame(form.blog)["active_units"]
    labels = [f"seed {seed}, {count:.0f} active" for seed, count in enumerate(active)]
    ranges = [batch_range(evidence, form.blog, name) for name in ("kl_term", "loss")]
    star = float(BLOG_KL_TERM), float(BLOG_LOSS)
    return ledger_plots.batch_plane(batches.kl_term, batches.loss, labels, ranges, star)


def answer(rows: Sequence[Row], evidence: Evidence, form: Form) -> str:
    """Say what holds and what does not, and what the blog's recipe is worth."""
    said = f"Of {len(rows)} claims {count(rows, PASS)} pass"
    said += f", {count(rows, FAIL)} fail, {count(rows, NOT_RUN)} were not run."
    failed = [
        f"{row.claim.name} ({row.obtained}, reference {row.claim.reference})"
        for row in rows
        if row.verdict == FAIL
    ]
    if failed:
        said += f" Failed: {'; '.join(failed)}."
    parts = [said]
    if not evidence.missing((form.blog,)):
        parts += [worth(evidence, form), blogs_batch(evidence, form)]
    return "\n\n".join(parts)


def worth(evidence: Evidence, form: Form) -> str:
    """Say how many latents the blog's recipe uses, and how it compares with a linear model."""
    from analysis import frames

    runs, frame = form.blog, evidence.frame(form.blog)
    active = sorted(int(count) for count in frame["active_units"])
    gaps = evidence.gaps_to_linear(runs)
    gap, half = mean(gaps), frames.half_width(gaps)
    worse = sum(value < 0 for value in gaps)
    if gap - half > 0:
        verdict = "it does better than a linear model"
    elif gap + half < 0:
        verdict = "it does worse than a linear model"
    else:
        verdict = "it does no better than a linear model, as far as these seeds can tell"
    return (
        f"The blog's recipe, {form.blog_epochs} epochs, keeps {_range(active)} of its "
        f"{runs.config.latent_size} latents active, {mean(active):.1f} in the mean of "
        f"{len(active)} seeds. Its training loss, {loss(evidence, runs):.4f}, is {gap:.1f} ± "
        f"{half:.1f} % below the exact linear model's (95 % interval over seeds; {worse} of "
        f"{len(gaps)} seeds are above it): {verdict}. {worst_class(frame)}"
    )


def blogs_batch(evidence: Evidence, form: Form) -> str:
    """Say where the blog's last batch lies among the batches here."""
    batches = evidence.batches(form.blog)
    said = []
    for words, name, value in (("loss", "loss", BLOG_LOSS), ("KL term", "kl_term", BLOG_KL_TERM)):
        low, high = batch_range(evidence, form.blog, name)
        place = 100 * float((getattr(batches, name) < float(value)).mean())
        where = "inside" if low <= float(value) <= high else "outside"
        said.append(
            f"{words} {value} is {where} the central 95 % of all batches here, {low:.4f} to "
            f"{high:.4f}: {place:.0f} % are below it"
        )
    return f"The blog's last batch: {'; '.join(said)}."


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def main(args: Sequence[str] | None = None) -> None:
    """Check the ledger from the command line.

    Exit code 1 if a claim fails; bad input ends it with one line and exit code 2.
    """
    with clear_errors(args) as console:
        rows = execute(read(ReproduceOptions, NAME, __doc__ or "", args), console)
        sys.exit(exit_code(rows))


def exit_code(rows: Sequence[Row]) -> int:
    """Return 1 if a claim fails, else 0, also where claims were not run."""
    return int(count(rows, FAIL) > 0)


def execute(options: ReproduceOptions, console: Terminal) -> list[Row]:
    """Check the ledger and show it; no rows for a dry run, which trains nothing.

    Raises:
        UserError: an option, the data or a store cannot be used.
    """
    page = reproduction(FULL if options.full else SHORT)
    checked_name(NAME if options.study_name is None else options.study_name)
    check_least("checkpoint_every", options.checkpoint_every, 0)
    if not options.dry_run:
        start_pool(options.device)

    # After parsing, so that --help and misspelt options answer at once.
    import harness
    from harness.training.engine import resolve_device
    from studies.reproducing import run

    console.question(page.question)
    log.info("loading PyTorch and mnist")
    device = resolve_device(options.device).type
    data = harness.load_dataset("mnist", options.data_dir)
    wanted = page.trained_on(device)
    console.out.print(
        f"{sum(map(len, page.ledger.values()))} claims, {'full' if page.full else 'short'} form; "
        f"{sum(runs.seeds for runs in wanted)} runs of {len(wanted)} configurations"
    )
    if options.dry_run:
        for runs in wanted:
            console.out.print(f"  {runs.label}: {runs.seeds} x {runs.config.epochs} epochs")
        return []
    rows, outcome = run(page, data, options, console)
    console.ledger(outcome.folder.name, rows, outcome, options.tracking_uri)
    return rows


if __name__ == "__main__":
    main()
