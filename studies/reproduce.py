"""Which reference numbers does the harness reproduce?

A ledger of obtained against reference on MNIST: the exact linear models, the linear VAE trained,
the blog's recipe and the two numbers that it prints, and the effect of a linear head and of a
smaller KL weight. Ends with exit code 1 if a claim fails.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING

import harness
from analysis import frames, plots
from studies.ledger.claims import FAIL, NOT_RUN, PASS, Ledger, Row, count, judge, required
from studies.ledger.trained import (
    BLOG_KL_TERM,
    BLOG_LOSS,
    FULL,
    SHORT,
    Form,
    batch_range,
    claims,
    loss,
)
from studies.runner.answers import judged, worst_class
from studies.runner.cli import clear_errors, execute_plan, read, start
from studies.runner.options import ELSEWHERE, Places, arguments, program
from studies.runner.proposers import Listed, repeated
from studies.runner.study import KNOWN, Plan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.data.dataset import Dataset
    from studies.ledger.evidence import Evidence
    from studies.runner.summary import Ended, Findings

NAME = "reproduce"


@dataclass(frozen=True)
class ReproduceOptions(Places):
    """Options of the ledger's command line.

    Attributes:
        full: 176 epochs and 5 seeds of the blog's recipe, 5 seeds of all else; hours on a CPU.
    """

    full: bool = False


def make_plan(
    ledger: Ledger, form: Form, data: Dataset, device: str, options: ReproduceOptions
) -> Plan:
    """Return the plan of a ledger: a trial for each configuration and seed that it needs."""
    wanted = required(ledger, gpu=form.full and device == "cuda")
    cells = [
        cell
        for runs in wanted
        for cell in repeated(
            runs.label, {"label": runs.label}, runs.config, range(runs.seeds), params={}
        )
    ]
    each = [f"  {runs.label}: {runs.seeds} x {runs.config.epochs} epochs" for runs in wanted]
    total = (
        f"{sum(map(len, ledger.values()))} claims, {'full' if form.full else 'short'} form; "
        f"{len(cells)} runs of {len(wanted)} configurations"
    )
    configs = [cell.config for cell in cells]
    return Plan(
        page=NAME,
        question=__doc__ or "",
        name=options.named(f"{NAME}-{data.name}"),
        source=KNOWN[data.name],
        configs=configs,
        proposer=Listed(cells, {"dataset": data.name, "dataset_digest": data.digest}),
        find=partial(find, ledger=ledger, form=form),
        words=" ".join([program(NAME), *arguments(options, ELSEWHERE)]),
        sentence="\n".join([*each, total] if options.dry_run else [total]),
        summary_key=hashlib.sha256(repr((ledger, configs)).encode()).hexdigest()[:16],
    )


def find(ended: Ended, ledger: Ledger, form: Form) -> Findings:
    """Judge every claim on the runs that ended."""
    # they load MLflow and PyTorch, which --help does not need
    from harness.tracking import load_run
    from studies.ledger.evidence import Evidence
    from studies.runner.summary import Findings

    load = partial(load_run, tracking_uri=ended.store.uri)
    evidence = Evidence(ended.data, ended.runs, load)
    rows = judge(ledger, evidence)
    frame = frames.tidy(ended.finished)
    pictured = (form.blog, form.gaussian(1.0), form.gaussian(0.05), form.gaussian(0.05, 20))
    trained = [runs for runs in pictured if not evidence.missing((runs,))]
    labels = dict.fromkeys(run.tags["configuration"] for run in ended.finished)
    caption = (
        "Loss and KL term of every training batch, weights as at the end of training, a colour a "
        "seed of the blog's recipe; dotted, the central 95 % over all of them. The star is the "
        f"last batch that the blog prints, {BLOG_LOSS} and {BLOG_KL_TERM}."
    )
    figures = {"batches": (partial(batch_figure, evidence, form), caption)}
    return Findings(
        table=ledger_table(rows).iloc[:, :5],
        answer=partial(answer, rows, evidence, form),
        frame=frame,
        tables={
            f"ledger-{i}": captioned(heading, list(part))
            for i, (heading, part) in enumerate(groupby(rows, key=lambda row: row.heading), 1)
        },
        figures=figures if form.blog in trained else {},
        models={runs.label: evidence.found(runs)[0].run_id for runs in trained},
        best=frame.loc[frame["val/neg_elbo"].idxmin()],
        shown={f"claims/{v.replace(' ', '_')}": count(rows, v) for v in (PASS, FAIL, NOT_RUN)},
        settings={"dataset": ended.data.name, "full": form.full, "configurations": list(labels)},
        sections=rows,
    )


def ledger_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Return judged claims as text, a row each."""
    import pandas as pd

    names = ["claim", "reference", "obtained", "tolerance", "verdict", "source"]
    cells = [(*row.cells, row.claim.source, row.claim.reason) for row in rows]
    return pd.DataFrame(cells, columns=[*names, "why this tolerance"])


def captioned(heading: str, rows: Sequence[Row]) -> tuple[pd.DataFrame, str]:
    """Return a heading's table; a source or reason that is the same in every row is its caption."""
    table = ledger_table(rows)
    same = [name for name in table.columns[5:] if table[name].nunique() == 1]
    parts = [f"{heading}.", *(f"{name.capitalize()}: {table[name].iloc[0]}." for name in same)]
    return table.drop(columns=same), " ".join(parts)


def batch_figure(evidence: Evidence, form: Form) -> Figure:
    """Plot the batches of the blog's recipe with the last batch that the blog prints."""
    batches, active = evidence.batches(form.blog), evidence.frame(form.blog)["active_units"]
    labels = [f"seed {seed}, {count:.0f} active" for seed, count in enumerate(active)]
    ranges = [batch_range(evidence, form.blog, name) for name in ("kl_term", "loss")]
    star = float(BLOG_KL_TERM), float(BLOG_LOSS)
    return plots.batch_plane(batches.kl_term, batches.loss, labels, ranges, star)


def answer(rows: Sequence[Row], evidence: Evidence, form: Form) -> str:
    """Return the claims that fail, and the quality of the blog's recipe."""
    counts = (
        f"Of {len(rows)} claims {count(rows, PASS)} pass, {count(rows, FAIL)} fail, "
        f"{count(rows, NOT_RUN)} were not run."
    )
    failed = [
        f"{row.claim.name} ({row.obtained}, reference {row.claim.reference})"
        for row in rows
        if row.verdict == FAIL
    ]
    parts = [f"{counts} Failed: {'; '.join(failed)}." if failed else counts]
    if not evidence.missing((form.blog,)):
        parts += [blogs_recipe(evidence, form), blogs_batch(evidence, form)]
    return "\n\n".join(parts)


def blogs_recipe(evidence: Evidence, form: Form) -> str:
    """Return the active latents of the blog's recipe, and its gap to a linear model."""
    runs, frame = form.blog, evidence.frame(form.blog)
    active = [int(count) for count in frame["active_units"]]
    low, high = min(active), max(active)
    gaps = evidence.gaps_to_linear(runs)
    gap, half = fmean(gaps), frames.half_width(gaps)
    worse = sum(value < 0 for value in gaps)
    verdict = judged(gap, half)
    doubt = " on the evidence of these seeds" if verdict == "no better" else ""
    return (
        f"The blog's recipe, {form.blog_epochs} epochs, keeps "
        f"{low if low == high else f'{low} to {high}'} of its {runs.config.latent_size} latents "
        f"active, {fmean(active):.1f} in the mean of {len(active)} seeds. Its training loss, "
        f"{loss(evidence, runs):.4f}, is {gap:.1f} ± {half:.1f} % below the exact linear model's "
        f"(95 % interval over seeds; {worse} of {len(gaps)} seeds are above it): it does "
        f"{verdict} than a linear model{doubt}. {worst_class(frame)}"
    )


def blogs_batch(evidence: Evidence, form: Form) -> str:
    """Return the position of the blog's last batch in the range of the obtained ones."""
    batches, parts = evidence.batches(form.blog), []
    for words, name, value in (("loss", "loss", BLOG_LOSS), ("KL term", "kl_term", BLOG_KL_TERM)):
        low, high = batch_range(evidence, form.blog, name)
        below = 100 * float((getattr(batches, name) < float(value)).mean())
        where = "inside" if low <= float(value) <= high else "outside"
        parts.append(
            f"{words} {value} is {where} the central 95 % of all batches here, {low:.4f} to "
            f"{high:.4f}: {below:.0f} % are below it"
        )
    return f"The blog's last batch: {'; '.join(parts)}."


def main(args: Sequence[str] | None = None) -> None:
    """Check the ledger from the command line.

    Exit code 1 if a claim fails, otherwise those of every study; 0 also where claims were not run.
    """
    with clear_errors(args) as terminal:
        options = read(ReproduceOptions, NAME, __doc__ or "", args)
        options.named(NAME)  # raises for what cannot be used
        device = start(options, __doc__ or "", "mnist", terminal)
        data = harness.load_dataset("mnist", options.data_dir)
        form = FULL if options.full else SHORT
        plan = make_plan(claims(form), form, data, device, options)
        outcome = execute_plan(plan, data, options, terminal)
        sys.exit(0 if outcome is None else exit_code(outcome.sections))


def exit_code(rows: Sequence[Row]) -> int:
    """Return 1 if a claim fails, else 0."""
    return int(count(rows, FAIL) > 0)


if __name__ == "__main__":
    main()
