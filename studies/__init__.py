"""Studies: one page each, run as `python -m studies.NAME`; the public names are in `__init__.pyi`.

Names load on first use, so that a command line can show its help without importing PyTorch.
"""

import sys

from studies.runner import stopping

if sys.argv[:1] == ["-m"]:  # as Python has it while it looks for the page
    stopping.end_at_once()

import lazy_loader  # noqa: E402 - after the handlers

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
