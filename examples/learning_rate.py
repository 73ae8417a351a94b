"""Which learning rate trains best in the epochs that it is given?"""

from functools import partial

import pandas as pd

from analysis import plots
from harness import RunConfig
from studies import Axis, Study, main

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Default values; `--values` replaces them."""


def best_rate(frame: pd.DataFrame) -> str:
    """Return which rate is best on validation data, and the cost of the others."""
    from analysis import frames  # here, so that --help does not wait for MLflow

    best = frames.best_value(frame, "learning_rate")
    runs = dict(list(frame.groupby("learning_rate")))
    sentences = [f"learning_rate = {best:g} has the lowest validation neg_elbo of {len(runs)}."]
    for rate in [rate for rate in runs if rate != best]:
        gap = frames.paired_difference(runs[rate], runs[best], "neg_elbo")
        sentences.append(f"{rate:g} costs {gap} nats / image on the test split.")
    return " ".join(sentences)


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
