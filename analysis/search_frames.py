"""Frames of a search: every run that ended, and one row per trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lazy_loader

from analysis.frames import tidy

if TYPE_CHECKING:
    import pandas as pd

    from harness.tracking.runs import Run
else:
    pd = lazy_loader.load("pandas")

METRICS = ["val/neg_elbo", "val/mse", "val/rate", "val/active_units", "val/calibration_ratio"]
"""Averaged over a trial's seeds; a pruned trial has its values when it was stopped."""


def load_search(experiment: str, study: str, tracking_uri: str | None = None) -> pd.DataFrame:
    """Load the runs of a search that were finished or pruned, one row each.

    Returns:
        The columns of `frames.load_runs`; `trial` and `part` tell whose run it is, and `pruned`
        whether it was stopped early.
    """
    from harness.tracking import connect  # loads MLflow

    return tidy_search(connect(tracking_uri).runs(experiment, study=study, role="run"))


def tidy_search(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the finished and pruned ones of some runs as `load_search` does."""
    ended = [r for r in runs if r.status == "FINISHED" or r.tags.get("pruned") == "true"]
    return tidy(ended).assign(pruned=[run.status != "FINISHED" for run in ended])


def by_trial(runs: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Average the runs of each trial over its seeds.

    Args:
        runs: frame of `load_search`, runs of the search alone.
        settings: columns of what was searched.

    Returns:
        One row per trial, in the order asked: trial, the settings, decoder_variance, pruned and
        the metrics of METRICS.
    """
    trials = runs.groupby("trial")
    fixed = trials[[*settings, "decoder_variance", "pruned"]].first()
    return fixed.join(trials[METRICS].mean()).reset_index()


def importances(found: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Return shares as a frame: setting, objective, share."""
    rows = [
        {"setting": setting, "objective": objective, "share": share}
        for objective, shares in found.items()
        for setting, share in shares.items()
    ]
    return pd.DataFrame(rows, columns=["setting", "objective", "share"])
