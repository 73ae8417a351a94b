"""Evidence for claims: finished runs, the losses of their batches, and the data themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import frames
from harness.data.dataset import Dataset, Split, with_official_training
from harness.linear.pca import PCA, pca
from harness.linear.vae import LinearOptimum, gap_to_linear, linear_losses
from harness.metrics.evaluate import BatchLosses, batch_losses
from harness.metrics.likelihood import likelihood_metrics
from studies.ledger.claims import Runs

if TYPE_CHECKING:
    from harness.config import RunConfig
    from harness.models.vae import VAE
    from harness.tracking.record import TrackedRun
    from harness.tracking.runs import Run


@dataclass(frozen=True)
class Evidence:
    """Runs on one dataset.

    Attributes:
        runs: finished and diverged runs, identified by their configuration's label and seed.
        load: run id -> the run with its model.
    """

    data: Dataset
    runs: Sequence[Run] = field(repr=False)
    load: Callable[[str], TrackedRun] = field(repr=False)
    _batches: dict[Runs, BatchLosses] = field(default_factory=dict, repr=False)

    @cached_property
    def official(self) -> PCA:
        """Principal components of the official training images, validation images included."""
        return pca(with_official_training(self.data))

    def official_optimum(
        self, latent_size: int, decoder_variance: float, split: Split | None = None
    ) -> LinearOptimum:
        """Return the exact linear VAE of the official training images, measured on a split."""
        return LinearOptimum(self.official, latent_size, decoder_variance, split)

    def missing(self, needs: Sequence[Runs]) -> str:
        """Return why a claim cannot be measured; "" if it can."""
        for runs in needs:
            found = self.found(runs)
            if any(run.status != "FINISHED" for run in found):
                return f"{runs.label!r} diverged"
            if len(found) < runs.seeds:
                return "needs --full on a GPU" if runs.gpu else f"{runs.label!r} did not finish"
        return ""

    def found(self, runs: Runs) -> list[Run]:
        """Return the runs of a configuration, in the order of their seeds."""
        by_seed = {
            int(run.params["seed"]): run
            for run in self.runs
            if run.tags["configuration"] == runs.label
        }
        return [by_seed[seed] for seed in range(runs.seeds) if seed in by_seed]

    def frame(self, runs: Runs) -> pd.DataFrame:
        """Return runs as a tidy frame, a row a seed, test metrics under their plain names."""
        return frames.tidy(self.found(runs))

    def mean(self, runs: Runs, metric: str) -> float:
        """Return the mean of a metric over seeds."""
        return float(self.frame(runs)[metric].mean())

    def relative_error(self, runs: Runs, label: int) -> float:
        """Return the test mse of a class over the mean of all classes, each the mean over seeds."""
        errors = frames.class_errors(self.frame(runs))
        return float(errors[label] / errors.mean())

    def trained(self, runs: Runs) -> list[tuple[RunConfig, VAE]]:
        """Load the runs of a configuration, one per seed."""
        loaded = [self.load(run.run_id) for run in self.found(runs)]
        return [(run.config, run.model) for run in loaded]

    def batches(self, runs: Runs) -> BatchLosses:
        """Return loss and KL term of every training batch by the final weights, (seeds, steps)."""
        if runs not in self._batches:
            each = [batch_losses(*run, self.data) for run in self.trained(runs)]
            loss, kl_term = map(np.stack, zip(*each, strict=True))
            self._batches[runs] = BatchLosses(loss, kl_term)
        return self._batches[runs]

    def losses(self, runs: Runs) -> list[float]:
        """Return each seed's loss on the whole training split."""
        return [float(loss) for loss in self.batches(runs).loss.mean(1)]

    def gaps_to_linear(self, runs: Runs) -> list[float]:
        """Return the percentage of each seed's loss below the exact linear model's."""
        (linear,) = linear_losses([runs.config], self.data)
        return [gap_to_linear(float(linear), loss) for loss in self.losses(runs)]

    def neg_log_likelihoods(self, runs: Runs, samples: int) -> list[float]:
        """Return each seed's negative log-likelihood of 1,000 test images, nats / image."""
        binary = self.data.binarized(runs.config.binarization)
        found = [likelihood_metrics(*run, binary, (samples,)) for run in self.trained(runs)]
        return [metrics["neg_log_likelihood"] for metrics in found]
