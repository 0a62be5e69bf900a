"""Null space: the next concept's update cannot act on the directions that earlier prompts use.

`dW = B A (I - Q Q^T)`, Q an orthonormal basis of the text states of prompts with the tokens known so far and of ordinary ones,
recomputed from text alone. Kin: gradient projection memory (Saha et al. 2021), Adam-NSCL (Wang et al. 2021), AlphaEdit (Fang
et al. 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096  # states at a time, 64 MB of SDXL's


def basis_of(e: Tensor, energy: float) -> Tensor:
    """Q `[d,q]` of the fewest directions of which every row of `e [..,d]`, normalised, keeps all but `energy` of itself.

    Directions are the rows' right singular vectors; rows are taken some at a time, for a big base has many.
    """
    parts = e.flatten(0, -2).split(ROWS)
    r = e.new_zeros(0, e.shape[-1], dtype=torch.float64)
    for part in parts:
        r = torch.linalg.qr(torch.cat([r, _unit(part)]), mode="r").R
    directions = torch.linalg.svd(r, full_matrices=False).Vh
    outside = torch.stack([_outside(_unit(part), directions) for part in parts]).amax(0)
    fewest: Tensor = directions[: int((outside > energy).sum()) + 1].T.float()
    return fewest


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=-1)


def _outside(rows: Tensor, directions: Tensor) -> Tensor:
    """`[q]`: the largest share of a row that the first directions, one, two and so on, leave out."""
    kept = (rows @ directions.T).pow(2).cumsum(1)
    return (rows.pow(2).sum(1, keepdim=True) - kept).amax(0)


def largest_change(before: Tensor, after: Tensor) -> float:
    """The largest relative change of packed K,V `[P,S,W]` over all positions: what forgetting is bounded by."""
    norm = before.norm(dim=-1).clamp_min(1e-12)
    return float(((after - before).norm(dim=-1) / norm).max())
