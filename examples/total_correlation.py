"""What does a penalty on the total correlation of the latents cost, and what does it buy?"""

from functools import partial

import pandas as pd

from analysis import frames, plots
from harness import RunConfig
from studies import Axis, Study, main

TERM = "total_correlation"  # a beta-TCVAE with beta * (b - 1) as the weight


def cost(runs: pd.DataFrame) -> str:
    """Return what the term and neg_elbo are at each weight."""
    means = frames.along_axis(runs, TERM, ["neg_elbo", f"term/{TERM}"])
    each = zip(means[TERM], means["neg_elbo"], means[f"term/{TERM}"], strict=True)
    return " ".join(f"Weight {w:g}: neg_elbo {n:.1f}, {TERM} {t:.2f} nats." for w, n, t in each)


STUDY = Study(
    name=TERM,
    question=__doc__,
    base=RunConfig(kl_weight=0.02, batch_size=128),
    axis=Axis(TERM, (0.0, 0.5, 1.0, 2.0, 4.0)),
    figures={"metrics": (partial(plots.metrics_along_axis, axis=TERM), "Along the weight.")},
    answer=cost,
)

if __name__ == "__main__":
    main(STUDY)
