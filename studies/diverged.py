"""Runs that diverged, said in the answer and in the table: they are left out, not passed over."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import harness

if TYPE_CHECKING:
    import pandas as pd

    from harness.tracking import Store
    from studies.plan import Plan

Runs = list[dict[str, Any]]


def runs_of(plan: Plan, store: Store) -> Runs:
    """Return the runs of a study that diverged, as `tracking.read_runs` does."""
    failed = f"tags.study = '{plan.name}' and tags.role = 'run' and attributes.status = 'FAILED'"
    runs = harness.tracking.read_runs(store, plan.experiment, failed)
    return [run for run in runs if harness.ledger.has_diverged(run)]


def sentence(runs: Runs) -> str:
    """Name every run that diverged, with epoch and reason."""
    named = "; ".join(f"{run['name']} {run['tags']['reason']}" for run in runs)
    count = "1 run diverged, and its" if len(runs) == 1 else f"{len(runs)} runs diverged, and their"
    return f"{count} values are not ranked: {named}."


def without(frame: pd.DataFrame, runs: Runs) -> pd.DataFrame:
    """Return the runs of points no seed of which diverged; only these are ranked."""
    points = {run["tags"]["configuration"] for run in runs}
    return frame[~frame["name"].str.rpartition(" seed=")[0].isin(points)]


def with_column(table: pd.DataFrame, plan: Plan, runs: Runs) -> pd.DataFrame:
    """Add to a table of points how many seeds of each diverged, and the points that have no other.

    Args:
        table: of `frames.along_axis`.
        plan: the study.
        runs: those that diverged.
    """
    import pandas as pd

    count = Counter(run["tags"]["configuration"] for run in runs)
    points = pd.DataFrame([plan.coordinates(point) for point in plan.configs])
    said = [f"{count[plan.label(point)]} of {plan.seeds}" for point in plan.configs]
    return points.assign(diverged=said).merge(table, on=list(points.columns), how="left")
