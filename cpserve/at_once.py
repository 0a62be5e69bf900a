"""How much large modules are given at once: their activations take gigabytes, and more than this gains little."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CELLS = 2**15  # of latents for the UNet: eight rows of 64 by 64, 2 GB in float32 at Stable Diffusion 1.5's width
PIXELS = 2**20  # for the autoencoder: four pictures of 512 by 512


def most(cells: int, maps: Tensor) -> int:
    """How many of the maps `[B,C,H,W]` have so many cells; one at least."""
    return max(1, cells // maps[0, 0].numel())


def few(cells: int, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Row-wise tensors in parts, each of one row or of as many as the first one's maps `[B,C,H,W]` have `cells` for."""
    size = most(cells, rows[0])
    return zip(*(each.split(size) for each in rows), strict=True)
