"""Which KL weight is calibrated, and what does each weight cost in reconstruction?"""

from analysis import plots
from harness.config import RunConfig
from studies import answers
from studies.cli import main
from studies.study import Axis, Study

WEIGHTS = (0.0, *(10 ** (i / 3 - 3) for i in range(13)))
"""0 and 13 weights, three a decade, from 0.001 to 10; the blog's weight 1 is among them."""

STUDY = Study(
    name="kl_weight",
    question=__doc__,
    base=RunConfig(),
    axis=Axis("kl_weight", WEIGHTS),
    figures=(plots.metrics_along_axis, plots.rate_distortion),
    answer=answers.best_weight,
)

if __name__ == "__main__":
    main(STUDY)
