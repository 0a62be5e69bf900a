"""Null space: the next concept's update cannot act on the directions that earlier prompts use.

`dW = B A (I - Q Q^T)`, Q an orthonormal basis of the text states of prompts with the tokens known so far, recomputed from
text alone. Kin: gradient projection memory (Saha et al. 2021), Adam-NSCL (Wang et al. 2021), AlphaEdit (Fang et al. 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor


def extend_basis(basis: Tensor, e: Tensor, energy: float) -> Tensor:
    """Q `[d,q]` with the fewest directions added so that every row of `e [R,d]`, normalised, keeps all but `energy` of itself.

    Directions are the right singular vectors of what Q leaves of the rows.
    """
    rows = torch.nn.functional.normalize(e.flatten(0, -2).double(), dim=-1)
    q = basis.double()
    left = rows - rows @ q @ q.T
    if float(left.pow(2).sum(1).max()) <= energy:
        return basis
    directions = torch.linalg.svd(torch.linalg.qr(left, mode="r").R, full_matrices=False).Vh
    kept = (left @ directions.T).pow(2).cumsum(1)
    outside = (left.pow(2).sum(1, keepdim=True) - kept).max(0).values
    count = int((outside > energy).sum()) + 1
    joined = torch.cat([q, directions[:count].T], dim=1)
    orthonormal: Tensor = torch.linalg.qr(joined).Q
    return orthonormal.float()


def largest_change(before: Tensor, after: Tensor) -> float:
    """The largest relative change of packed K,V `[P,S,W]` over all positions: what forgetting is bounded by."""
    norm = before.norm(dim=-1).clamp_min(1e-12)
    return float(((after - before).norm(dim=-1) / norm).max())
