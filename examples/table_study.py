"""How many latents do the columns of a table need? Here 30 measurements of breast tumours."""

import sys
from functools import partial
from pathlib import Path

import pandas as pd
from sklearn.datasets import load_breast_cancer

from analysis import frames, plots
from harness import RunConfig
from studies import Axis, Study, main

SIZE = "latent_size"


def kept(runs: pd.DataFrame) -> str:
    """Return the share of the columns' variance, which is 1 each, that reconstructions keep."""
    means = frames.along_axis(runs, SIZE, ["mse"]).set_index(SIZE)["mse"]
    shares = ", ".join(f"{1 - mse:.0%} with {size}" for size, mse in means.items())
    return f"Latents keep {shares}; neg_elbo is lowest with {frames.best_value(runs, SIZE)}."


STUDY = Study(
    name="table_study",
    question=__doc__,
    base=RunConfig(kl_weight=1.0, sigma="optimal", batch_size=32),
    axis=Axis(SIZE, (1, 2, 4, 8)),
    figures={"metrics": (partial(plots.metrics_along_axis, axis=SIZE), "Along the latents.")},
    answer=kept,
)

if __name__ == "__main__":
    file = Path("tumours.csv")  # in its place, a table of yours
    if not file.exists():
        load_breast_cancer(as_frame=True).frame.to_csv(file, index=False)
    main(STUDY, ["--dataset", f"table:{file}", "--label", "target", *sys.argv[1:]])
