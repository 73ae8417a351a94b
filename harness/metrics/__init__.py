"""Metrics of trained models, each a function of one run and a split."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from harness.metrics.evaluate import per_image as per_image

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"evaluate": ["per_image"]}
)
