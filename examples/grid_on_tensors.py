"""A grid of two settings on images that are made in Python; it works in a notebook too.

Its report has a heat map of the grid. On files or a dataset with a name, the command is
python -m studies.sweep --axis learning_rate=1e-3,1e-2 --axis kl_weight=0.01,0.1,1
"""

import torch

from harness import Dataset
from studies import run
from studies.sweep import sweep

SIDE = 8


def waves(count: int) -> Dataset:
    """Return images of plane waves; a wave has a direction and a phase, its two factors."""
    direction, phase = 2 * torch.pi * torch.rand(2, count, 1, 1, generator=torch.manual_seed(0))
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    along = x * direction.cos() + y * direction.sin()
    return Dataset.from_tensors("waves", (along + phase).sin() / 2 + 0.5)


STUDY = sweep({"learning_rate": (1e-3, 1e-2), "kl_weight": (0.01, 0.1, 1.0)})

if __name__ == "__main__":
    outcome = run(STUDY, data=waves(2_000), epochs=20)
    grid = outcome.table.pivot(index="learning_rate", columns="kl_weight", values="neg_elbo")
    print(grid.round(1))
