"""IDX, the file format of the MNIST family (LeCun, http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

BYTES = b"\0\0\x08"
"""How a file of unsigned bytes begins; the number of axes follows."""


def read(file: Path) -> Tensor:
    """Read a file of bytes: `BYTES`, the number of axes, their sizes (big-endian), the values.

    Returns:
        uint8, of the shape that the file names.

    Raises:
        ValueError: it is no such file, or not as long as its sizes say.
    """
    content = bytearray(file.read_bytes())
    axes = content[3] if content.startswith(BYTES) and len(content) > 3 else 0
    start = 4 + 4 * axes
    if axes == 0 or len(content) < start:
        raise ValueError(f"{file.name} is not an IDX file of bytes")
    shape = struct.unpack(f">{axes}I", content[4:start])
    values = len(content) - start
    if values != math.prod(shape):
        raise ValueError(f"{file.name} holds {values:,} values, not {' x '.join(map(str, shape))}")
    if not values:
        return torch.zeros(shape, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)
