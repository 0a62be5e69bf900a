"""Pictures from prompts: one batch, any adapters, any engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cpserve.engine import Engine, on_grid
from cpserve.errors import EngineError
from cpserve.prompts import Prompt
from cpserve.sample import SAMPLERS, guided, starting_noise

ROWS = 32  # of one UNet call, guidance included: more gains nothing on a CPU and costs memory


@dataclass(frozen=True, eq=False)
class Drawn:
    """One picture and what made it."""

    image: Image.Image
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How to draw. `guidance` 1 means none; `size` in pixels, None for the base's own."""

    steps: int = 20
    guidance: float = 3.0
    negative: str = ""
    sampler: str = "dpm"
    size: int | None = None


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    drawing: Drawing | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Drawn]:
    """Draw each prompt with its seed. A picture depends on its prompt, seed and `drawing`, never on its neighbours.

    `progress(done, all)` counts UNet steps over all batches.

    Raises:
        EngineError: the size is not one that the engine draws.
        AdapterError: an adapter does not fit the base.
    """
    with engine.at_work():
        return _generate(engine, prompts, seeds, drawing or Drawing(), progress)


def _generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    drawing: Drawing,
    progress: Callable[[int, int], None] | None,
) -> list[Drawn]:
    at_once = max(1, ROWS // (1 if drawing.guidance == 1.0 else 2))
    jobs = list(zip(prompts, seeds, strict=True))
    batches = [jobs[i : i + at_once] for i in range(0, len(jobs), at_once)]
    drawn: list[Drawn] = []
    for number, batch in enumerate(batches):

        def step(done: int, steps: int, number: int = number) -> None:
            if progress:
                progress(number * steps + done, len(batches) * steps)

        pictures = on_grid(
            engine.decode(draw_latents(engine, [p for p, _ in batch], [s for _, s in batch], drawing, step))
        )
        drawn += [
            Drawn(Image.fromarray(pixels.numpy()), prompt.text, seed)
            for pixels, (prompt, seed) in zip(pictures, batch, strict=True)
        ]
    return drawn


@torch.no_grad()
def draw_latents(
    engine: Engine,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    drawing: Drawing,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents `[B,4,h,w]` of one batch."""
    spec = engine.spec
    side = spec.latent_size if drawing.size is None else drawing.size // spec.vae_factor
    if drawing.size is not None and drawing.size % (8 * spec.vae_factor) and drawing.size != spec.pixels:
        raise EngineError(
            f"{drawing.size} pixels cannot be drawn", hint=f"sizes are multiples of {8 * spec.vae_factor}"
        )
    empty = [Prompt(drawing.negative, p.adapter, p.scale) for p in prompts]
    bank, slots = engine.bank.packed([*prompts, *empty])
    mine, others = slots.chunk(2)
    denoise = guided(lambda z, t, slot: engine.denoise(z, t, bank, slot), mine, others, drawing.guidance)
    z = starting_noise(seeds, (spec.channels, side, side)).to(engine.device)
    return SAMPLERS[drawing.sampler](denoise, z, spec.schedule, drawing.steps, progress)
