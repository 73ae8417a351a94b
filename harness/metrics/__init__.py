"""Metrics of trained models, each a function of one run and a split."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.metrics.evaluate import per_image as per_image

__all__ = ["per_image"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from harness.metrics.evaluate import per_image  # loads PyTorch

    return per_image
