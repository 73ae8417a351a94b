"""Which learning rate trains best in the epochs that it is given?"""

from functools import partial

import pandas as pd

from analysis import plots
from harness import RunConfig
from studies import Axis, Study, main

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Default values; `--values` replaces them."""


def best_rate(frame: pd.DataFrame) -> str:
    """Return which rate is best on validation data, and the cost of those that are worse."""
    from analysis.comparisons import rank  # here, so that --help does not wait for it

    ranking = rank(frame, "learning_rate")
    means = frame.groupby("learning_rate")["neg_elbo"].mean()
    lowest = f"learning_rate = {ranking.best:g} has the lowest validation neg_elbo of {len(means)}."
    costs = [f"{r:g} costs {means[r] - means[ranking.best]:.3g}" for r in ranking.worse]
    return f"{lowest} Worse, in nats / image of test neg_elbo: {', '.join(costs) or 'none'}."


STUDY = Study(
    name="learning_rate",
    question=__doc__,
    base=RunConfig(kl_weight=0.02),
    axis=Axis("learning_rate", RATES),
    figures={
        "metrics_along_axis": (
            partial(plots.metrics_along_axis, axis="learning_rate"),
            "Test metrics against the learning rate; dashed, the exact linear model.",
        ),
    },
    answer=best_rate,
)

if __name__ == "__main__":
    main(STUDY)
