"""A plain training loop of one run that a careful user would write: data in memory, autograd.

The blog's network and loss with images as one float tensor, batches cut out of a permutation, and
PyTorch's fused Adam: what is left of the harness's gain once DataLoader and ToTensor are gone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import blog


def rounds(images: Tensor) -> Iterator[int]:
    """Train for ever; yield the images seen after each pass.

    Args:
        images: uint8, shape (N, D), on the device where it trains.
    """
    pixels = images.float() / 255
    model = blog.BlogVAE().to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=blog.LEARNING_RATE, fused=True)
    steps = len(pixels) // blog.BATCH
    while True:
        order = torch.randperm(len(pixels), device=images.device)[: steps * blog.BATCH]
        batches = ((pixels[rows], rows) for rows in order.split(blog.BATCH))
        yield blog.train(model, optimizer, batches)
