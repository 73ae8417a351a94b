"""Models of runs, read back from MLflow."""

import tempfile
from dataclasses import dataclass, field

from harness.config import RunConfig
from harness.models.files import load_model
from harness.models.vae import VAE
from harness.tracking.store import connect


@dataclass(frozen=True)
class TrackedRun:
    """A run read back from MLflow; `metrics` are its last logged values."""

    run_id: str
    config: RunConfig
    metrics: dict[str, float]
    model: VAE = field(repr=False)


def load_run(run_id: str, tracking_uri: str | None = None) -> TrackedRun:
    """Rebuild the model of a run from its artifacts, without pickle.

    Args:
        run_id: the run's id in MLflow, or its key.
        tracking_uri: MLflow tracking URI; None means the default store.

    Raises:
        UserError: there is no such run, or its model files are missing or broken.
    """
    store = connect(tracking_uri)
    run = store.run(run_id)
    with tempfile.TemporaryDirectory() as folder:
        config, model = load_model(store.fetch(run.run_id, "model", folder))
    return TrackedRun(run.run_id, config, run.metrics, model)
