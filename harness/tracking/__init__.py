"""Runs kept in MLflow: stores, runs being written, the spool of a server that is away.

This package holds the only imports of mlflow. Names load on first use, so that addresses can be
checked without importing MLflow or PyTorch.
"""

import os
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import lazy_loader

from harness.config import RunConfig

if TYPE_CHECKING:
    from harness.tracking.record import load_run as load_run
    from harness.tracking.record import train_and_evaluate as train_and_evaluate
    from harness.tracking.store import connect as connect

# MLflow reads some of its settings as it is imported. It sends a request once, with a limit in
# seconds; the store and the spool repeat it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
# As MLflow is imported in a notebook; it shows no bar there.
warnings.filterwarnings("ignore", "IProgress not found")


class Planned(NamedTuple):
    """A run to be trained, with the key that identifies it wherever it is recorded.

    To the parameters, `record` adds settings, dataset, device and width of the stack; to the tags,
    the provenance.
    """

    config: RunConfig
    key: str
    name: str
    params: dict[str, Any]
    tags: dict[str, str]


class End(NamedTuple):
    """Why a run is ended before its last epoch: status FAILED or KILLED, and the reason."""

    status: str
    reason: str
    pruned: bool = False


__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"record": ["load_run", "train_and_evaluate"], "store": ["connect"]},
)
__all__ += ["End", "Planned"]
