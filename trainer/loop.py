"""The optimiser loop of one concept. Step k depends on the seed and k alone, so that a resumed run equals a straight one.

Bit for bit on a CPU; CUDA adds some gradients up in no fixed order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cpserve.at_once import CELLS, few
from cpserve.base import BaseModel
from cpserve.errors import TrainingError
from cpserve.score import DenoiseSlots, Draw
from trainer.lora import Trainable, states
from trainer.record import Record
from trainer.settings import Settings

SAVE_EVERY_S = 5.0
CAPTION_SHARE = 0.5  # of the rows of a picture with a caption; the others see the templates
BIG = 200e6  # parameters of a UNet: Stable Diffusion 1.5 has 860 million
DIVERGED = 10.0  # times the lowest running loss
SUDDEN = 3.0  # times what predicting nothing costs, in a single step
FIRST, SETTLED = 5, 20  # steps: at small batches it takes some until the loss says more than which timesteps were drawn
NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")

Penalty = Callable[[Mapping[str, Tensor]], Tensor]
"""A scalar from the parameters by name."""


@dataclass(frozen=True)
class Progress:
    """Where a run is: `loss` is a running mean, `left_s` the seconds that remain."""

    step: int
    steps: int
    loss: float
    left_s: float


@dataclass(frozen=True, eq=False)
class Task:
    """One concept to learn: `latents [M,4,h,w]`, prompts' `ids [T,S]`, the earlier tokens' embeddings `[E,d]`.

    `captions [M]` is a latent's own prompt among `ids`, or -1; `prior [P,4,h,w]` are pictures of the class, which the last
    prompt describes. What is drawn at random is drawn, and noised, on the CPU, so that it is the same on every device; `earlier`
    and `trainable` are where the base is.
    """

    base: BaseModel
    settings: Settings
    latents: Tensor
    ids: Tensor
    earlier: Tensor
    trainable: Trainable
    templates: int
    captions: Tensor
    prior: Tensor | None = None

    @property
    def nothing(self) -> float:
        """What a step's loss is at most where the UNet's output is zero, but for the chance of noise."""
        schedule = self.base.spec.schedule
        own = schedule.target_power(self.latents)
        return own if self.prior is None else own + self.settings.prior_weight * schedule.target_power(self.prior)

    def generator(self, step: int, stream: int = 0) -> torch.Generator:
        """Randomness that depends on the seed, the step and the purpose alone."""
        return torch.Generator().manual_seed((self.settings.seed * 1_000_003 + step) * 8 + stream)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Draw]:
        """Latents `[count,4,h,w]` at random, each with its own (t, eps)."""
        device, x0 = self.base.device, self.latents[torch.randint(len(self.latents), (count,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(self.base.spec.schedule.steps, (count,), generator=generator).float()
        return x0.to(device), Draw(t, noise).to(device)

    def denoise(self, packed: Tensor) -> DenoiseSlots:
        """The UNet's eps under prompts of packed K,V `[N,S,W]`, in the faster precision; without gradients few rows at once."""

        def eps(z: Tensor, t: Tensor, slot: Tensor) -> Tensor:
            rows = z, t, slot.to(z.device), *self.base.spec.sizes(z)
            parts = [rows] if torch.is_grad_enabled() else few(CELLS, *rows)
            with faster_precision(z.device):
                output = torch.cat([self.base.unet(x, s, packed, at, *added) for x, s, at, *added in parts])
            return self.base.spec.schedule.eps(output.float(), z, t)

        return eps

    def losses(self, step: int) -> Iterator[Tensor]:
        """Summands of `E || target - output ||^2`, the mean over elements, on a batch that depends on the seed and `step` alone."""
        generator, settings = self.generator(step), self.settings
        rows = torch.randint(len(self.latents), (settings.batch,), generator=generator)
        slot = torch.randint(self.templates, (settings.batch,), generator=generator)
        own = (self.captions[rows] >= 0) & (torch.rand(settings.batch, generator=generator) < CAPTION_SHARE)
        slot = torch.where(own, self.captions[rows], slot)
        x0, weight = self.latents[rows], torch.ones(settings.batch)
        if self.prior is not None:
            x0 = torch.cat([x0, self.prior[torch.randint(len(self.prior), (settings.batch,), generator=generator)]])
            slot = torch.cat([slot, torch.full((settings.batch,), len(self.ids) - 1)])
            weight = torch.cat([weight, torch.full((settings.batch,), settings.prior_weight)])
        yield from self._losses(x0, slot, weight / settings.batch, generator)

    def _losses(self, x0: Tensor, slot: Tensor, weight: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """The weighted squared errors of rows `x0 [B,4,h,w]`, summed over as many rows as the UNet is to see at once."""
        schedule = self.base.spec.schedule
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(schedule.steps, (len(x0),), generator=generator).float()
        rows = schedule.add_noise(x0, noise, t), t, schedule.target(x0, noise, t), slot, weight
        for part in zip(*(each.chunk(self.settings.accumulate) for each in rows), strict=True):
            yield self._loss(*part)

    def _loss(self, xt: Tensor, t: Tensor, target: Tensor, slot: Tensor, weight: Tensor) -> Tensor:
        used, slot = torch.unique(slot, return_inverse=True)
        xt, t, target, slot, weight = (each.to(self.base.device) for each in (xt, t, target, slot, weight))
        with faster_precision(xt.device):
            packed = self.trainable.packed(states(self.base, self.ids[used], self.earlier, self.trainable.token))
            output = self.base.unet(xt, t, packed, slot, *self.base.spec.sizes(xt))
        error: Tensor = (output.float() - target).pow(2).flatten(1).mean(1)
        return (weight * error).sum()


def multiplies_bf16() -> bool:
    """Whether the CPU does natively; others compute it in twice float32's time."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name) for name in NATIVE_BF16)


def faster_precision(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where the device multiplies it."""
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else multiplies_bf16()
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def prepare(base: BaseModel) -> None:
    """Lay the UNet out for training.

    Channels last where a CPU trains in float32: a step takes four fifths of the time; in bf16 group norms lose more than
    that. A big UNet keeps no activations but computes them again on the way back: a fifth more time, a fraction of the memory.
    """
    if base.device.type == "cpu" and not multiplies_bf16():
        base.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if sum(p.numel() for p in base.unet.parameters()) > BIG:
        base.unet.unet.enable_gradient_checkpointing()


@dataclass(frozen=True, eq=False)
class Stage:
    """A run of the optimiser over `steps`, `done` steps of the whole lesson before it and `total` in all.

    `losses(step)` are what a step's loss is the sum of, one after another; they depend on the step alone. `groups` are
    parameters by name, each group with AdamW's full rate. `nothing` is what predicting nothing costs, where that is known.
    """

    name: str
    losses: Callable[[int], Iterable[Tensor]]
    groups: Sequence[tuple[Mapping[str, Tensor], float]]
    steps: int
    warm_up: int
    done: int
    total: int
    penalty: Penalty | None = None
    nothing: float = math.inf

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Everything that the optimiser moves, by name."""
        return {name: parameter for group, _ in self.groups for name, parameter in group.items()}

    def rate(self, step: int) -> float:
        """The share of the full learning rate at `step`: a linear rise, then half a cosine to zero."""
        rising = (step + 1) / max(1, self.warm_up)
        return min(1.0, rising) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass
class RunningLoss:
    """A mean that forgets by a twentieth a step, without bias towards where it began, and what is wrong with it.

    Until SETTLED, `lowest` is about what predicting nothing costs, or the largest of the FIRST losses if that is more.
    """

    steps: int = 0
    lowest: float = 1.0  # where noise is predicted, and about so where v is
    _sum: float = 0.0

    @property
    def mean(self) -> float:
        return self._sum / (1 - 0.95**self.steps)

    def add(self, value: float) -> None:
        self.steps += 1
        self._sum = 0.95 * self._sum + 0.05 * value
        if self.steps <= FIRST:
            self.lowest = max(self.lowest, value)
        elif self.steps >= SETTLED:
            self.lowest = min(self.lowest, self.mean)

    @property
    def fault(self) -> str | None:
        if not math.isfinite(self.mean):
            return "or its gradient is no longer a number"
        grown = self.steps > FIRST and self.mean > DIVERGED * max(self.lowest, 1e-3)
        return "has grown tenfold" if grown else None

    def state(self) -> Tensor:
        """What `of` goes on from: a resumed run notices what a straight one does."""
        return torch.tensor([self.steps, self.lowest, self._sum], dtype=torch.float64)

    @classmethod
    def of(cls, state: Tensor) -> Self:
        steps, lowest, total = state.tolist()
        return cls(int(steps), lowest, total)


def optimise(stage: Stage, record: Record, progress: Callable[[Progress], None] | None = None) -> None:
    """Train a stage's parameters in place to the end, from its last state in `record`.

    Raises:
        TrainingError: the loss or its gradient is not finite, or it has grown out of bounds; the last state kept stays.
    """
    optimiser = torch.optim.AdamW([{"params": [*group.values()]} for group, _ in stage.groups], weight_decay=0.0)
    step, running = _restore(record, stage, optimiser)
    first, began, saved, whole = step, time.monotonic(), time.monotonic(), True
    try:
        while step < stage.steps:
            value = _backward(stage, step)
            running.add(value)
            if fault := running.fault or _sudden(value, stage.nothing):
                raise TrainingError(
                    f"the loss {fault} at step {stage.done + step}",
                    hint="start it over with a smaller rate: --restart, and factor_rate in --config",
                    state=str(record.folder),
                )
            for group, (_, full) in zip(optimiser.param_groups, stage.groups, strict=True):
                group["lr"] = full * stage.rate(step)
            whole = False
            optimiser.step()
            step += 1
            whole = True
            optimiser.zero_grad()
            if progress:
                at = stage.done + step
                each = (time.monotonic() - began) / (step - first)
                progress(Progress(at, stage.total, running.mean, (stage.total - at) * each))
            if time.monotonic() - saved > SAVE_EVERY_S:
                _keep(record, stage, optimiser, step, running)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if whole:  # in the middle of a step the last state kept is the better one
            _keep(record, stage, optimiser, step, running)
        raise
    if step > first:
        _keep(record, stage, optimiser, step, running)


def _sudden(value: float, nothing: float) -> str | None:
    return f"is {value:.3g}, much more than predicting nothing costs," if value > SUDDEN * nothing else None


def _backward(stage: Stage, step: int) -> float:
    """Add up a step's gradients, the penalty's with them; gives the loss without it, NaN where a gradient is not finite."""
    value, penalty = 0.0, stage.penalty(stage.parameters) if stage.penalty else None
    for loss in stage.losses(step):
        value += float(loss.detach())
        torch.autograd.backward(loss if penalty is None else loss + penalty)
        penalty = None
    norm = torch.nn.utils.get_total_norm([p.grad for p in stage.parameters.values() if p.grad is not None])
    return value if norm.isfinite() else math.nan


def _keep(record: Record, stage: Stage, optimiser: torch.optim.Optimizer, step: int, running: RunningLoss) -> None:
    tensors = {**stage.parameters, "running loss": running.state()}
    for name, parameter in stage.parameters.items():
        tensors |= {f"{key}/{name}": value for key, value in optimiser.state[parameter].items()}
    record.save_state(stage.name, tensors, step)


def _restore(record: Record, stage: Stage, optimiser: torch.optim.Optimizer) -> tuple[int, RunningLoss]:
    tensors, step = record.load_state(stage.name)
    for name, parameter in stage.parameters.items():
        if step:
            parameter.data.copy_(tensors[name])
            moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {"step": tensors[f"step/{name}"], **moments}  # steps are counted on the CPU
    return step, RunningLoss.of(tensors["running loss"]) if step else RunningLoss()
