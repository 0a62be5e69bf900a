"""The samplers are diffusers' in effect, and a picture depends on its seed alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from cpserve.engine import Engine
from cpserve.engines.eager import EagerEngine
from cpserve.errors import EngineError
from cpserve.prompts import Prompt
from cpserve.sample import COURSES, begin, ddim, dpm_solver, euler, guided, join, starting_noise, step, take
from cpserve.schedule import Schedule
from tests import plain
from tests.tiny import make_adapter

NOISE = (4, 8, 8)
JUDGES = {ddim: DDIMScheduler, dpm_solver: DPMSolverMultistepScheduler, euler: EulerDiscreteScheduler}
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULE = Schedule.from_config(CONFIG)


def draw(engine: Engine, prompts: list[Prompt], z: torch.Tensor, guidance: float, **how: object) -> torch.Tensor:
    """Latents of one batch; each prompt is guided away from the empty prompt under its own adapter."""
    empty = [Prompt("", p.adapter, p.scale) for p in prompts]
    bank, slots = engine.bank.packed([*prompts, *empty])
    denoise = guided(lambda x, t, slot: engine.denoise(x, t, bank, slot), *slots.chunk(2), guidance)
    sampler = how.pop("sampler", dpm_solver)
    return sampler(denoise, z, engine.spec.schedule, **how)


@pytest.mark.parametrize("sampler", JUDGES)
def test_samplers_equal_diffusers(eager: EagerEngine, folders: dict[str, Path], shape: str, sampler: object) -> None:
    """From the same noise, guided, under an adapter, diffusers' pipeline draws the same latents to 1e-4 of the largest.

    An untrained UNet throws latents up to 40 wide and multiplies what float32 rounds off. diffusers' Euler rounds numbers
    that are 12 times as large: guided by 4, the last bit of its noise alone moves its own picture by 3e-4 of the largest.
    """
    guidance = 1.0 if sampler is euler else 4.0
    adapter, text, z = make_adapter(eager.spec, 1), "a photo of <dog>", starting_noise([3], NOISE)
    ours = draw(eager, [Prompt(text, adapter)], z, guidance, sampler=sampler, steps=20)
    judge = plain.draw(folders[shape], ADAPTERS.setdefault(shape, adapter), text, z, JUDGES[sampler], 20, guidance)
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


def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Not a picture's, but one that depends on everything and on no other row."""
    return torch.sin(z) * (0.5 + t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 14, 25, 50])
@pytest.mark.parametrize("sampler", JUDGES)
def test_every_spacing_is_diffusers(sampler: object, steps: int, spacing: str) -> None:
    """With any timestep spacing, whole or fractional, each step is that of diffusers' scheduler."""
    config = {**CONFIG, "timestep_spacing": spacing, "steps_offset": 0 if spacing == "trailing" else 1}
    judge = JUDGES[sampler].from_config(config)
    judge.set_timesteps(steps)
    noise = starting_noise([5], NOISE)
    z = noise * judge.init_noise_sigma
    for t in judge.timesteps:
        z = judge.step(denoise(judge.scale_model_input(z, t), t.view(1).float()), t, z).prev_sample
    ours = sampler(denoise, noise, Schedule.from_config(config), steps)
    torch.testing.assert_close(ours, z, atol=1e-4 * max(1.0, float(z.abs().max())), rtol=0)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(COURSES)), st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=6)
)
def test_rows_enter_and_leave_between_steps(pictures: list[tuple[str, int, int]]) -> None:
    """Pictures of any sampler and step count, each entering when it likes and leaving when done, equal those drawn alone."""
    noise = starting_noise(range(len(pictures)), NOISE)
    finished: dict[int, torch.Tensor] = {}
    running, numbers, now = None, [], 0
    while len(finished) < len(pictures):
        for i, (sampler, steps, enters) in enumerate(pictures):
            if enters == now:
                new = begin(noise[i : i + 1], COURSES[sampler](SCHEDULE, steps))
                running, numbers = (join(running, new) if numbers else new), [*numbers, i]
        now += 1
        if not numbers:
            continue
        running = step(denoise, running)
        ended = running.finished
        finished |= {n: running.z[k] for k, n in enumerate(numbers) if ended[k]}
        running = take(running, [k for k, end in enumerate(ended) if not end])
        numbers = [n for n in numbers if n not in finished]
    for i, (sampler, steps, _) in enumerate(pictures):
        rows = begin(noise[i : i + 1], COURSES[sampler](SCHEDULE, steps))
        for _ in range(steps):
            rows = step(denoise, rows)
        assert rows.finished == (True,)
        torch.testing.assert_close(finished[i], rows.z[0], atol=1e-5, rtol=1e-5)


def test_a_finished_row_cannot_go_on() -> None:
    """A row past its last step is an error that says how to take it out."""
    rows = step(denoise, begin(starting_noise([0], NOISE), COURSES["ddim"](SCHEDULE, 1)))
    with pytest.raises(EngineError) as refused:
        step(denoise, rows)
    assert refused.value.hint


def test_guidance_may_differ_by_row() -> None:
    """Each row may have a guidance of its own, and gets what it gets alone."""

    def denoise_slots(z: torch.Tensor, t: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        return denoise(z, t) + slot.view(-1, 1, 1, 1)

    z, t, slots, empty = starting_noise([0, 1], NOISE), torch.tensor([3.0, 800.0]), torch.arange(2), torch.arange(2) + 5
    together = guided(denoise_slots, slots, empty, torch.tensor([1.5, 7.0]))(z, t)
    for i, guidance in enumerate((1.5, 7.0)):
        one = slice(i, i + 1)
        alone = guided(denoise_slots, slots[one], empty[one], guidance)(z[one], t[one])
        torch.testing.assert_close(together[one], alone)
