"""Runs kept in MLflow: stores, runs being written, the spool of a server that is away.

This package holds the only imports of mlflow. Names load on first use, so that addresses can be
checked without importing MLflow or PyTorch.
"""

import importlib as _importlib

_SOURCES = {
    "Store": "store",
    "connect": "store",
    "load_run": "models",
    "train_and_evaluate": "record",
}
__all__ = sorted(_SOURCES)


def __getattr__(name: str) -> object:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(f"{__name__}.{_SOURCES[name]}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return list(__all__)
