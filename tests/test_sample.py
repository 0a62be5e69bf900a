"""The samplers are diffusers' in effect, and a picture depends on its seed alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from cpserve.engine import Engine
from cpserve.engines.eager import EagerEngine
from cpserve.prompts import Prompt
from cpserve.sample import ddim, dpm_solver, guided, starting_noise
from tests import plain
from tests.tiny import make_adapter

NOISE = (4, 8, 8)
JUDGES = {ddim: DDIMScheduler, dpm_solver: DPMSolverMultistepScheduler}


def draw(engine: Engine, prompts: list[Prompt], z: torch.Tensor, guidance: float, **how: object) -> torch.Tensor:
    """Latents of one batch; each prompt is guided away from the empty prompt under its own adapter."""
    empty = [Prompt("", p.adapter, p.scale) for p in prompts]
    bank, slots = engine.bank.packed([*prompts, *empty])
    denoise = guided(lambda x, t, slot: engine.denoise(x, t, bank, slot), *slots.chunk(2), guidance)
    sampler = how.pop("sampler", dpm_solver)
    return sampler(denoise, z, engine.spec.schedule, **how)


@pytest.mark.parametrize("steps", [7, 20, 50])
@pytest.mark.parametrize("sampler", JUDGES)
def test_samplers_equal_diffusers(
    eager: EagerEngine, folders: dict[str, Path], shape: str, sampler: object, steps: int
) -> None:
    """From the same noise, guided, under an adapter, diffusers' pipeline draws the same latents to 1e-4 of the largest.

    An untrained UNet throws latents up to 40 wide and multiplies what float32 rounds off.
    """
    adapter, text, z = make_adapter(eager.spec, 1), "a photo of <dog>", starting_noise([3], NOISE)
    ours = draw(eager, [Prompt(text, adapter)], z, 4.0, sampler=sampler, steps=steps)
    judge = plain.draw(folders[shape], ADAPTERS.setdefault(shape, adapter), text, z, JUDGES[sampler], steps, 4.0)
    torch.testing.assert_close(ours, judge, atol=1e-4 * max(1.0, float(judge.abs().max())), rtol=0)


ADAPTERS: dict[str, object] = {}  # so that the judge loads an adapter once


def test_a_picture_depends_on_its_seed_alone(eager: EagerEngine) -> None:
    """The picture of seed 7 is the same alone and among others with other prompts and adapters."""
    adapter = make_adapter(eager.spec, 1)
    seven = Prompt("a photo of <dog>", adapter)
    alone = draw(eager, [seven], starting_noise([7], NOISE), 4.0, steps=5)
    noise = starting_noise([1, 7, 2], NOISE)
    assert torch.equal(noise[1:2], starting_noise([7], NOISE))
    among = draw(eager, [Prompt("a cat"), seven, Prompt("a cat", make_adapter(eager.spec, 2))], noise, 4.0, steps=5)
    torch.testing.assert_close(eager.decode(among)[1:2], eager.decode(alone), atol=1e-4, rtol=0)


def test_guidance_one_asks_for_the_prompt_only() -> None:
    """At guidance 1 the empty prompt has no weight, so its rows are not computed."""
    batches = []

    def denoise_slots(z: torch.Tensor, _t: torch.Tensor, _slot: torch.Tensor) -> torch.Tensor:
        batches.append(len(z))
        return z

    for guidance in (1.0, 3.0):
        guided(denoise_slots, torch.zeros(2), torch.zeros(2), guidance)(torch.zeros(2, *NOISE), torch.zeros(2))
    assert batches == [2, 4]


@pytest.mark.parametrize("sampler", JUDGES)
def test_progress_counts_every_step(eager: EagerEngine, sampler: object) -> None:
    """A sampler reports each of its steps once, in order."""
    seen = []
    draw(
        eager,
        [Prompt("")],
        starting_noise([0], NOISE),
        1.0,
        sampler=sampler,
        steps=4,
        progress=lambda i, n: seen.append((i, n)),
    )
    assert seen == [(i, 4) for i in (1, 2, 3, 4)]
