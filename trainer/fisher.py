"""The Fisher information of a task, for EWC-DC: how much each parameter matters to what was just learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpserve.score import Draw, errors, temperature
from trainer.loop import Task, faster_precision
from trainer.lora import states
from trainer.penalties.ewc import fisher_information
from trainer.penalties.ewc_dc import fisher_loss

GENERIC_PROMPT = "a photo"
TEMPERATURE_DRAWS = 8


def dc_fisher(task: Task, rivals: Tensor) -> tuple[dict[str, Tensor], float]:
    """The Fisher by factor, and the temperature used.

    `rivals [R,S]` are the ids of the prompts that the concept is told apart from: the generic prompt, then seen concepts.
    """
    settings, trainable, spec = task.settings, task.trainable, task.base.spec
    ids = torch.cat([task.ids[:1], rivals])

    def draw_errors(draw: int) -> Tensor:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + draw)
        row = torch.randint(len(task.latents), (1,), generator=generator)
        t = torch.randint(spec.schedule.steps, (1,), generator=generator).float()
        x0 = task.latents[row]
        noise = torch.randn(x0.shape, generator=generator)
        packed = trainable.packed(states(task.base, ids, task.earlier, trainable.token))

        def denoise(z: Tensor, times: Tensor, slot: Tensor) -> Tensor:
            with faster_precision():
                output = task.base.unet(z, times, packed, slot)
            return spec.schedule.eps(output.float(), z, times)

        return errors(denoise, spec.schedule, x0, Draw(t, noise), torch.arange(len(ids)))

    with torch.no_grad():
        tau = temperature(torch.cat([draw_errors(d) for d in range(TEMPERATURE_DRAWS)]))

    def loss(draw: int) -> Tensor:
        error = draw_errors(draw)
        return fisher_loss(error, error[0, 0] / task.latents[0].numel(), tau, settings.dc_delta)

    return fisher_information(trainable.factors, loss, settings.fisher_draws), tau


def sampled_rivals(tokens: Sequence[str], count: int, seed: int) -> list[str]:
    """The generic prompt and at most `count` of the seen tokens, drawn at random."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    return [GENERIC_PROMPT, *(tokens[i] for i in order[:count])]
