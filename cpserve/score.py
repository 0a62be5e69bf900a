"""Diffusion-classifier scores: which prompt explains a picture's noise best (Li et al., ICCV 2023).

`error[i] = E_{t,eps} || eps - eps_theta(x_t, t, c_i) ||^2`, summed over elements, with the same (t, eps) for every label; the
scores are `softmax(-error / tau)`. One implementation for training (with gradients) and for `classify`.
Shapes: `x0 [B,4,h,w]`, labels along the last axis: `errors [B,N]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cpserve.schedule import Schedule

DenoiseSlots = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Draw:
    """A (t, eps) a row, or one for all rows: `t [B or 1]` float32, `noise [B or 1,4,h,w]`."""

    t: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> Draw:
        """The same numbers on `device`."""
        return Draw(self.t.to(device), self.noise.to(device))


def draws(seed: int, pairs: int, shape: tuple[int, ...], low: float, high: float) -> Draw:
    """`2 * pairs` draws for pictures of `shape [4,h,w]`, in pairs of one timestep and opposite noise.

    Timesteps are spread over `[low, high)` in van der Corput's order, so that any first few of them are, too.
    """
    generator = torch.Generator().manual_seed(seed)
    shift = float(torch.rand(1, generator=generator))
    within = torch.tensor([(_radical_inverse(i) + shift) % 1 for i in range(pairs)])
    noise = torch.randn(pairs, *shape, generator=generator)
    t = (low + (high - low) * within).floor().repeat_interleave(2)
    return Draw(t, torch.stack([noise, -noise], dim=1).flatten(0, 1))


def _radical_inverse(i: int) -> float:
    """Van der Corput's sequence: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    value, digit = 0.0, 0.5
    while i:
        value, digit, i = value + digit * (i & 1), digit / 2, i >> 1
    return value


def error_maps(denoise: DenoiseSlots, schedule: Schedule, x0: Tensor, draw: Draw, slot: Tensor) -> Tensor:
    """Squared errors `[R,h,w]` of rows `x0 [R,4,h,w]`, each under its own label `slot [R]`, summed over channels."""
    t, noise = draw.t.expand(len(x0)), draw.noise.expand_as(x0)
    return (noise - denoise(schedule.add_noise(x0, noise, t), t, slot)).pow(2).sum(1)


def predictions(denoise: DenoiseSlots, schedule: Schedule, x0: Tensor, draw: Draw, slots: Tensor) -> Tensor:
    """eps `[B,N,4,h,w]` for latents `x0 [B,4,h,w]` under the labels in `slots [N]`, one call for all rows."""
    count, labels = len(x0), len(slots)
    xt = schedule.add_noise(x0, draw.noise, draw.t)
    rows = [x.repeat_interleave(labels, 0) for x in (xt, draw.t.expand(count))]
    eps: Tensor = denoise(rows[0], rows[1], slots.repeat(count)).unflatten(0, (count, labels))
    return eps


def squared(eps: Tensor, draw: Draw) -> Tensor:
    """Squared errors `[B,N]`, summed over elements, of predictions `eps [B,N,4,h,w]`."""
    return (draw.noise.unsqueeze(1) - eps).pow(2).flatten(2).sum(2)


def errors(denoise: DenoiseSlots, schedule: Schedule, x0: Tensor, draw: Draw, slots: Tensor) -> Tensor:
    """Squared errors `[B,N]` of latents `x0 [B,4,h,w]` under the labels in `slots [N]`."""
    return squared(predictions(denoise, schedule, x0, draw, slots), draw)


def log_scores(error: Tensor, tau: float) -> Tensor:
    """`log p(c_i | x)` `[B,N]`: log-softmax of `-error / tau`. Sums to one; the order of labels does not matter."""
    return torch.log_softmax(-error / tau, dim=-1)


def temperature(error: Tensor) -> float:
    """tau from the data: the median absolute gap between two labels' errors, over all pairs and pictures.

    With errors summed over elements a fixed temperature makes scores flat or one-hot. 1 where there is one label.
    """
    if error.shape[-1] < 2:
        return 1.0
    gaps = (error.unsqueeze(-1) - error.unsqueeze(-2)).abs()
    upper = torch.triu(torch.ones(gaps.shape[-2:], dtype=torch.bool, device=error.device), diagonal=1)
    return max(float(gaps[..., upper].median()), 1e-6)
