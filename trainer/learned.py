"""Was the concept learned? Its own pictures, told from the other known concepts by diffusion-classifier scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpserve.adapter import Tensors
from cpserve.prompts import tokenize
from cpserve.score import Draw, draws, errors
from trainer.loop import Task
from trainer.lora import states
from trainer.settings import GENERIC_PROMPT, TEMPLATES

PICTURES, PAIRS, RIVALS = 8, 4, 5
LOW, HIGH = 0.1, 0.7  # of the schedule: nearer to its ends little tells labels apart


@torch.no_grad()
def own_accuracy(task: Task, tokens: Sequence[str], lora: Tensors) -> float:
    """The share, 0 to 1, of own pictures for which the concept, the last of `tokens`, beats c_0 and up to RIVALS others.

    The others are the latest ones learned. Pictures are training's own, so this says whether anything was learned, and no
    more than that.
    """
    base, others = task.base, tokens[:-1][-RIVALS:]
    texts = [TEMPLATES[0].format(tokens[-1]), GENERIC_PROMPT, *(TEMPLATES[0].format(o) for o in others)]
    e = states(base, tokenize(base.spec.tokenizer, texts, tokens), task.earlier, task.trainable.token)
    denoise = task.denoise(base.spec.sites.project(e, lora))
    step = max(1, len(task.latents) // PICTURES)
    x0 = task.latents[::step][:PICTURES].to(base.device)
    length = base.spec.schedule.steps
    plan = draws(task.settings.seed, PAIRS, tuple(x0.shape[1:]), LOW * length, HIGH * length).to(base.device)
    total: Tensor = torch.zeros(len(x0), len(texts), device=base.device)
    for t, noise in zip(plan.t, plan.noise, strict=True):
        total += errors(denoise, base.spec.schedule, x0, Draw(t[None], noise[None]), torch.arange(len(texts)))
    return int((total.argmin(1) == 0).sum()) / len(x0)
