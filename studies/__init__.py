"""Studies: one page each, run as `python -m studies.NAME`; the public names are in `__init__.pyi`.

Names load on first use, so that a command line can show its help without importing PyTorch.
"""

import sys

import lazy_loader

from studies.runner import stopping

if sys.argv[:1] == ["-m"]:  # Python's, while it looks for the page
    stopping.end_at_once()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
