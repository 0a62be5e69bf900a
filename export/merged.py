"""LoRAs of any layer (a style, a speed-up) folded into a base's weights; concept adapters stay live on top of them.

Reading is diffusers' own: its files and kohya's, UNet and text encoder. Only safetensors are read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cpserve.base import BaseModel, quiet
from cpserve.bundle import MergedEntry, file_entry
from cpserve.errors import AdapterError, first_line
from cpserve.manifest import WEIGHTS
from cpserve.prompt_kv import KVSites, PackedUNet, pack_unet
from cpserve.text_encoder import COMPONENTS, PIPELINES, TextEncoder


@dataclass(frozen=True)
class Lora:
    """A .safetensors file, or a folder that holds diffusers' one, and how much of it to add."""

    path: Path
    scale: float = 1.0

    @property
    def file(self) -> Path:
        return self.path / WEIGHTS if self.path.is_dir() else self.path

    def entry(self) -> MergedEntry:
        """What a bundle's key knows of it: its content, not its name.

        Raises:
            AdapterError: there is no such file, or it is no safetensors file.
        """
        if self.file.suffix != ".safetensors" or not self.file.is_file():
            raise AdapterError(
                f"{self.path} is no LoRA's .safetensors file, nor a folder with a {WEIGHTS}",
                hint="name a file, a folder that holds one, or a stored version: name@v1, hf://user/repo@v1",
            )
        return MergedEntry(sha256=file_entry(self.file.parent, self.file).sha256, scale=self.scale)


def merge(base: BaseModel, loras: Sequence[Lora]) -> BaseModel:
    """The base with LoRAs folded in, in order; `base` itself stays as it is. Its fingerprint too: adapters still fit.

    Raises:
        AdapterError: one cannot be read, or does not fit the base.
    """
    if not loras:
        return base
    text_encoder = copy.deepcopy(base.text_encoder)
    pipeline = _pipeline(base, text_encoder)
    for lora in loras:
        lora.entry()
        with quiet():
            _fold(pipeline, text_encoder, lora)
    sites = KVSites.of(pipeline.unet)  # which may have changed, too
    pack_unet(pipeline.unet, sites)
    for module in (pipeline.unet, text_encoder):
        module.requires_grad_(requires_grad=False).eval()
    spec = replace(base.spec, sites=sites)
    return replace(base, spec=spec, unet=PackedUNet(pipeline.unet), text_encoder=text_encoder)


def _pipeline(base: BaseModel, text_encoder: TextEncoder) -> Any:
    """A copy of the base's UNet, and the text encoders as they are, in diffusers' pipeline, which knows how to fold."""
    import diffusers

    parts: dict[str, Any] = {"vae": base.vae, "unet": copy.deepcopy(base.unet.unet), "feature_extractor": None}
    parts["scheduler"] = diffusers.DDIMScheduler.from_config(base.spec.schedule.config)
    for encoder, (name, tokenizer) in zip(text_encoder.encoders, COMPONENTS, strict=False):
        parts |= {name: encoder, tokenizer: base.spec.tokenizer}
    kind = PIPELINES[len(text_encoder.encoders) - 1]
    if kind == PIPELINES[0]:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    with quiet():
        return getattr(diffusers, kind)(**parts)


def _fold(pipeline: Any, text_encoder: TextEncoder, lora: Lora) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    where = {"pretrained_model_name_or_path_or_dict": str(lora.file.parent), "weight_name": lora.file.name}
    misfit = f"{lora.path} cannot be merged into this base"
    hint = "merge LoRAs that were made for this base model's architecture"
    known = {"unet_config": pipeline.unet.config}  # so that the names of SDXL's original UNet are understood
    try:
        state = pipeline.lora_state_dict(**where, **known, use_safetensors=True, local_files_only=True)
        pipeline.load_lora_weights(**where, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        raise AdapterError(f"{misfit}: {first_line(error)}", hint=hint) from error
    wanted = sum(
        name.endswith((".lora_A.weight", ".down.weight")) for name in (state[0] if isinstance(state, tuple) else state)
    )
    modules = [*pipeline.unet.modules(), *text_encoder.modules()]
    found = sum(isinstance(module, BaseTunerLayer) for module in modules)
    if found != wanted or not found:  # diffusers would leave the others out without an error
        raise AdapterError(f"{misfit}: it has {wanted} layers, of which the base knows {found}", hint=hint)
    try:
        pipeline.fuse_lora(lora_scale=lora.scale, safe_fusing=True)
    except ValueError as error:
        raise AdapterError(f"{lora.path} holds numbers that are not finite", hint="take another file") from error
    pipeline.unload_lora_weights()
