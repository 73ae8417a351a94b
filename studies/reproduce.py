"""Which reference numbers does the harness reproduce?

A ledger of obtained against reference on MNIST: the exact linear models, the linear VAE trained,
the blog's recipe and the two numbers that it prints, and the effect of a linear head and of a
smaller KL weight. Ends with exit code 1 if a claim fails.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import harness
from analysis import frames
from studies.ledger import references
from studies.ledger.references import FAIL, NOT_RUN, PASS, Ledger, required
from studies.runner.cli import clear_errors, execute_plan, read, start
from studies.runner.options import ELSEWHERE, Places, arguments, start_words
from studies.runner.proposers import Cell, Listed, repeated
from studies.runner.study import KNOWN, Plan

if TYPE_CHECKING:
    import pandas as pd

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
    ledger: Ledger, form: references.Form, data: Dataset, device: str, options: ReproduceOptions
) -> Plan:
    """Return the plan of a ledger: a trial for each configuration and seed that it needs."""
    wanted = required(ledger, gpu=form.full and device == "cuda")
    cells = list[Cell]()
    for runs in wanted:
        cells += repeated(runs.label, {"label": runs.label}, runs.config, range(runs.seeds), {})
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
        start=start_words(NAME),
        words=shlex.join(["python", *start_words(NAME), *arguments(options, ELSEWHERE)]),
        sentence="\n".join([*each, total] if options.dry_run else [total]),
        summary_key=hashlib.sha256(repr((ledger, configs)).encode()).hexdigest()[:16],
    )


def find(ended: Ended, ledger: Ledger, form: references.Form) -> Findings:
    """Judge every claim on the runs that ended."""
    # they load MLflow and PyTorch, which --help does not need
    from harness.tracking import load_run
    from studies.ledger.evidence import Evidence
    from studies.runner.summary import Findings

    load = partial(load_run, tracking_uri=ended.store.uri)
    evidence = Evidence(ended.data, ended.runs, load)
    rows = evidence.judge(ledger)
    tables = {}
    for i, heading in enumerate(ledger, 1):
        part = rows[rows["heading"] == heading].drop(columns="heading")
        # a source or reason that is the same in every row is the caption
        same = [name for name in part.columns[5:] if part[name].nunique() == 1]
        words = [f"{heading}.", *(f"{n.capitalize()}: {part[n].iloc[0]}." for n in same)]
        tables[f"ledger-{i}"] = part.drop(columns=same), " ".join(words)
    frame = frames.tidy(ended.finished)
    pictured = (form.blog, form.gaussian(1.0), form.gaussian(0.05), form.gaussian(0.05, 20))
    shown = [runs for runs in pictured if not evidence.missing((runs,))]
    return Findings(
        table=rows.iloc[:, 1:6],
        answer=partial(answer, rows, evidence, form),
        frame=frame,
        tables=tables,
        figures={},
        models={runs.label: evidence.found(runs)[0].run_id for runs in shown},
        best=frame.loc[frame["val/neg_elbo"].idxmin()],
        shown={f"claims/{verdict.replace(' ', '_')}": n for verdict, n in count(rows).items()},
        settings={"dataset": ended.data.name, "full": form.full},
    )


def count(rows: pd.DataFrame) -> dict[str, int]:
    """Count the claims of each verdict; one that was not run has the reason after it."""
    return {v: int(rows["verdict"].str.startswith(v).sum()) for v in (PASS, FAIL, NOT_RUN)}


def answer(rows: pd.DataFrame, evidence: Evidence, form: references.Form) -> str:
    """Return the claims that fail, and the quality of the blog's recipe."""
    counts, lost = count(rows), rows[rows["verdict"] == FAIL]
    failed = [f"{r.claim} ({r.obtained}, reference {r.reference})" for r in lost.itertuples()]
    sentences = (
        f"Of {len(rows)} claims {counts[PASS]} pass, {counts[FAIL]} fail, {counts[NOT_RUN]} were "
        f"not run. Failed: {'; '.join(failed) or 'none'}."
    )
    if evidence.missing((form.blog,)):
        return sentences
    gaps = evidence.gaps_to_linear(form.blog)
    return (
        f"{sentences}\n\nThe blog's recipe, {form.blog_epochs} epochs, keeps "
        f"{evidence.mean(form.blog, 'active_units'):.1f} of its {form.blog.config.latent_size} "
        f"latents active, and its training loss is {fmean(gaps):.1f} ± "
        f"{frames.half_width(gaps):.1f} % below the exact linear model's ({len(gaps)} seeds)."
    )


def main(args: Sequence[str] | None = None) -> None:
    """Check the ledger from the command line.

    Exit code 1 if a claim fails, otherwise those of every study; 0 also where claims were not run.
    """
    with clear_errors(args) as terminal:
        options = read(ReproduceOptions, NAME, __doc__ or "", args)
        options.named(NAME)  # raises for what cannot be used
        device = start(options, __doc__ or "", "mnist", terminal)
        data = harness.load_dataset("mnist", options.data_dir)
        form = references.FULL if options.full else references.SHORT
        plan = make_plan(references.claims(form), form, data, device, options)
        outcome = execute_plan(plan, data, options, terminal)
        sys.exit(int(outcome is not None and outcome.table["verdict"].eq(FAIL).any()))


if __name__ == "__main__":
    main()
