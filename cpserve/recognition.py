"""Which learned concept a picture shows, or none, from nothing but the generator.

All pictures go through the same draws (t, eps); after each of them a picture's labels that are ruled out (`elimination.py`) drop
out, and rows of many pictures share a UNet call. So an answer does not depend on its neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cpserve.adapter import Adapter
from cpserve.elimination import Race
from cpserve.engine import Engine
from cpserve.errors import AdapterError, EngineError
from cpserve.prompts import Prompt
from cpserve.score import Draw, draws, error_maps
from cpserve.slope import EVALUATIONS, slope_of_error

NONE = "none of these"
GENERIC_PROMPT = "a photo"
ROWS = 64  # of one UNet call
SLOPES = 8  # draws that tell which of many labels are judged
MANY = 2  # times as many labels as are kept, and slopes take about as long as a look at each label


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How to judge: by at most `draws` of (t, noise) a picture and label, fewer where a label is ruled out or an answer sure, at
    the `error` rate (0: never); see `elimination.Race`. Timesteps from `low` to `high` as shares of the schedule's length: the
    ends mislead (LOG.md). `none`: whether "none of these" may be the answer. `whole`: by the error of the whole picture, as in
    the papers, in place of the regions that a concept explains; among the known only. At most the `kept` likeliest labels go on
    after the first draw; of more than twice as many, only they are judged at all, the likeliest to first order (`slope.py`),
    where the engine can. 0: all may, as without an `error` and by the whole picture.
    """

    draws: int = 16
    error: float = 0.02
    low: float = 0.2
    high: float = 0.6
    seed: int = 0
    template: str = "a photo of {}"
    none: bool = True
    whole: bool = False
    kept: int = 12

    @property
    def middle(self) -> float:
        """Where draws begin, as a share of the schedule's length: later ones tell labels apart sooner, but not "none" (LOG.md)."""
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Answer:
    """A label with its probability, all probabilities by label (they sum to one), and what it took: UNet evaluations and its
    share of the seconds, by evaluations, of the pictures that were judged together.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    evaluations: int
    seconds: float


def square(image: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture at the base's size."""
    return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def labels_of(adapter: Adapter, judging: Judging) -> dict[str, str]:
    """Each label that an answer may be, in order, and the prompt that stands for it.

    Raises:
        AdapterError: the adapter knows no concept.
    """
    concepts = adapter.manifest.concepts
    if not concepts:
        raise AdapterError("the adapter knows no concept yet", hint="teach one: cpserve train --concept ZIP")
    named = {c.name: judging.template.format(c.token) for c in concepts}
    return named | {NONE: GENERIC_PROMPT} if judging.none and not judging.whole else named


def latents_of(engine: Engine, images: Sequence[Image.Image]) -> Tensor:
    """`[B,4,h,w]` of the middle squares of pictures."""
    pixels = np.stack([np.asarray(square(i, engine.spec.pixels), dtype=np.float32) for i in images])
    return engine.encode_pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)


def draws_of(engine: Engine, judging: Judging, latents: Tensor) -> Draw:
    """The draws that every picture and label sees, in order, where `latents` are."""
    length, pairs = engine.spec.schedule.steps, -(-judging.draws // 2)
    plan = draws(judging.seed, pairs, tuple(latents.shape[1:]), judging.low * length, judging.high * length)
    if not judging.whole:  # which looks at both signs of the noise at once
        order = middle_first(plan.t[::2], judging.middle * length)
        plan = Draw(plan.t[order], plan.noise[order])
    return Draw(plan.t[: judging.draws], plan.noise[: judging.draws]).to(latents.device)


def middle_first(t: Tensor, middle: float) -> Tensor:
    """Indices `[2 * pairs]` of `score.draws` at `t [pairs]`, from the middle outwards; opposite noise comes after them all."""
    nearest = 2 * (t - middle).abs().argsort(stable=True)
    return torch.cat([nearest, nearest + 1])


@torch.no_grad()
def classify(
    engine: Engine,
    images: Sequence[Image.Image],
    adapter: Adapter,
    judging: Judging | None = None,
) -> list[Answer]:
    """Label each picture with one of the adapter's concepts or `NONE`.

    Raises:
        AdapterError: the adapter knows no concept, or does not fit the base.
        EngineError: the engine's predictions are not finite.
    """
    judging = judging or Judging()
    labels, answers = list(labels_of(adapter, judging)), list[Answer]()
    with engine.at_work():
        for start in range(0, len(images), ROWS):
            began = time.perf_counter()
            races = _raced(engine, images[start : start + ROWS], adapter, judging)
            each = (time.perf_counter() - began) / sum(race.evaluations for race in races)
            answers += [_answer(race, labels, each * race.evaluations) for race in races]
    return answers


def _raced(engine: Engine, images: Sequence[Image.Image], adapter: Adapter, judging: Judging) -> list[Race]:
    """All pictures' races, draw by draw; by the whole picture, pair by pair."""
    whole, none = judging.whole, judging.none and not judging.whole
    texts = labels_of(adapter, replace(judging, none=True)).values()  # c_0 is what regions are judged against
    bank, slots = engine.bank.packed([Prompt(text, adapter) for text in texts])
    latents = latents_of(engine, images)
    plan, size = draws_of(engine, judging, latents), 2 if whole else 1
    labels, kept = len(texts) - (not whole), judging.kept if judging.error and not whole else 0
    races = [Race(labels, engine.spec.elements, error=judging.error, kept=kept, none=none, whole=whole) for _ in images]
    if engine.slopes and 0 < MANY * kept < labels:
        first = draws_of(engine, replace(judging, draws=max(judging.draws, 2 * SLOPES)), latents)
        first = Draw(first.t[:SLOPES], first.noise[:SLOPES])
        for race, latent in zip(races, latents, strict=True):
            race.keep(_likeliest(engine, bank, slots[:-1], latent, first)[:kept], EVALUATIONS * len(first.t))
    for t, noise in zip(plan.t.split(size), plan.noise.split(size), strict=True):
        asked = np.stack([race.active & (not race.over) for race in races])
        if not whole:
            asked = np.column_stack([asked, asked.any(1)])  # c_0
        maps, of = _maps(engine, bank, slots, latents, asked, Draw(t, noise)), np.nonzero(asked)[0]
        for picture in np.unique(of):
            own = maps[of == picture]
            errors, generic = (own, None) if whole else (own[:-1], own[-1])
            races[picture].see(errors, generic, len(t))
        if all(race.over for race in races):
            break
    return races


def _likeliest(engine: Engine, bank: Tensor, slots: Tensor, latent: Tensor, draw: Draw) -> np.ndarray:
    """The labels of a picture, by what the error's slope at their mean K,V says of each, the likeliest first."""
    share = torch.bincount(slots, minlength=len(bank)).to(bank) / len(slots)
    slope = slope_of_error(engine, latent, draw, torch.tensordot(share, bank, 1))
    rising = _finite((bank.flatten(1) @ slope.flatten())[slots].cpu().numpy())
    return rising.argsort(kind="stable")


def _maps(engine: Engine, bank: Tensor, slots: Tensor, latents: Tensor, asked: np.ndarray, look: Draw) -> np.ndarray:
    """The mean error map over a look's draws, `[cells,h,w]`, for every (picture, label) in `asked`, in their order."""

    def denoise(z: Tensor, t: Tensor, slot: Tensor) -> Tensor:
        return engine.denoise(z, t, bank, slot)

    size = len(look.t)
    picture, label = (torch.from_numpy(cells).repeat(size) for cells in np.nonzero(asked))
    which = torch.arange(size).repeat_interleave(len(picture) // size)
    parts = []
    for rows in torch.arange(len(picture)).split(ROWS):
        draw = Draw(look.t[which[rows]], look.noise[which[rows]])
        parts.append(error_maps(denoise, engine.spec.schedule, latents[picture[rows]], draw, slots[label[rows]]).cpu())
    return _finite(torch.cat(parts).double().unflatten(0, (size, -1)).mean(0).numpy())


def _finite(made: np.ndarray) -> np.ndarray:
    if not np.isfinite(made).all():
        raise EngineError("the engine predicts no finite noise", hint="judge in float32: --engine eager")
    return made


def _answer(race: Race, labels: list[str], seconds: float) -> Answer:
    p = race.probabilities.tolist()
    return Answer(labels[race.label], p[race.label], dict(zip(labels, p, strict=True)), race.evaluations, seconds)
