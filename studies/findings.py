"""What a search found, which its answer and its figures are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Findings:
    """What a search found, as frames.

    Attributes:
        trials: one row per trial that finished or was pruned (`search_frames.by_trial`), with
            `front`: no other trial beats it in every objective.
        importances: setting, objective, share.
        runs: one row per run, of the search and of the confirmation.
        best: runs of the best configuration with fresh seeds.
        default: runs of the baseline with the same seeds.
        diverged: number of trials that failed.
        best_trial: number of the best trial.
    """

    trials: pd.DataFrame
    importances: pd.DataFrame
    runs: pd.DataFrame
    best: pd.DataFrame
    default: pd.DataFrame
    diverged: int
    best_trial: int
