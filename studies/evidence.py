"""What a ledger's claims are measured on: finished runs, their batches, and the data itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

import harness
from analysis import frames
from harness.config import RunConfig
from studies.question import Trained

if TYPE_CHECKING:
    import pandas as pd

    from harness.data.dataset import Dataset, Split
    from harness.linear.pca import PCA
    from harness.linear.vae import LinearOptimum
    from harness.metrics.evaluate import BatchLosses
    from harness.tracking import Store
    from studies.runs import Runs

Record = dict[str, Any]
"""A run as `tracking.read_runs` gives it."""


@dataclass(frozen=True)
class Evidence:
    """Finished runs of a ledger on one dataset.

    Attributes:
        data: the dataset.
        store: where the runs are.
        records: the finished runs, found by their settings.
        lost: those that diverged, and would do so again.
    """

    data: Dataset
    store: Store = field(repr=False)
    records: Sequence[Record] = field(repr=False)
    lost: Sequence[Record] = field(default=(), repr=False)
    _batches: dict[Runs, BatchLosses] = field(default_factory=dict, repr=False)
    _frames: dict[Runs, pd.DataFrame] = field(default_factory=dict, repr=False)

    @cached_property
    def official(self) -> PCA:
        """Principal components of the official training images, validation images included."""
        from harness.data.dataset import with_official_training  # loads torch
        from harness.linear.pca import pca

        return pca(with_official_training(self.data))

    def official_optimum(
        self, latent_size: int, decoder_variance: float, split: Split | None = None
    ) -> LinearOptimum:
        """Return the exact linear VAE of the official training images, measured on them or a split.

        See `harness.linear.vae.LinearOptimum`.
        """
        from harness.linear.vae import LinearOptimum  # loads torch

        return LinearOptimum(self.official, latent_size, decoder_variance, split)

    @cached_property
    def _by_settings(self) -> dict[tuple[str, ...], Record]:
        """Settings and dataset -> the run that finished first."""
        found: dict[tuple[str, ...], Record] = {}
        for record in self.records:
            found.setdefault(_read_settings(record["params"]), record)
        return found

    @cached_property
    def _diverged(self) -> set[tuple[str, ...]]:
        return {_read_settings(record["params"]) for record in self.lost}

    def find(self, config: RunConfig) -> Record | None:
        """Return the finished run of a configuration on these very images, None without one."""
        return self._by_settings.get(_settings(config, self.data.digest))

    def unfinished(self, runs: Runs) -> list[RunConfig]:
        """Return the configurations that have no finished run."""
        return [config for config in runs.configs if self.find(config) is None]

    def untrained(self, runs: Runs) -> list[RunConfig]:
        """Return the configurations that have neither finished nor diverged."""
        digest = self.data.digest
        left = self.unfinished(runs)
        return [config for config in left if _settings(config, digest) not in self._diverged]

    def missing(self, needs: Sequence[Runs]) -> str:
        """Say why a claim cannot be measured; "" if it can."""
        for runs in needs:
            if self.untrained(runs):
                return "needs --full on a GPU"
            if self.unfinished(runs):
                return f"{runs.label!r} diverged"
        return ""

    def frame(self, runs: Runs) -> pd.DataFrame:
        """Return some runs as a tidy frame, a row a seed, test metrics under their plain names."""
        if runs not in self._frames:
            found = (self.find(config) for config in runs.configs)
            self._frames[runs] = frames.tidy([record for record in found if record is not None])
        return self._frames[runs]

    def mean(self, runs: Runs, metric: str) -> float:
        """Return the mean of a metric over seeds."""
        return float(self.frame(runs)[metric].mean())

    def gain(self, runs: Runs, other: Runs, metric: str = "neg_elbo") -> float:
        """Return by how much a metric is lower than in other runs, mean of differences by seed."""
        return frames.paired_difference(self.frame(other), self.frame(runs), metric).mean

    def trained(self, runs: Runs) -> list[Trained]:
        """Load the trained runs, one per seed."""
        loaded = (harness.load_run(run, self.store.uri) for run in self.frame(runs)["run_id"])
        return [Trained(run.config, run.model) for run in loaded]

    def batches(self, runs: Runs) -> BatchLosses:
        """Return loss and KL term of every training batch, weights as at the end of training.

        Both have the shape (seeds, steps).
        """
        if runs not in self._batches:
            from harness.metrics.evaluate import BatchLosses, batch_losses  # loads torch

            each = [batch_losses(*run, self.data) for run in self.trained(runs)]
            loss, kl_term = map(np.stack, zip(*each, strict=True))
            self._batches[runs] = BatchLosses(loss, kl_term)
        return self._batches[runs]

    def neg_log_likelihoods(self, runs: Runs, samples: int) -> list[float]:
        """Return each seed's negative log-likelihood of 1,000 test images, nats / image."""
        from harness.metrics.likelihood import likelihood_metrics  # loads torch

        binary = self.data.binarized(runs.config.binarization)
        found = [likelihood_metrics(*run, binary, (samples,)) for run in self.trained(runs)]
        return [metrics["neg_log_likelihood"] for metrics in found]

    def losses(self, runs: Runs) -> list[float]:
        """Return each seed's loss on the whole training split."""
        return [float(loss) for loss in self.batches(runs).loss.mean(1)]

    def gaps_to_linear(self, runs: Runs) -> list[float]:
        """Return by how many % each seed's loss is below the exact linear model's (`losses`)."""
        from harness.linear.pca import pca
        from harness.linear.vae import LinearOptimum

        variance = harness.objective.decoder_variance(runs.config, self.data.pixels)
        linear = LinearOptimum(pca(self.data), runs.config.latent_size, variance).loss
        return [100 * (linear - loss) / linear for loss in self.losses(runs)]


def _settings(config: RunConfig, digest: str) -> tuple[str, ...]:
    return (*(str(value) for value in asdict(config).values()), digest)


def _read_settings(params: Mapping[str, str]) -> tuple[str, ...]:
    """Read the settings of a run; those that its version of the harness lacked are defaults."""
    defaults = asdict(RunConfig()).items()
    settings = (params.get(name, str(value)) for name, value in defaults)
    return (*settings, params.get("dataset_digest", ""))
