"""Samplers as free functions. Every row has its own timesteps and number of steps, and every picture its own seed.

`denoise(z [B,4,h,w], t [B]) -> eps [B,4,h,w]`. Each sampler here is linear in what it knows, so that a step of any row is

    z' = keep z + add x0 + recall x0_before,    x0 = (z - sigma eps) / alpha

and a sampler is a table of these numbers, a `Course`. `step` takes rows of different courses at once, so that rows may
`join` a running batch and leave it (`take`) between two steps. Timestep spacing is diffusers' own, read off the base's
scheduler configuration: the same number of steps means the same timesteps everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from cpserve.errors import EngineError
from cpserve.schedule import Schedule

LEAST_START = 0.85  # of the schedule: pure noise is not what a later timestep looks like
Denoise = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Course:
    """The way from noise to a picture: `table [N,6]` float32 holds t, alpha, sigma, keep, add, recall of each step.

    The starting noise is multiplied by `start`.
    """

    table: Tensor
    start: float = 1.0

    @classmethod
    def of(cls, t: Tensor, alpha: Tensor, sigma: Tensor, add: Tensor, recall: Tensor, start: float = 1.0) -> Course:
        """From columns `[N]`, with `alpha, sigma [N+1]` reaching to the end of the way."""
        columns = (t, alpha[:-1], sigma[:-1], sigma[1:] / sigma[:-1], add, recall)
        return cls(torch.stack([column.double() for column in columns], dim=1).float(), start)

    def __len__(self) -> int:
        return len(self.table)


@dataclass(frozen=True, eq=False)
class Rows:
    """A running batch: latents and the clean latents that the step before saw, `[B,4,h,w]`; each row's course and steps done."""

    z: Tensor
    before: Tensor
    courses: tuple[Course, ...]
    done: tuple[int, ...]

    @property
    def finished(self) -> tuple[bool, ...]:
        """Which rows have come to the end of their course."""
        return tuple(done == len(course) for course, done in zip(self.courses, self.done, strict=True))


def begin(noise: Tensor, course: Course) -> Rows:
    """Rows `[B,4,h,w]` of noise before their first step."""
    z = noise * course.start
    return Rows(z, torch.zeros_like(z), (course,) * len(z), (0,) * len(z))


def join(*parts: Rows) -> Rows:
    """Rows of several batches as one, in order; they share their picture size."""
    return Rows(
        torch.cat([p.z for p in parts]),
        torch.cat([p.before for p in parts]),
        tuple(course for p in parts for course in p.courses),
        tuple(done for p in parts for done in p.done),
    )


def take(rows: Rows, which: Sequence[int]) -> Rows:
    """Some rows of a batch, in the order given."""
    courses, done = (tuple(of[i] for i in which) for of in (rows.courses, rows.done))
    return Rows(rows.z[list(which)], rows.before[list(which)], courses, done)  # type: ignore[arg-type]


@torch.no_grad()
def step(denoise: Denoise, rows: Rows) -> Rows:
    """One step of every row, each along its own course; `denoise` is called once.

    Raises:
        EngineError: a row is finished.
    """
    if any(rows.finished):
        raise EngineError("a finished row cannot go on", hint="take the others out first: sample.take")
    numbers = torch.stack([course.table[i] for course, i in zip(rows.courses, rows.done, strict=True)]).to(
        rows.z.device
    )
    t, *others = numbers.unbind(1)
    alpha, sigma, keep, add, recall = (x.view(-1, 1, 1, 1) for x in others)
    x0 = (rows.z - sigma * denoise(rows.z, t)) / alpha
    z = keep * rows.z + add * x0 + recall * rows.before
    return replace(rows, z=z, before=x0, done=tuple(i + 1 for i in rows.done))


def starting_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """`[B,4,h,w]`, a generator a picture: picture 7 is the same whatever the batch, the neighbours or the machine."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guided(
    denoise_slots: Callable[[Tensor, Tensor, Tensor], Tensor], slots: Tensor, empty: Tensor, guidance: float | Tensor
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022): `eps = eps_empty + guidance (eps_prompt - eps_empty)`, one call for both.

    `denoise_slots(z, t, slot)`; `slots`, `empty [B]` are the prompts' and the negative prompts' slots; `guidance` may be `[B]`.
    """
    if isinstance(guidance, Tensor):
        guidance = guidance.view(-1, 1, 1, 1)
    elif guidance == 1.0:
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


def _split(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma `[N]` float64 of `ratio = sigma / alpha`, as diffusers keeps them."""
    alpha = 1 / (ratio.double() ** 2 + 1).sqrt()
    return alpha, ratio * alpha


def _first_order(alpha: Tensor, sigma: Tensor) -> Tensor:
    """`add [N]` of `z' = alpha' x0 + sigma' eps`: the noise stays what it is, its share changes."""
    return alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1]


def ddim_course(schedule: Schedule, steps: int) -> Course:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with sigma = 0)."""
    scheduler = _diffusers("DDIMScheduler", schedule, steps)
    t = scheduler.timesteps
    last = t[-1] - schedule.steps // steps
    end = schedule.abar[last] if last >= 0 else scheduler.final_alpha_cumprod
    before = (t - schedule.steps // steps).clamp(min=0)
    abar, after = schedule.abar[t].double(), torch.cat([schedule.abar[before[:-1]], end.view(1)]).double()
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    keep = (1 - after).sqrt() / sigma
    add = after.sqrt() - alpha * keep
    columns = (t.double(), alpha, sigma, keep, add, torch.zeros_like(add))
    return Course(torch.stack(columns, dim=1).float())


def euler_course(schedule: Schedule, steps: int) -> Course:
    """Euler's method in `z / alpha` over `sigma / alpha` (Karras et al. 2022, algorithm 1 without its second order)."""
    scheduler = _diffusers("EulerDiscreteScheduler", schedule, steps)
    alpha, sigma = _split(scheduler.sigmas)
    add = _first_order(alpha, sigma)
    start = float(scheduler.init_noise_sigma * alpha[0])
    return Course.of(scheduler.timesteps, alpha, sigma, add, torch.zeros_like(add), start)


def dpm_course(schedule: Schedule, steps: int) -> Course:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order in the log signal-to-noise ratio, first order at the ends."""
    scheduler = _diffusers("DPMSolverMultistepScheduler", schedule, steps)
    alpha, sigma = _split(scheduler.sigmas)
    add = _first_order(alpha, sigma)  # equals -alpha' expm1(-h)
    h = (alpha.log() - sigma.log()).diff()
    half = torch.zeros_like(add)  # of the step's length, measured in the one before
    half[1:-1] = 0.5 * h[1:-1] / h[:-2]
    return Course.of(scheduler.timesteps, alpha, sigma, add * (1 + half), -add * half)


COURSES: dict[str, Callable[[Schedule, int], Course]] = {
    # kept, since diffusers takes milliseconds to lay out a schedule, as long as a step of a small base
    name: lru_cache(maxsize=64)(make)
    for name, make in {"dpm": dpm_course, "ddim": ddim_course, "euler": euler_course}.items()
}


def sample(
    sampler: str, denoise: Denoise, z: Tensor, schedule: Schedule, steps: int, progress: Progress | None = None
) -> Tensor:
    """Latents `[B,4,h,w]` of noise `z`, all rows on the same course: `sampler` is a key of `COURSES`."""
    rows = begin(z, COURSES[sampler](schedule, steps))
    for i in range(steps):
        rows = step(denoise, rows)
        if progress:
            progress(i + 1, steps)
    return rows.z


SAMPLERS: dict[str, Callable[..., Tensor]] = {name: partial(sample, name) for name in COURSES}
dpm_solver, ddim, euler = SAMPLERS.values()
