"""Train and evaluate stacks of variational autoencoders; the public names are in `__init__.pyi`.

Names load on first use, so that a command line can show its help without importing PyTorch.
"""

import ast as _ast
import importlib as _importlib
from pathlib import Path as _Path

_stub = _ast.parse(_Path(__file__).with_suffix(".pyi").read_text())
_sources = {  # name -> module that it is in; "" for a module
    alias.name: node.module or ""
    for node in _stub.body
    if isinstance(node, _ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_sources)


def __getattr__(name: str) -> object:
    if name not in _sources:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    source = _sources[name]
    found = _importlib.import_module(f"{__name__}.{source or name}")
    globals()[name] = value = getattr(found, name) if source else found
    return value


def __dir__() -> list[str]:
    return list(__all__)
