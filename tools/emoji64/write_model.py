"""Write the trained weights as an ordinary diffusers folder in fp16. `python tools/emoji64/write_model.py [FOLDER] [CHECKPOINT]`.

Latents were brought to zero mean and unit variance by channel for training; that is folded into the autoencoder's 1x1
convolutions here, so that its scaling factor is 1 and no loader has to know.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from refine_decoder import REFINED
from sources import WORK
from tokenizer import load
from train import TextToImage, new_scheduler
from train_vae import CHECKPOINT, new_vae

SHIPPED = Path(__file__).parents[2] / "cpserve" / "models" / "emoji64"


@torch.no_grad()
def normalised_vae(mean: torch.Tensor, std: torch.Tensor) -> AutoencoderKL:
    vae = new_vae()
    vae.load_state_dict(torch.load(REFINED if REFINED.exists() else CHECKPOINT, weights_only=True)["vae"])
    mean, std = mean.flatten(), std.flatten()
    into, out = vae.quant_conv, vae.post_quant_conv
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.weight[:4] /= std.view(-1, 1, 1, 1)
    into.bias[4:] -= 2 * std.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)
    return vae


def main(folder: Path, checkpoint: str) -> None:
    state, tokenizer = torch.load(WORK / checkpoint, weights_only=True), load()
    model = TextToImage(len(tokenizer), tokenizer.eos_token_id)
    model.load_state_dict(state["average"])
    pipeline = StableDiffusionPipeline(
        vae=normalised_vae(state["mean"], state["std"]), text_encoder=model.text, tokenizer=tokenizer, unet=model.unet,
        scheduler=new_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(folder)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.copy(Path(__file__).with_name("model_card.md"), folder / "README.md")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"step {state['step']}: {size / 1e6:.1f} MB in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED, sys.argv[2] if len(sys.argv) > 2 else "cooled.pt")
