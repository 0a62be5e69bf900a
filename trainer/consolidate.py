"""DSC: after learning, distil what the new and one past adapter say about noised *current* pictures (Jha et al., ICLR 2025).

`a1 H(p_1, p_S) + a2 H(p_2, p_S) + b1 |eps_1(c_n) - eps_S(c_n)|^2 + b2 |eps_2(c_past) - eps_S(c_past)|^2`, p the
diffusion-classifier scores over {c_0, c_past, c_n}. Teacher 1 is the adapter as just learned; teacher 2 a past version,
drawn at random for each step, with today's tokens: it never knew c_n, and that is the point. The student starts as teacher 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpserve.adapter import Adapter
from cpserve.prompts import tokenize
from cpserve.score import Draw, log_scores, predictions, squared, temperature
from trainer.fisher import TEMPERATURE_DRAWS
from trainer.loop import Task
from trainer.lora import states
from trainer.settings import GENERIC_PROMPT, TEMPLATES


@dataclass(frozen=True, eq=False)
class Consolidation:
    """`e [L,S,d]` are the states of {c_0, past concepts in order, c_n}, `new [L,S,W]` their packed K,V under teacher 1;
    `past[j] [3,S,W]` are those of c_0, concept j and c_n under the version that concept j was learned in.
    """

    task: Task
    e: Tensor
    new: Tensor
    past: Sequence[Tensor]
    tau: float

    def losses(self, step: int) -> Iterator[Tensor]:
        """Summands, one for each part of the pictures (`accumulate`); they depend on the seed and `step` alone."""
        settings = self.task.settings
        generator = self.task.generator(step, stream=1)
        which = int(torch.randint(len(self.past), (1,), generator=generator))
        x0, draw = self.task.draw(settings.dsc_batch, generator)
        for part in zip(*(each.chunk(settings.accumulate) for each in (x0, draw.t, draw.noise)), strict=True):
            yield len(part[0]) / len(x0) * self._loss(which, part[0], Draw(*part[1:]))

    def _loss(self, which: int, x0: Tensor, draw: Draw) -> Tensor:
        settings, labels = self.task.settings, torch.tensor([0, 1 + which, len(self.e) - 1])
        with torch.no_grad():
            first = self._eps(self.new[labels], x0, draw)
            second = self._eps(self.past[which], x0, draw)
        student = self._eps(self.task.trainable.packed(self.e[labels]), x0, draw)
        log_p = log_scores(squared(student, draw), self.tau)
        agree = [-(log_scores(squared(t, draw), self.tau).exp() * log_p).sum(1).mean() for t in (first, second)]
        near = [(teacher[:, i] - student[:, i]).pow(2).mean() for teacher, i in ((first, 2), (second, 1))]
        loss: Tensor = settings.dsc_scores * (agree[0] + agree[1]) + settings.dsc_eps * (near[0] + near[1])
        return loss

    def _eps(self, packed: Tensor, x0: Tensor, draw: Draw) -> Tensor:
        return predictions(self.task.denoise(packed), self.task.base.spec.schedule, x0, draw, torch.arange(3))


def consolidation(task: Task, tokens: Sequence[str], past: Sequence[Adapter]) -> Consolidation:
    """Set up for the concept just learned, the last of `tokens`; `past[i]` is the version in which token i was learned."""
    base, trainable = task.base, task.trainable
    texts = [GENERIC_PROMPT, *(TEMPLATES[0].format(token) for token in tokens)]
    with torch.no_grad():
        e = states(base, tokenize(base.spec.tokenizer, texts, tokens), task.earlier, trainable.token).detach()
        new = trainable.packed(e).detach()
        taught = [
            base.spec.sites.project(e[[0, 1 + j, -1]], {k: t.float() for k, t in version.lora.items()})
            for j, version in enumerate(past)
        ]
        x0, draw = task.draw(TEMPERATURE_DRAWS, task.generator(0, stream=2))
        eps = predictions(task.denoise(new), base.spec.schedule, x0, draw, torch.arange(len(e)))
        tau = temperature(squared(eps, draw))
    return Consolidation(task, e, new, taught, tau)
