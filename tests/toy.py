"""A model that is no VAE: the mean image, approached at the learning rate, epoch by epoch."""

from types import SimpleNamespace

import numpy as np
import torch

from harness import EpochRecord


class Mean(torch.nn.Module):
    """Predicts every image by one, which moves towards the mean of the training images."""

    def __init__(self, pixels, shape=(1, 8, 8)):
        super().__init__()
        self.register_buffer("image", pixels)
        self.data_shape, self.largest, self.columns = shape, 16, None


def train_means(configs, data, device, checkpoints=None, threads_per_run=1):
    """Yield the epochs of a training as `harness.train` does."""
    images, val = (part.pixels(slice(None), torch.float32) for part in (data.train, data.val))
    for epoch in range(1, configs[0].epochs + 1):
        models = [Mean(images.mean(0) * (1 - (1 - c.learning_rate) ** epoch)) for c in configs]
        mse = [float((val - model.image).square().mean()) for model in models]
        metrics = {"loss": np.array(mse), "mse": np.array(mse)}
        rows, ones = tuple(range(len(configs))), np.ones(len(configs))
        states = [SimpleNamespace(model=m, model_of=lambda place, m=m: m) for m in models]
        yield EpochRecord(
            *(epoch, 0.1, len(images), metrics, metrics, ones, tuple(configs), rows),
            *((0,) * len(rows), [(state, 0) for state in states]),
        )


def measure(runs, data):
    """Return the final metrics of trained models."""
    parts = {"val/mse": data.val, "test/mse": data.test}
    images = {name: part.pixels(slice(None), torch.float32) for name, part in parts.items()}
    return [
        {name: float((x - run.model.image).square().mean()) for name, x in images.items()}
        for run in runs
    ]


PARTS = {"train": train_means, "measure": measure, "pictured": False}
"""What `harness.tracking.record.record` takes of the core, for a toy."""
