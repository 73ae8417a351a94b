"""A dataset drawn from a known distribution."""

import math

import numpy as np
import torch
from scipy.linalg import hadamard

from harness.data.dataset import Dataset, Split

EIGENVALUES = 0.6 ** np.arange(8)
"""Of a Gaussian over 8 pixels, in a unit of 50 grey levels: rounding adds 1 / (12 * 50^2)."""


def gaussian() -> Dataset:
    """Draw images from a Gaussian of known covariance, none of them clipped."""
    normal = np.random.default_rng(0).standard_normal((2960, 8))
    x = 2.5 + normal * np.sqrt(EIGENVALUES) @ hadamard(8).T / math.sqrt(8)
    assert abs(x - 2.5).max() < 2.5
    images = torch.from_numpy(np.rint(50 * x).astype(np.uint8))
    parts = images.split([2560, 200, 200])
    splits = (Split(part, torch.zeros(len(part), dtype=torch.int64), 50) for part in parts)
    return Dataset("gaussian", (1, 2, 4), 1, *splits, "drawn")
