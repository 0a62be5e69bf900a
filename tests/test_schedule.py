"""The schedule's arithmetic is diffusers', row by row, and its conversions undo each other."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from cpserve.base import BaseModel
from cpserve.errors import BaseModelError
from cpserve.schedule import Schedule


@pytest.fixture
def rows() -> tuple[torch.Tensor, ...]:
    """`x0, noise [5,4,8,8]`, `t [5]`, a timestep of its own for each row."""
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 8, 8, generator=draw)
    return x0, noise, torch.tensor([0, 1, 250, 700, 999])


def test_noise_and_target_are_diffusers(base: BaseModel, rows: tuple[torch.Tensor, ...]) -> None:
    """Noised latents and training targets equal those of diffusers' scheduler."""
    schedule, judge = base.spec.schedule, DDPMScheduler.from_config(base.spec.schedule.config)
    x0, noise, t = rows
    target = noise if judge.config.prediction_type == "epsilon" else judge.get_velocity(x0, noise, t)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), judge.add_noise(x0, noise, t))
    torch.testing.assert_close(schedule.target(x0, noise, t), target)


def test_conversions_undo_each_other(base: BaseModel, rows: tuple[torch.Tensor, ...]) -> None:
    """A UNet that outputs the exact target speaks of the noise that was added and of the latents under it."""
    schedule = base.spec.schedule
    x0, noise, t = rows
    xt = schedule.add_noise(x0, noise, t)
    eps = schedule.eps(schedule.target(x0, noise, t), xt, t)
    torch.testing.assert_close(eps, noise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(schedule.x0(eps, xt, t), x0, atol=1e-4, rtol=1e-4)


def test_other_predictions_are_refused(base: BaseModel) -> None:
    """A base that predicts something else is refused by name."""
    with pytest.raises(BaseModelError, match="sample"):
        Schedule.from_config({**base.spec.schedule.config, "prediction_type": "sample"})


def test_a_schedule_that_ends_in_pure_noise_is_refused(base: BaseModel) -> None:
    """Where no signal is left, eps says nothing of the latents; such a schedule is refused, not divided by zero."""
    with pytest.raises(BaseModelError, match="signal"):
        Schedule.from_config({**base.spec.schedule.config, "rescale_betas_zero_snr": True})
