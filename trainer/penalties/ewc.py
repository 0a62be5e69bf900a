"""Elastic weight consolidation: `lambda / 2 sum F (theta - theta*)^2` (Kirkpatrick et al. 2017; online: Schwarz et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Anchor:
    """The quadratic penalty around `theta` with Fisher information `fisher`, both by parameter name."""

    theta: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    weight: float

    def term(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The penalty, a scalar."""
        parts = [(self.fisher[n] * (parameters[n] - self.theta[n]).pow(2)).sum() for n in self.fisher]
        return self.weight / 2 * torch.stack(parts).sum()


def fisher_information(
    parameters: Mapping[str, Tensor], loss: Callable[[int], Tensor], draws: int
) -> dict[str, Tensor]:
    """The diagonal Fisher: the mean over `draws` of the squared gradient of `loss(draw)`, squared per draw."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for draw in range(draws):
        gradients = torch.autograd.grad(loss(draw), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient.pow(2) / draws
    return total


def decay(old: Mapping[str, Tensor], new: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """`gamma F_old + F_new`."""
    return {name: new[name] + gamma * old[name] if name in old else new[name] for name in new}
