"""Runs kept in MLflow: stores, runs being written, the spool of a server that is away.

This package holds the only imports of mlflow. Names load on first use, so that addresses can be
checked without importing MLflow or PyTorch.
"""

import importlib as _importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.config import RunConfig

if TYPE_CHECKING:
    from harness.tracking.models import load_run as load_run
    from harness.tracking.record import train_and_evaluate as train_and_evaluate
    from harness.tracking.store import Store as Store
    from harness.tracking.store import connect as connect

_SOURCES = {
    "Store": "store",
    "connect": "store",
    "load_run": "models",
    "train_and_evaluate": "record",
}
__all__ = sorted([*_SOURCES, "End", "Planned"])


class Planned(NamedTuple):
    """A run to be trained.

    Attributes:
        config: its settings.
        key: what identifies it wherever it is recorded.
        name: its name in the run table.
        params: parameters; `record` adds settings, dataset, device and width of the stack.
        tags: tags; `record` adds the provenance.
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


def __getattr__(name: str) -> object:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(f"{__name__}.{_SOURCES[name]}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return list(__all__)
