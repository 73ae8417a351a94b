"""Train and evaluate variational autoencoders, one or many at a time.

    import harness

    data = harness.load_dataset("digits")
    result = harness.train_and_evaluate(harness.RunConfig(kl_weight=0.1), data)
    result.metrics["neg_elbo"], result.model.sample(3)

Results are returned, and nothing is written; `harness.tracking.train_and_evaluate` takes the name
of an MLflow experiment as well, to which it writes every run. `network`, `likelihood`, `term` and
`metric` register your parts. Names load on first use: a command line can show its help without
importing PyTorch.
"""

import ast as _ast
from importlib import import_module as _import_module
from pathlib import Path as _Path

_stub = _ast.parse(_Path(__file__).with_suffix(".pyi").read_text())
_modules = {  # that names are in; "" for a module
    alias.name: node.module or ""
    for node in _stub.body
    if isinstance(node, _ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_modules)


def __getattr__(name: str) -> object:
    if name not in _modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(f"{__name__}.{_modules[name] or name}")
    globals()[name] = value = getattr(module, name) if _modules[name] else module
    return value


def __dir__() -> list[str]:
    return list(__all__)
