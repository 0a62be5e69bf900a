"""The Fisher information of a task, for EWC and EWC-DC: how much each factor matters to what was just learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpserve.score import errors, temperature
from trainer.loop import Task
from trainer.lora import states
from trainer.penalties.ewc import fisher_information
from trainer.penalties.ewc_dc import fisher_loss
from trainer.settings import GENERIC_PROMPT, TEMPLATES

TEMPERATURE_DRAWS = 8


def fisher(task: Task, rivals: Tensor) -> tuple[dict[str, Tensor], float]:
    """The Fisher by factor, and the temperature used (0 without rivals).

    `rivals [R,S]` are the ids of the prompts that the concept is told apart from (EWC-DC); none for the plain Fisher of the
    denoising loss (EWC).
    """
    ids = torch.cat([task.ids[:1], rivals])
    e = states(task.base, ids, task.earlier, task.trainable.token).detach()

    def draw_errors(draw: int) -> Tensor:
        x0, noise = task.draw(1, task.generator(draw, stream=3))
        packed = task.trainable.packed(e)
        return errors(task.denoise(packed), task.base.spec.schedule, x0, noise, torch.arange(len(ids)))

    tau = 0.0
    if len(rivals):
        with torch.no_grad():
            tau = temperature(torch.cat([draw_errors(d) for d in range(TEMPERATURE_DRAWS)]))

    def loss(draw: int) -> Tensor:
        error = draw_errors(draw)
        denoise_loss = error[0, 0] / task.latents[0].numel()
        return fisher_loss(error, denoise_loss, tau, task.settings.dc_delta) if tau else denoise_loss

    return fisher_information(task.trainable.factors, loss, task.settings.fisher_draws), tau


def sampled_rivals(tokens: Sequence[str], count: int, seed: int) -> list[str]:
    """The generic prompt and those of at most `count` seen tokens, drawn at random, worded as the new concept's is."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    return [GENERIC_PROMPT, *(TEMPLATES[0].format(tokens[i]) for i in order[:count])]
