"""What one backward pass tells of every label at once.

A prompt acts on the UNet through its K,V alone. So the error under label l is, to first order about any K,V c,

    error(l) = error(c) + <d error / d c, KV_l - c>

and one gradient, at the mean of all labels' K,V, ranks them all: as long as some two evaluations, however many labels there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpserve.engine import Engine
from cpserve.score import Draw

EVALUATIONS = 2
"""Of the UNet that a slope takes as long as: one forward, and one back to the first K,V (1.9 measured, on the built-in base)."""


class SlopeOfError(nn.Module):
    """The gradient `[B,S,W]` of each row's `||target - output||^2` by its own K,V `[B,S,W]`, through a packed UNet."""

    def __init__(self, unet: Callable[..., Tensor]) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, kv: Tensor, target: Tensor, *added: Tensor) -> Tensor:
        with torch.enable_grad():
            kv = kv.detach().requires_grad_()
            output = self.unet(latents, timestep, kv, torch.arange(len(kv), device=kv.device), *added)
            [slope] = torch.autograd.grad((target - output).float().pow(2).sum(), kv)
        return slope


def slope_of_error(engine: Engine, x0: Tensor, draw: Draw, kv: Tensor) -> Tensor:
    """The gradient `[S,W]` by K,V `[S,W]` of the error `||eps - eps_theta||^2` of latents `x0 [4,h,w]`, summed over all draws."""
    t, noise, schedule = draw.t, draw.noise, engine.spec.schedule
    x0 = x0.expand_as(noise)
    slopes = engine.slope(schedule.add_noise(x0, noise, t), t, kv.expand(len(t), -1, -1), schedule.target(x0, noise, t))
    one = torch.ones(len(t), 1, 1, 1, device=t.device)
    scale = schedule.eps(one, 0 * one, t)  # of eps by the UNet's output
    return (slopes * scale.squeeze(-1) ** 2).sum(0)
