"""Train the autoencoder (AutoencoderKL, 4x smaller, 4 channels). `python tools/emoji64/train_vae.py` resumes by itself."""

from __future__ import annotations

import time

import numpy as np
import torch
from compose import Drawings, composite
from diffusers import AutoencoderKL
from sources import WORK

STEPS, BATCH, PEAK_RATE = 1500, 24, 1.5e-3
CHECKPOINT = WORK / "vae.pt"


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip


def pictures(rng: np.random.Generator, drawings: Drawings, count: int) -> torch.Tensor:
    """`[count, 3, 64, 64]` in [-1, 1]."""
    made = [composite(rng, drawings, int(rng.integers(len(drawings.names))))[0] for _ in range(count)]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Error of pixels and of their gradients (edges), and a faint KL term."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
    error = (y - x).abs().mean() + 0.5 * edges
    kl = posterior.kl().mean() / x[0].numel()
    return error + 1e-4 * kl, error.detach()


def main() -> None:
    torch.manual_seed(0)
    vae, drawings = new_vae(), Drawings()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=STEPS, pct_start=0.05)
    first = 0
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT, weights_only=True)
        (
            vae.load_state_dict(state["vae"]),
            optimiser.load_state_dict(state["optimiser"]),
            schedule.load_state_dict(state["schedule"]),
        )
        first = state["step"]
    began, mean = time.time(), 0.0
    for step in range(first, STEPS):
        x = pictures(np.random.default_rng((1, step)), drawings, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            total, error = loss(vae, x)
        total.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step(), schedule.step(), optimiser.zero_grad()
        mean = 0.98 * mean + 0.02 * float(error)
        if (step + 1) % 100 == 0 or step + 1 == STEPS:
            left = (STEPS - step - 1) * (time.time() - began) / (step + 1 - first)
            print(f"{step + 1}/{STEPS} error {mean:.4f} {left:.0f} s left", flush=True)
            partial = CHECKPOINT.with_suffix(".partial")
            state = {
                "vae": vae.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
            }
            torch.save(state, partial)
            partial.replace(CHECKPOINT)


if __name__ == "__main__":
    main()
