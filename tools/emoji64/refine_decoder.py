"""Train the autoencoder's decoder further on the cached latents; the encoder, hence every latent, stays as it is.

`python tools/emoji64/refine_decoder.py` resumes by itself and writes `$EMOJI64_WORK/decoder.pt`, which `write_model.py` takes.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from sources import WORK
from train_vae import CHECKPOINT, new_vae

STEPS, BATCH, PEAK_RATE = 6000, 16, 1e-3
REFINED = WORK / "decoder.pt"


def main() -> None:
    torch.manual_seed(0)
    vae = new_vae()
    vae.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["vae"])
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=STEPS, pct_start=0.03)
    first = 0
    if REFINED.exists():
        state = torch.load(REFINED, weights_only=True)
        vae.load_state_dict(state["vae"]), optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    latents, pages = np.load(WORK / "latents.npy", mmap_mode="r"), np.load(WORK / "pages.npy", mmap_mode="r")
    began, mean = time.time(), 0.0
    for step in range(first, STEPS):
        rows = np.sort(np.random.default_rng((4, step)).integers(len(latents), size=BATCH))
        z = torch.from_numpy(latents[rows].astype(np.float32))
        x = torch.from_numpy(pages[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(z).sample
        y = y.float()
        error = (y - x).abs().mean()
        edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        (error + 0.7 * edges).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step(), schedule.step(), optimiser.zero_grad()
        mean = 0.98 * mean + 0.02 * float(error.detach())
        if (step + 1) % 200 == 0 or step + 1 == STEPS:
            left = (STEPS - step - 1) * (time.time() - began) / (step + 1 - first)
            print(f"{step + 1}/{STEPS} error {mean:.4f} {left:.0f} s left", flush=True)
            state = {"vae": vae.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(state | {"schedule": schedule.state_dict(), "step": step + 1}, REFINED.with_suffix(".partial"))
            REFINED.with_suffix(".partial").replace(REFINED)


if __name__ == "__main__":
    main()
