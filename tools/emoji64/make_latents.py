"""Compose the training pictures once and encode them: `latents.npy [N,4,16,16] float16` and `captions.txt`.

`python tools/emoji64/make_latents.py compose` (needs no autoencoder), then `... encode`.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from compose import Drawings, composite
from sources import WORK
from train_vae import CHECKPOINT, new_vae

PER_DRAWING = 72
BATCH = 256


def compose() -> None:
    drawings = Drawings()
    count = PER_DRAWING * len(drawings.names)
    pages = np.lib.format.open_memmap(WORK / "pages.npy", "w+", np.uint8, (count, 64, 64, 3))
    captions = []
    for row in range(count):
        pages[row], words = composite(np.random.default_rng((2, row)), drawings, row % len(drawings.names))
        captions.append(words)
        if row % 10000 == 0:
            print(f"{row}/{count}", flush=True)
    (WORK / "captions.txt").write_text("\n".join(captions) + "\n")


@torch.inference_mode()
def encode() -> None:
    vae = new_vae().eval()
    vae.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["vae"])
    pages = np.load(WORK / "pages.npy", mmap_mode="r")
    latents = np.empty((len(pages), 4, 16, 16), np.float16)
    for start in range(0, len(pages), BATCH):
        x = torch.from_numpy(pages[start : start + BATCH].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents[start : start + BATCH] = vae.encode(x).latent_dist.mean.float().numpy()
        if start % (BATCH * 40) == 0:
            print(f"{start}/{len(pages)}", flush=True)
    np.save(WORK / "latents.npy", latents)
    print(
        "mean",
        latents.mean((0, 2, 3)),
        "std",
        latents.std((0, 2, 3), dtype=np.float32),
        "std of all",
        latents.std(dtype=np.float32),
    )


if __name__ == "__main__":
    {"compose": compose, "encode": encode}[sys.argv[1]]()
