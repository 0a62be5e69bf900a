"""Names of diffusers turned back into those of the original Stable Diffusion checkpoints, to test reading one file."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1"}
_VAE |= {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
_VAE |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(pipeline: Any) -> dict[str, Tensor]:
    """The pipeline's weights as one original checkpoint."""
    made = {f"model.diffusion_model.{_unet_name(k, pipeline.unet)}": v for k, v in pipeline.unet.state_dict().items()}
    for key, value in pipeline.vae.state_dict().items():
        is_projection = "attentions" in key and key.endswith("weight") and "norm" not in key
        made[f"first_stage_model.{_vae_name(key, pipeline.vae)}"] = value[..., None, None] if is_projection else value
    prefix = "cond_stage_model.transformer.text_model."
    for key, value in pipeline.text_encoder.state_dict().items():
        made[prefix + key.removeprefix("text_model.")] = value
    return {k: v.contiguous() for k, v in made.items()}


def _replace(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = key.replace(f"{ours}.", f"{theirs}.") if key.startswith(f"{ours}.") or f".{ours}." in key else key
    return key


def _unet_name(key: str, unet: Any) -> str:
    layers, names = unet.config.layers_per_block, dict(_UNET)
    for i, up in enumerate(unet.up_blocks):
        for j in range(layers):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.1"
        for j in range(layers + 1):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{(layers + 1) * i + j}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{(layers + 1) * i + j}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
        place = 2 if hasattr(up, "attentions") else 1
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{(layers + 1) * i + layers}.{place}"
    key = _replace(key, _RESNET) if ".resnets." in key else key
    return _replace(key, names)


def _vae_name(key: str, vae: Any) -> str:
    last, names = len(vae.config.block_out_channels) - 1, dict(_VAE)
    for i in range(last + 1):
        for j in range(vae.config.layers_per_block + 1):
            names[f"down_blocks.{i}.resnets.{j}"] = f"down.{i}.block.{j}"
            names[f"up_blocks.{i}.resnets.{j}"] = f"up.{last - i}.block.{j}"
        names[f"down_blocks.{i}.downsamplers.0"] = f"down.{i}.downsample"
        names[f"up_blocks.{i}.upsamplers.0"] = f"up.{last - i}.upsample"
    return _replace(key, names)
