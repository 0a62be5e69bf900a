"""The optimiser loop of one concept. Step k depends on the seed and k alone, so that a resumed run equals a straight one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from cpserve.base import BaseModel
from cpserve.errors import TrainingError
from trainer.lora import Trainable, states
from trainer.penalties.ewc import Anchor
from trainer.record import Record
from trainer.settings import Settings

SAVE_EVERY_S = 5.0


@dataclass(frozen=True)
class Progress:
    """Where a run is: `loss` is a running mean, `left_s` the seconds that remain."""

    step: int
    steps: int
    loss: float
    left_s: float


@dataclass(frozen=True, eq=False)
class Task:
    """One concept to learn: `latents [M,4,h,w]`, prompts' `ids [T,S]`, the earlier tokens' embeddings `[E,d]`."""

    base: BaseModel
    settings: Settings
    latents: Tensor
    ids: Tensor
    earlier: Tensor
    trainable: Trainable
    anchor: Anchor | None = None

    def denoise_loss(self, step: int) -> Tensor:
        """`E || target - output ||^2`, the mean over elements, on a batch that depends on the seed and `step` alone."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        rows = torch.randint(len(self.latents), (self.settings.batch,), generator=generator)
        slot = torch.randint(len(self.ids), (self.settings.batch,), generator=generator)
        x0 = self.latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        schedule = self.base.spec.schedule
        t = torch.randint(schedule.steps, (len(x0),), generator=generator).float()
        used, slot = torch.unique(slot, return_inverse=True)
        packed = self.trainable.packed(states(self.base, self.ids[used], self.earlier, self.trainable.token))
        output = self.base.unet(schedule.add_noise(x0, noise, t), t, packed, slot)
        return (output.float() - schedule.target(x0, noise, t)).pow(2).mean()  # type: ignore[no-any-return]


def faster_precision() -> AbstractContextManager[object]:
    """bf16 where the CPU multiplies it natively; on others it would be slower than float32."""
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001 - torch offers no public name for it
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def rate(step: int, settings: Settings) -> float:
    """The share of the full learning rate at `step`: a linear rise, then half a cosine to zero."""
    rising = (step + 1) / max(1, settings.warm_up)
    return min(1.0, rising) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def optimise(task: Task, record: Record, progress: Callable[[Progress], None] | None = None) -> None:
    """Train `task.trainable` in place to the end, from the last state in `record`.

    Raises:
        TrainingError: the loss is not finite; the last good state is kept.
    """
    settings, parameters = task.settings, task.trainable.parameters()
    token, factors = parameters["token"], [p for n, p in parameters.items() if n != "token"]
    groups = [{"params": [token], "lr": settings.token_rate}, {"params": factors, "lr": settings.factor_rate}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    step = _restore(record, parameters, optimiser)
    first, began, saved, mean, whole = step, time.monotonic(), time.monotonic(), math.nan, True
    try:
        while step < settings.steps:
            with faster_precision():
                loss = task.denoise_loss(step)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is no longer a number at step {step}",
                    hint="learn again with a smaller rate: factor_rate in --config",
                    state=str(record.folder),
                )
            torch.autograd.backward(loss + task.anchor.term(parameters) if task.anchor else loss)
            for group, full in zip(optimiser.param_groups, (settings.token_rate, settings.factor_rate), strict=True):
                group["lr"] = full * rate(step, settings)
            whole = False
            optimiser.step()
            step += 1
            whole = True
            optimiser.zero_grad()
            mean = value if math.isnan(mean) else 0.95 * mean + 0.05 * value
            if progress:
                progress(
                    Progress(
                        step,
                        settings.steps,
                        mean,
                        (settings.steps - step) * (time.monotonic() - began) / (step - first),
                    )
                )
            if time.monotonic() - saved > SAVE_EVERY_S:
                _keep(record, parameters, optimiser, step)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if whole:  # in the middle of a step the last state kept is the better one
            _keep(record, parameters, optimiser, step)
        raise
    _keep(record, parameters, optimiser, step)


def _keep(record: Record, parameters: dict[str, Tensor], optimiser: torch.optim.Optimizer, step: int) -> None:
    tensors = dict(parameters)
    for name, parameter in parameters.items():
        tensors |= {f"{key}/{name}": value for key, value in optimiser.state[parameter].items()}
    record.save_state(tensors, step)


def _restore(record: Record, parameters: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
    tensors, step = record.load_state()
    for name, parameter in parameters.items():
        if step:
            parameter.data.copy_(tensors[name])
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimiser.state[parameter] = {key: tensors[f"{key}/{name}"].clone() for key in keys}
    return step
