"""The foreign judge: plain diffusers, which knows nothing of `cpserve`, on the same folder and adapter files."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from cpserve.adapter import Adapter
from cpserve.manifest import WEIGHTS


@cache
def pipeline(folder: Path, adapter: Adapter | None = None) -> Any:
    """diffusers' pipeline with the adapter's files loaded by diffusers' own loaders."""
    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        with tempfile.TemporaryDirectory() as place:
            for name, content in adapter.files().items():
                path = Path(place) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            pipe.load_lora_weights(place, weight_name=WEIGHTS)
            for concept in adapter.manifest.concepts:
                pipe.load_textual_inversion(Path(place) / "embeddings" / f"{concept.name}.safetensors")
                second = Path(place) / "embeddings_2" / f"{concept.name}.safetensors"
                if second.exists():
                    where = {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}
                    pipe.load_textual_inversion(second, **where)
                    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id  # as the card says
    return pipe


@torch.no_grad()
def unet_row(folder: Path, adapter: Adapter | None, text: str, z: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
    """The UNet's output `[4,h,w]` for one row: latents `z [4,h,w]`, timestep `t []`. The empty prompt is what guidance leaves."""
    pipe = pipeline(folder, adapter)
    both = pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    e, *pooled = both[0 if text else 1 :: 2]
    options = {"cross_attention_kwargs": {"scale": scale}} if adapter else {}
    if pooled:
        h, w = (pipe.vae_scale_factor * side for side in z.shape[1:])
        options["added_cond_kwargs"] = {"text_embeds": pooled[0], "time_ids": torch.tensor([[h, w, 0.0, 0.0, h, w]])}
    return pipe.unet(z[None], t, e, **options).sample[0]


def draw(
    folder: Path, adapter: Adapter | None, text: str, z: Tensor, sampler: type, steps: int, guidance: float
) -> Tensor:
    """Latents `[1,4,h,w]` as the whole pipeline draws them from the noise `z`."""
    pipe = pipeline(folder, adapter)
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    return pipe(text, latents=z, num_inference_steps=steps, guidance_scale=guidance, output_type="latent").images
