"""Which learned concept a picture shows, or none, from nothing but the generator.

All pictures go through the same draws (t, eps), a pair of them a look; after each look a picture's labels that are ruled out
(`elimination.py`) drop out, and rows of many pictures share a UNet call. So an answer does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cpserve.adapter import Adapter
from cpserve.elimination import Race, by_region, ruled_out
from cpserve.engine import Engine
from cpserve.errors import AdapterError
from cpserve.prompts import Prompt
from cpserve.score import Draw, draws, error_maps

NONE = "none of these"
GENERIC_PROMPT = "a photo"
ROWS = 64  # of one UNet call


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How to judge: at most `draws` of (t, noise) a picture and label, an even number; labels go as soon as they are ruled out at
    the `error` rate (0: never). Timesteps from `low` to `high` as shares of the schedule's length: the ends mislead (fitted:
    tools/emoji64/fit_recognition.py). `none`: whether "none of these" may be the answer.
    """

    draws: int = 16
    error: float = 0.01
    low: float = 0.2
    high: float = 0.6
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


def labels_of(adapter: Adapter, judging: Judging) -> dict[str, str]:
    """Each label that an answer may be, in order, and the prompt that stands for it.

    Raises:
        AdapterError: the adapter knows no concept.
    """
    concepts = adapter.manifest.concepts
    if not concepts:
        raise AdapterError("the adapter knows no concept yet", hint="teach one: cpserve train --concept ZIP")
    named = {c.name: judging.template.format(c.token) for c in concepts}
    return named | {NONE: GENERIC_PROMPT} if judging.none else named


def latents_of(engine: Engine, images: Sequence[Image.Image]) -> Tensor:
    """`[B,4,h,w]` of the middle squares of pictures."""
    pixels = np.stack([np.asarray(square(i, engine.spec.pixels), dtype=np.float32) for i in images])
    return engine.encode_pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)


def draws_of(engine: Engine, judging: Judging, latents: Tensor) -> Draw:
    """The draws that every picture and label sees, in pairs, where `latents` are."""
    length, looks = engine.spec.schedule.steps, max(1, judging.draws // 2)
    plan = draws(judging.seed, looks, tuple(latents.shape[1:]), judging.low * length, judging.high * length)
    return plan.to(latents.device)


def classify(
    engine: Engine,
    images: Sequence[Image.Image],
    adapter: Adapter,
    judging: Judging | None = None,
) -> list[Answer]:
    """Label each picture with one of the adapter's concepts or `NONE`.

    Raises:
        AdapterError: the adapter knows no concept, or does not fit the base.
    """
    judging = judging or Judging()
    labels = list(labels_of(adapter, judging))
    seen = measure(engine, images, adapter, judging)
    return [answer_of(seen[:, picture], labels, engine.spec.elements, judging) for picture in range(len(images))]


@torch.no_grad()
def measure(
    engine: Engine,
    images: Sequence[Image.Image],
    adapter: Adapter,
    judging: Judging,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Each picture's errors under each label and the label's evidence by regions, `[looks,pictures,labels,2]` float64, the mean of
    a pair of draws a look.

    NaN where a label had been ruled out before; evidence is NaN also where "none of these" is not, or no more, an answer.

    Raises:
        AdapterError: the adapter knows no concept, or does not fit the base.
    """
    with engine.at_work():
        return _measure(engine, images, adapter, judging, progress)


def _measure(
    engine: Engine,
    images: Sequence[Image.Image],
    adapter: Adapter,
    judging: Judging,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    prompts = labels_of(adapter, judging)
    looks = max(1, judging.draws // 2)
    seen = np.full((looks, len(images), len(prompts), 2), np.nan)
    if not images:
        return seen
    bank, slots = engine.bank.packed([Prompt(text, adapter) for text in prompts.values()])
    latents = latents_of(engine, images)
    plan = draws_of(engine, judging, latents)
    active = np.ones(seen.shape[1:3], bool)
    for look in range(looks):
        going = active & (active.sum(1, keepdims=True) > 1) if look else active
        if not going.any():
            break
        pair = Draw(plan.t[2 * look : 2 * look + 2], plan.noise[2 * look : 2 * look + 2])
        maps = _pair_maps(engine, bank, slots, latents, going, pair)
        seen[look][going, 0] = maps.sum((1, 2))
        if judging.none:
            _weigh(seen[look], going, maps)
        for picture in np.flatnonzero(going.any(1)):
            active[picture] = ~ruled_out(
                race_of(seen[: look + 1, picture], engine.spec.elements, judging), judging.error
            )
        if progress:
            done = (active.sum(1) == 1).sum() if look + 1 < looks else len(latents)
            progress(int(done), len(latents))
    return seen


def race_of(seen: np.ndarray, elements: int, judging: Judging) -> Race:
    """One picture's, of what `measure` saw of it: `[looks,labels,2]`."""
    return Race(seen[..., 0], elements, seen[..., 1] if judging.none else None)


def _weigh(seen: np.ndarray, going: np.ndarray, maps: np.ndarray) -> None:
    """Write the evidence of this look into `seen [pictures,labels,2]`, of pictures that may still show none of the concepts."""
    generic = np.full((len(going), *maps.shape[1:]), np.nan)
    picture, label = np.nonzero(going)
    generic[picture[label == going.shape[1] - 1]] = maps[label == going.shape[1] - 1]
    seen[going, 1] = by_region(generic[picture] - maps)


def _pair_maps(
    engine: Engine, bank: Tensor, slots: Tensor, latents: Tensor, going: np.ndarray, pair: Draw
) -> np.ndarray:
    """The mean error map of both draws `[cells,h,w]` for every (picture, label) in `going [pictures,labels]`, in their order."""

    def denoise(z: Tensor, t: Tensor, slot: Tensor) -> Tensor:
        return engine.denoise(z, t, bank, slot)

    picture, label = (torch.from_numpy(cells).repeat(2) for cells in np.nonzero(going))
    which = torch.arange(2).repeat_interleave(len(picture) // 2)
    parts = []
    for rows in torch.arange(len(picture)).split(ROWS):
        draw = Draw(pair.t[which[rows]], pair.noise[which[rows]])
        parts.append(error_maps(denoise, engine.spec.schedule, latents[picture[rows]], draw, slots[label[rows]]).cpu())
    both: np.ndarray = torch.cat(parts).double().unflatten(0, (2, -1)).mean(0).numpy()
    return both


def answer_of(seen: np.ndarray, labels: list[str], elements: int, judging: Judging) -> Answer:
    """What a picture's errors and evidence `[looks,labels,2]` come to."""
    spent = ~np.isnan(seen[..., 0])
    p = race_of(seen[spent.any(1)], elements, judging).probabilities()
    best = int(p.argmax())
    return Answer(labels[best], float(p[best]), dict(zip(labels, p.tolist(), strict=True)), 2 * int(spent.sum()))
