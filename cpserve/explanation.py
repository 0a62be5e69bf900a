"""Where in a picture two labels differ: whose prediction of the noise is nearer, cell by cell of the latents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw

from cpserve.adapter import Adapter
from cpserve.elimination import smoothed
from cpserve.engine import Engine
from cpserve.prompts import Prompt
from cpserve.recognition import NONE, Answer, Judging, draws_of, labels_of, latents_of, square
from cpserve.score import Draw, predictions

SIDE = 256  # pixels of each of the two pictures
LINE = 20  # pixels of the words below
FIRST, SECOND = (40, 110, 230), (235, 120, 20)  # blue and orange, which the colour-blind tell apart


@torch.no_grad()
def difference(
    engine: Engine, image: Image.Image, adapter: Adapter, labels: tuple[str, str], judging: Judging
) -> np.ndarray:
    """By how much the second label's squared error exceeds the first's, `[h,w]` float32, summed over channels, mean over draws, in
    the regions that `classify` compares them in: where either is better than c_0. Positive cells speak for the first label.

    Raises:
        KeyError: the adapter has no such label.
    """
    prompts = labels_of(adapter, replace(judging, none=True))
    bank, slots = engine.bank.packed([Prompt(prompts[label], adapter) for label in (*labels, NONE)])
    latents = latents_of(engine, [image])
    plan = draws_of(engine, judging, latents)
    total = torch.zeros(3, *latents.shape[-2:])
    for t, noise in zip(plan.t, plan.noise, strict=True):
        draw = Draw(t[None], noise[None])
        eps = predictions(lambda z, t, s: engine.denoise(z, t, bank, s), engine.spec.schedule, latents, draw, slots)
        total += (draw.noise - eps[0]).pow(2).sum(1).cpu()
    first, second, generic = (total / len(plan.t)).numpy()
    better = smoothed(generic - np.stack([first, second]))
    found: np.ndarray = (second - first) * (better.max(0) > 0)
    return found


def explained(image: Image.Image, answer: Answer, cells: np.ndarray, second: str) -> Image.Image:
    """The picture, and beside it what speaks for its label (blue) and for the `second` (orange)."""
    picture = square(image, SIDE)
    strength = np.abs(cells) / max(float(np.abs(cells).max()), 1e-30)
    mask = Image.fromarray(np.uint8(strength * 230)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    side = Image.fromarray(np.uint8(cells > 0) * 255).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    colours = Image.composite(Image.new("RGB", (SIDE, SIDE), FIRST), Image.new("RGB", (SIDE, SIDE), SECOND), side)
    page = Image.new("RGB", (2 * SIDE, SIDE + LINE), "white")
    page.paste(picture, (0, 0))
    page.paste(Image.composite(colours, picture.convert("L").convert("RGB"), mask), (SIDE, 0))
    words = ImageDraw.Draw(page)
    for x, label, colour in ((4, answer.label, FIRST), (SIDE + 4, second, SECOND)):
        words.text((x, SIDE + 4), f"{label}  {answer.probabilities[label]:.3f}", fill=colour)
    return page
