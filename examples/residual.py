"""A network of residual blocks.

python -m studies.kl_weight --model examples/residual.py:residual --model-options width=128
"""

import math

from torch import Tensor, nn

import harness


class Block(nn.Module):
    """A residual block, x + f(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x), of the shape of x."""
        return x + self.f(x)


@harness.network("residual")
def residual(
    data_shape: tuple[int, ...], latent_size: int, *, width: int = 64, depth: int = 2
) -> tuple[nn.Module, nn.Module]:
    """Return an encoder and a decoder with `depth` blocks each."""
    pixels = math.prod(data_shape)
    down, up = ([Block(width) for _ in range(depth)] for _ in range(2))
    inwards = nn.Flatten(), nn.Linear(pixels, width)
    outwards = nn.Linear(width, pixels), nn.Unflatten(1, data_shape)
    encoder = nn.Sequential(*inwards, *down, nn.Linear(width, 2 * latent_size))
    return encoder, nn.Sequential(nn.Linear(latent_size, width), *up, *outwards)
