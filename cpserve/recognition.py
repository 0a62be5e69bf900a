"""Which learned concept a picture shows, or none, from nothing but the generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cpserve.adapter import Adapter
from cpserve.engine import Engine
from cpserve.errors import AdapterError
from cpserve.prompts import Prompt
from cpserve.score import Draw, draws, errors, log_scores, temperature

NONE = "none of these"
GENERIC_PROMPT = "a photo"
ROWS = 64  # of one UNet call


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How to judge: `draws` of (t, noise) a picture, timesteps from `low` to `high` as shares of the schedule's length; `none`:
    whether "none of these" may be the answer.
    """

    draws: int = 16
    low: float = 0.1
    high: float = 0.7
    seed: int = 0
    template: str = "a photo of {}"
    none: bool = True


@dataclass(frozen=True)
class Answer:
    """A label with its probability, all probabilities by label (they sum to one), and the UNet evaluations spent."""

    label: str
    probability: float
    probabilities: dict[str, float]
    evaluations: int


def square(image: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture at the base's size."""
    return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


@torch.no_grad()
def classify(
    engine: Engine,
    images: Sequence[Image.Image],
    adapter: Adapter,
    judging: Judging | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Label each picture with one of the adapter's concepts or `NONE`.

    Raises:
        AdapterError: the adapter knows no concept, or does not fit the base.
    """
    judging = judging or Judging()
    concepts = adapter.manifest.concepts
    if not concepts:
        raise AdapterError("the adapter knows no concept yet", hint="teach one: cpserve train --concept ZIP")
    if not images:
        return []
    spec = engine.spec
    texts = [judging.template.format(c.token) for c in concepts]
    texts += [GENERIC_PROMPT] * judging.none
    bank, slots = engine.bank.packed([Prompt(text, adapter) for text in texts])
    pixels = np.stack([np.asarray(square(i, spec.pixels), dtype=np.float32) for i in images])
    latents = engine.encode_pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    length = spec.schedule.steps
    plan = draws(judging.seed, judging.draws, tuple(latents.shape[1:]), judging.low * length, judging.high * length)
    labels = [*(c.name for c in concepts), *[NONE] * judging.none]
    answers = []
    for number, x0 in enumerate(latents):
        answers.append(_answer(engine, x0[None], bank, slots, plan, labels))
        if progress:
            progress(number + 1, len(latents))
    return answers


def _answer(engine: Engine, x0: Tensor, bank: Tensor, slots: Tensor, draw: Draw, labels: list[str]) -> Answer:
    def denoise(z: Tensor, t: Tensor, slot: Tensor) -> Tensor:
        return engine.denoise(z, t, bank, slot)

    at_once = max(1, ROWS // len(labels))
    parts = zip(draw.t.split(at_once), draw.noise.split(at_once), strict=True)
    schedule = engine.spec.schedule
    by_draw = torch.cat([errors(denoise, schedule, x0.expand(len(t), -1, -1, -1), Draw(t, n), slots) for t, n in parts])
    tau = temperature(by_draw) / len(by_draw) ** 0.5  # of a mean over draws, whose spread is that much smaller
    p = log_scores(by_draw.mean(0, keepdim=True), tau)[0].exp().tolist()
    best = int(np.argmax(p))
    return Answer(labels[best], p[best], dict(zip(labels, p, strict=True)), by_draw.numel())
