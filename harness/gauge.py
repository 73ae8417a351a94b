"""What is measured of a stack after every epoch: training images and validation images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from harness.capture import record
from harness.data.dataset import Dataset, Split
from harness.evaluate import Metrics, evaluation_noise, measure, to_arrays
from harness.vae import VAE

Arrays = dict[str, np.ndarray]
"""Metric name -> float64 values of shape (S,)."""


class Gauge:
    """Metrics of the live weights of a stack, with noise that is the same at every epoch.

    A GPU records their computation once and replays it.

    Args:
        model: the stack; its weights may change in place between readings.
        data: the dataset as the runs are measured on it.
        linear: loss of the exact linear model at each run's knob, on `first_training_images`
            and validation images, shape (2, S).
    """

    def __init__(self, model: VAE, data: Dataset, linear: Tensor) -> None:
        self._model, self._data, self._linear = model, data, linear
        self._first = first_training_images(data)
        self._noise = {
            "train": evaluation_noise(model, "train", len(self._first)),
            "val": evaluation_noise(model, "val", len(data.val)),
        }
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: tuple[Metrics, Metrics] = ({}, {})

    def read(self) -> tuple[Arrays, Arrays]:
        """Return the metrics on the first training images and on validation, in one transfer."""
        self.capture()
        if self._graph is None:
            train, val = self._metrics()
        else:
            self._graph.replay()
            train, val = self._recorded
        arrays = to_arrays({f"train/{name}": values for name, values in train.items()} | val)
        return {name: arrays.pop(f"train/{name}") for name in train}, arrays

    def capture(self) -> None:
        """Record the computation, on a GPU, unless it is recorded."""
        if self._model.device.type == "cuda" and self._graph is None:
            self._graph, self._recorded = record(self._metrics)

    def _metrics(self) -> tuple[Metrics, Metrics]:
        model, data, classes = self._model, self._data, self._data.classes
        val = measure(model, data.val, self._noise["val"], classes, None, self._linear[1])
        variance = val["mse"]
        return measure(
            model, self._first, self._noise["train"], classes, variance, self._linear[0]
        ), val

    def keep(self, model: VAE, rows: Sequence[int]) -> Gauge:
        """Return the gauge of some of the runs, whose stack is given; what is recorded goes."""
        self._graph, self._recorded = None, ({}, {})
        return Gauge(model, self._data, self._linear[:, list(rows)])


def first_training_images(data: Dataset) -> Split:
    """Return the training images that train metrics are measured on: as many as validation has."""
    return data.train.head(len(data.val))
