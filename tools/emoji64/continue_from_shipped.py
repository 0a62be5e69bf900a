"""Begin again where the shipped weights left off, on a machine without the checkpoints.

`python tools/emoji64/continue_from_shipped.py` writes `vae.pt`, `decoder.pt` and `model.pt` out of the shipped folder, for
`make_latents.py encode` and `train.py`. The tokenizer is the shipped one; optimisers start afresh.
"""

from __future__ import annotations

import shutil

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from refine_decoder import REFINED
from sources import WORK
from tokenizer import FOLDER, load
from train import Optimiser, TextToImage
from train_vae import CHECKPOINT
from transformers import CLIPTextModel
from write_model import SHIPPED


def main() -> None:
    for path in (CHECKPOINT, REFINED, WORK / "model.pt", FOLDER):
        if path.exists():
            raise SystemExit(f"{path} is here already: go on with train.py")
    shutil.copytree(SHIPPED / "tokenizer", FOLDER)
    vae = AutoencoderKL.from_pretrained(SHIPPED / "vae").float().state_dict()
    torch.save({"vae": vae}, CHECKPOINT)
    torch.save({"vae": vae}, REFINED)
    tokenizer = load()
    model = TextToImage(len(tokenizer), tokenizer.eos_token_id)
    model.text.load_state_dict(CLIPTextModel.from_pretrained(SHIPPED / "text_encoder").float().state_dict())
    model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(SHIPPED / "unet").float().state_dict())
    weights = model.state_dict()
    state = {"model": weights, "average": weights, "optimiser": Optimiser(model).state_dict(), "step": 0}
    torch.save(state, WORK / "model.pt")


if __name__ == "__main__":
    main()
