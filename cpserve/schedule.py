"""The noise schedule, and the one border where parametrisations (noise, v, x0) turn into each other.

Everything outside this module speaks of `eps`, the noise. A row of a batch has its own timestep.
Shapes: `x0, noise, xt, output [B,4,h,w]`, `t [B]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpserve.errors import BaseModelError

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True, eq=False)
class Schedule:
    """`abar [T]` float32, the cumulative signal share of DDPM (Ho et al. 2020, eq. 4), and what the UNet predicts."""

    abar: Tensor
    prediction: str
    config: dict[str, Any]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        """From a diffusers scheduler configuration.

        Raises:
            BaseModelError: the UNet predicts something other than the noise or v, or the last step leaves no signal.
        """
        from diffusers import DDPMScheduler

        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise BaseModelError(
                f"the base model predicts {prediction!r}",
                hint=f"use a base that predicts one of {', '.join(PREDICTIONS)}",
            )
        abar = DDPMScheduler.from_config(config).alphas_cumprod.float()
        if abar[-1] < 1e-6:
            raise BaseModelError(
                "the base model's schedule ends with no signal left (zero terminal SNR)",
                hint="use a base trained on Stable Diffusion's ordinary schedule",
            )
        return cls(abar, prediction, dict(config))

    @property
    def steps(self) -> int:
        """How many training timesteps there are: `t` lies in `[0, steps)`."""
        return len(self.abar)

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`sqrt(abar)` and `sqrt(1 - abar)` of each row, `[B,1,1,1]`; between timesteps as diffusers' Euler sampler has them."""
        abar, low = self.abar.to(t.device), t.long()
        a = abar[low]
        if t.is_floating_point() and (part := t - low).any():
            near, far = (((1 - x) / x).sqrt() for x in (a, abar[(low + 1).clamp(max=len(abar) - 1)]))
            a = 1 / (torch.lerp(near, far, part) ** 2 + 1)
        a = a.view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`xt = sqrt(abar) x0 + sqrt(1 - abar) noise`."""
        alpha, sigma = self._coefficients(t)
        return alpha * x0 + sigma * noise

    def target_power(self, x0: Tensor) -> float:
        """The largest mean square that `target` has for any of `x0 [B,4,h,w]` at any timestep, its noise apart."""
        return 1.0 if self.prediction == "epsilon" else max(1.0, float(x0.pow(2).flatten(1).mean(1).max()))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet is trained to output: the noise, or v (Salimans & Ho 2022, `v = sqrt(abar) eps - sqrt(1-abar) x0`)."""
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self._coefficients(t)
        return alpha * noise - sigma * x0

    def eps(self, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise that the UNet's `output` speaks of."""
        if self.prediction == "epsilon":
            return output
        alpha, sigma = self._coefficients(t)
        return alpha * output + sigma * xt

    def x0(self, eps: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The clean latents that `eps` implies."""
        alpha, sigma = self._coefficients(t)
        return (xt - sigma * eps) / alpha
