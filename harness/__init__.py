"""Train and evaluate variational autoencoders, one or many at a time.

    import harness

    data = harness.load_dataset("digits")
    result = harness.train_and_evaluate(harness.RunConfig(kl_weight=0.1), data)
    result.metrics["neg_elbo"], result.model.sample(3)

Results are returned, and nothing is written; `harness.tracking.train_and_evaluate` takes the name
of an MLflow experiment as well, to which it writes every run. `network` and `term` register your
parts. Names load on first use: a command line can show its help without importing PyTorch.
"""

import ast as _ast
from pathlib import Path as _Path
from pkgutil import resolve_name as _resolve_name

_stub = _ast.parse(_Path(__file__).with_suffix(".pyi").read_text())
_addresses = {  # of a name in a module, or of a module
    alias.name: f"{__name__}{f'.{node.module}:' if node.module else '.'}{alias.name}"
    for node in _stub.body
    if isinstance(node, _ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_addresses)


def __getattr__(name: str) -> object:
    if name not in _addresses:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = _resolve_name(_addresses[name])
    return value


def __dir__() -> list[str]:
    return list(__all__)
