"""Samplers as free functions of `(denoise, z, ...)`. Each row has its own timestep; one seed a picture.

`denoise(z [B,4,h,w], t [B]) -> eps [B,4,h,w]`. Timestep spacing is diffusers' own, read off the base's scheduler
configuration, so that the same number of steps means the same timesteps everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cpserve.errors import EngineError
from cpserve.schedule import Schedule

LEAST_START = 0.85  # of the schedule: pure noise is not what a later timestep looks like
Denoise = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]


def starting_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """`[B,4,h,w]`, a generator a picture: picture 7 is the same whatever the batch, the neighbours or the machine."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guided(
    denoise_slots: Callable[[Tensor, Tensor, Tensor], Tensor], slots: Tensor, empty: Tensor, guidance: float
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022): `eps = eps_empty + guidance (eps_prompt - eps_empty)`, one call for both.

    `denoise_slots(z, t, slot)`; `slots`, `empty [B]` are the prompts' and the negative prompts' slots.
    """
    if guidance == 1.0:
        return lambda z, t: denoise_slots(z, t, slots)
    both = torch.cat([slots, empty])

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = denoise_slots(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return denoise


def _diffusers(name: str, schedule: Schedule, steps: int) -> Any:
    import diffusers

    scheduler = getattr(diffusers, name).from_config(schedule.config)
    scheduler.set_timesteps(steps)
    first = int(scheduler.timesteps[0])
    if steps > schedule.steps // 8 and not LEAST_START * schedule.steps <= first < schedule.steps:
        raise EngineError(
            f"{steps} steps cannot be cut out of a schedule of {schedule.steps}: the first would be {first}",
            hint=f"use at most {schedule.steps // 8} steps",
        )
    return scheduler


@torch.no_grad()
def ddim(denoise: Denoise, z: Tensor, schedule: Schedule, steps: int, progress: Progress | None = None) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with sigma = 0)."""
    scheduler = _diffusers("DDIMScheduler", schedule, steps)
    stride = schedule.steps // steps
    for i, t in enumerate(scheduler.timesteps.tolist()):
        rows = torch.full((len(z),), float(t))
        eps = denoise(z, rows)
        x0 = schedule.x0(eps, z, rows)
        before = t - stride
        abar = schedule.abar[before] if before >= 0 else scheduler.final_alpha_cumprod
        z = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
        if progress:
            progress(i + 1, steps)
    return z


@torch.no_grad()
def dpm_solver(denoise: Denoise, z: Tensor, schedule: Schedule, steps: int, progress: Progress | None = None) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order in the log signal-to-noise ratio, first order at the ends."""
    scheduler = _diffusers("DPMSolverMultistepScheduler", schedule, steps)
    # sigmas are in the variance-exploding convention, sigma / alpha; the last one is zero, where the picture is clean
    ratio = scheduler.sigmas.to(torch.float64)
    alpha = 1 / (ratio**2 + 1).sqrt()
    sigma = ratio * alpha
    log_snr = alpha.log() - sigma.log()
    earlier: Tensor | None = None
    for i, t in enumerate(scheduler.timesteps.tolist()):
        rows = torch.full((len(z),), float(t))
        x0 = schedule.x0(denoise(z, rows), z, rows)
        h = log_snr[i + 1] - log_snr[i]
        direction = x0
        if earlier is not None and i + 1 < steps:
            r = (log_snr[i] - log_snr[i - 1]) / h
            direction = x0 + (x0 - earlier) * (0.5 / r).float()
        z = (sigma[i + 1] / sigma[i]).float() * z - (alpha[i + 1] * torch.expm1(-h)).float() * direction
        earlier = x0
        if progress:
            progress(i + 1, steps)
    return z


SAMPLERS: dict[str, Callable[..., Tensor]] = {"dpm": dpm_solver, "ddim": ddim}
