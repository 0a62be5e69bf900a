"""Stable-Diffusion-shaped pipelines at reduced width, with seeded random weights, as ordinary diffusers folders.

The configurations are those of Stable Diffusion 1.5, 2.1 and XL except for widths, the text encoders' depth and vocabulary,
and that the later two have two levels in place of four and three.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cpserve.adapter import Adapter
from cpserve.base import BaseSpec
from cpserve.manifest import ConceptEntry, Manifest

WORDS = ("a", "photo", "of", "dog", "cat", "red", "bowl", "on", "the", "moon")
RANK = 4
LATENT_SIZE = 8


@dataclass(frozen=True)
class Shape:
    """What tells one generation of Stable Diffusion from another; XL has a second text encoder of `second_width`."""

    prediction: str
    text_width: int
    activation: str
    widths: tuple[int, ...]
    unet: dict[str, Any] = field(default_factory=dict)
    scheduler: type = PNDMScheduler
    second_width: int = 0


SD15 = Shape("epsilon", 32, "quick_gelu", (32, 64, 64, 64), {"attention_head_dim": 8})
SD21 = Shape(
    "v_prediction",
    48,
    "gelu",
    (32, 64),
    {
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "upcast_attention": True,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    DDIMScheduler,
)
POOLED, SIZE_WIDTH = 40, 8  # of XL's pooled text, and of each of its six sizes
SDXL = Shape(
    "epsilon",
    32,
    "quick_gelu",
    (32, 64),
    {
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": POOLED + 6 * SIZE_WIDTH,
    },
    EulerDiscreteScheduler,
    second_width=48,
)
FULL_SD15 = replace(
    SD15,
    text_width=768,
    widths=(320, 640, 1280, 1280),
    unet={"attention_head_dim": 8, "layers_per_block": 2, "sample_size": 64},
)
"""Its UNet as it is: 860 million parameters."""
SHAPES = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}


def write_tokenizer(folder: Path, padding: str = "<|endoftext|>") -> int:
    """A CLIP tokenizer that knows letters and `WORDS`, in CLIP's own two files; how many ids it has."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.append(parts[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    settings = {"model_max_length": 77, "pad_token": padding, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


SCHEDULING: dict[type, dict[str, Any]] = {
    PNDMScheduler: {"set_alpha_to_one": False, "skip_prk_steps": True},
    DDIMScheduler: {"set_alpha_to_one": False},
    EulerDiscreteScheduler: {"timestep_spacing": "leading"},
}


def text_encoder(kind: Any, width: int, vocabulary: int, activation: str) -> Any:
    """A CLIP text encoder; one with a projection projects to `POOLED`."""
    made = kind(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act=activation,
            projection_dim=POOLED,
            bos_token_id=vocabulary - 2,
            eos_token_id=2,  # as real ones have it, whatever the tokenizer's is
            pad_token_id=vocabulary - 1,
        )
    )
    # fresh CLIP weights are so small that every prompt reads the same; learned ones are not
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def write_pipeline(folder: Path, shape: Shape, *, seed: int = 0, scaling_factor: float = 0.18215) -> Path:
    """The diffusers folder of a pipeline of this shape; the same seed gives the same weights."""
    vocabulary = write_tokenizer(folder / "tokenizer")
    levels = len(shape.widths)
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=shape.widths,
        cross_attention_dim=shape.text_width + shape.second_width,
        **{"sample_size": LATENT_SIZE, "layers_per_block": 1, **shape.unet},
    )
    vae = AutoencoderKL(
        block_out_channels=(16,) * levels,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        sample_size=LATENT_SIZE << (levels - 1),
        scaling_factor=scaling_factor,
    )
    parts = {
        "vae": vae,
        "unet": unet,
        "text_encoder": text_encoder(CLIPTextModel, shape.text_width, vocabulary, shape.activation),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": shape.scheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            prediction_type=shape.prediction,
            **SCHEDULING[shape.scheduler],
        ),
        "feature_extractor": None,
    }
    if shape.second_width:
        write_tokenizer(folder / "tokenizer_2", padding="!")
        parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        parts["text_encoder_2"] = text_encoder(CLIPTextModelWithProjection, shape.second_width, vocabulary, "gelu")
        StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(folder)
    else:
        StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False).save_pretrained(folder)
    # PNDM knows no clipping, but Stable Diffusion's file says it all the same, for the schedulers that do
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "clip_sample": False}))
    return folder


def make_adapter(spec: BaseSpec, seed: int, tokens: tuple[str, ...] = ("<dog>",)) -> Adapter:
    """An adapter on every K,V projection whose factors are random and not zero, and a random embedding a token."""
    draw = torch.Generator().manual_seed(seed)
    d = spec.sites.weight.shape[1]
    lora: dict[str, Tensor] = {}
    for site, projection, _ in spec.sites.parts:
        lora[site.key(projection, "A")] = 0.2 * torch.randn(RANK, d, generator=draw)
        lora[site.key(projection, "B")] = 0.2 * torch.randn(site.width, RANK, generator=draw)
    embeddings = {token: torch.randn(d, generator=draw) for token in tokens}
    concepts = tuple(
        ConceptEntry(
            name=token.strip("<>"), token=token, class_word=None, templates=("a photo of {}",), since=1, pictures=4
        )
        for token in tokens
    )
    manifest = Manifest(base=spec.entry, concepts=concepts, method="random")
    return Adapter(manifest, lora, embeddings, text_widths=spec.text_widths)


def outspoken(spec: BaseSpec) -> Adapter:
    """Three concepts whose words change every prediction, so that pictures need different numbers of evaluations to be told."""
    adapter = make_adapter(spec, 1, ("<dog>", "<cat>", "<rex>"))
    return replace(adapter, lora={n: factor * 100 if "lora_B" in n else factor for n, factor in adapter.lora.items()})
