"""Computations that a GPU records once, as a CUDA graph, and replays without a word of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before one is recorded, which let libraries choose their kernels and make constants."""

Result = TypeVar("Result")


def record(
    function: Callable[[], Result], changed: Sequence[Tensor] = ()
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record a function of tensors that stay where they are.

    Args:
        function: what is recorded. It must neither wait for the GPU nor copy from or to the host.
        changed: tensors that it changes; each call here, for warming up, is undone.

    Returns:
        The graph, and the function's result: tensors that every replay writes anew.
    """
    before = [tensor.clone() for tensor in changed]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
            _put_back(changed, before)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def _put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
