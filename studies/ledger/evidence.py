"""Evidence for claims: finished runs, the losses of their batches, and the data themselves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

import numpy as np
import pandas as pd

from analysis import frames
from harness.config import RunConfig
from harness.data.dataset import Dataset, Split, with_official_training
from harness.linear.pca import PCA, pca
from harness.linear.vae import LinearOptimum, gap_to_linear, linear_losses
from harness.metrics.evaluate import BatchLosses, batch_losses
from harness.metrics.likelihood import likelihood_metrics
from harness.models.vae import VAE
from harness.tracking.record import TrackedRun
from harness.tracking.runs import Run
from studies.ledger.references import NOT_RUN, Ledger, Runs


@dataclass(frozen=True)
class Evidence:
    """Runs on one dataset, finished and diverged; `load` reads one with its model by its id."""

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

    def judge(self, ledger: Ledger) -> pd.DataFrame:
        """Measure every claim whose runs have finished; return a row of text for each claim."""
        rows = []
        for heading, claims in ledger.items():
            for claim in claims:
                obtained, verdict = "", f"{NOT_RUN}: {self.missing(claim.needs)}"
                if not self.missing(claim.needs):
                    value = claim.measure(self, *claim.needs)
                    obtained, verdict = claim.write(value), claim.verdict(value)
                row = {"heading": heading, "claim": claim.name, "reference": claim.reference}
                row |= {"obtained": obtained, "tolerance": claim.tolerance, "verdict": verdict}
                rows.append(row | {"source": claim.source, "why this tolerance": claim.reason})
        return pd.DataFrame(rows)

    def found(self, runs: Runs) -> list[Run]:
        """Return the runs of a configuration, in the order of their seeds."""
        found = [run for run in self.runs if run.tags["configuration"] == runs.label]
        ordered = sorted(found, key=lambda run: int(run.params["seed"]))
        return [run for run in ordered if int(run.params["seed"]) < runs.seeds]

    def frame(self, runs: Runs) -> pd.DataFrame:
        """Return runs as a tidy frame, a row a seed, test metrics under their plain names."""
        return frames.tidy(self.found(runs))

    def mean(self, runs: Runs, metric: str) -> float:
        """Return the mean of a metric over seeds."""
        return float(self.frame(runs)[metric].mean())

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

    def gaps_to_linear(self, runs: Runs) -> list[float]:
        """Return the percentage of each seed's loss below the exact linear model's."""
        (linear,) = linear_losses([runs.config], self.data)
        return [gap_to_linear(float(linear), loss) for loss in self.batches(runs).loss.mean(1)]

    def neg_log_likelihood(self, runs: Runs, samples: int) -> float:
        """Return -log p(x) of 1,000 test images, nats / image, mean over seeds."""
        binary = self.data.drawn(runs.config.drawing)
        found = [likelihood_metrics(*run, binary, (samples,)) for run in self.trained(runs)]
        return fmean(metrics["neg_log_likelihood"] for metrics in found)
