"""How programs call a LoRA's tensors: diffusers by the module's path, kohya's scripts by the path with underscores.

Knows names only. `Key` is the common tongue: a module's path in the UNet (`unet.`) or the text encoder (`text_encoder.`), and
which part of it the tensor is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["A", "B", "alpha"]
Format = Literal["diffusers", "kohya"]

# Modules whose own names hold underscores, so that kohya's names can be taken apart again; longer ones first.
_WORDS = (
    "transformer_blocks|down_blocks|up_blocks|mid_block|time_emb_proj|time_embedding|conv_shortcut|downsamplers|upsamplers|"
    "conv_norm_out|conv_in|conv_out|proj_in|proj_out|linear_1|linear_2|add_embedding|"
    "to_q|to_k|to_v|to_out|text_model|self_attn|q_proj|k_proj|v_proj|out_proj"
)
_WORD = re.compile(rf"({_WORDS}|[a-z0-9]+)(?:_|$)")

_KOHYA = re.compile(r"lora_(unet|te|te1)_([a-z0-9_]+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_DIFFUSERS = re.compile(
    r"(unet|text_encoder)\.([A-Za-z0-9_.]+?)(?:\.lora\.|\.lora_linear_layer\.|\.)"
    r"(lora_A\.weight|lora_B\.weight|down\.weight|up\.weight|alpha)"
)
_PROCESSOR = re.compile(r"\.processor\.(to_[a-z]+)_lora$")  # diffusers' first way
_PARTS: dict[str, Part] = {
    "lora_A.weight": "A",
    "down.weight": "A",
    "lora_down.weight": "A",
    "lora_B.weight": "B",
    "up.weight": "B",
    "lora_up.weight": "B",
    "alpha": "alpha",
}
_KOHYA_PARTS: dict[Part, str] = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}

OTHER_KINDS = {
    "hada_": "a LoHa, not a LoRA",
    "lokr_": "a LoKr, not a LoRA",
    "dora_scale": "a DoRA, not a LoRA",
    "lora_magnitude_vector": "a DoRA, not a LoRA",
    "lora_mid": "a LoCon with Tucker decomposition",
    "lora_te2_": "for SDXL, which has two text encoders",
    "text_encoder_2.": "for SDXL, which has two text encoders",
    "input_blocks_": "in the original names of SDXL's UNet",
    "transformer.": "for a transformer, not a UNet",
    "lora_transformer_": "for a transformer, not a UNet",
}
"""What a tensor's name gives away of files that are not taken."""


@dataclass(frozen=True)
class Key:
    """One tensor: `module` is `unet.` or `text_encoder.` and the path, `part` the factor A or B, or alpha."""

    module: str
    part: Part

    @property
    def diffusers(self) -> str:
        """diffusers' name today."""
        return f"{self.module}.alpha" if self.part == "alpha" else f"{self.module}.lora_{self.part}.weight"

    @property
    def kohya(self) -> str:
        """kohya's name, which ComfyUI and the WebUIs read."""
        root, _, path = self.module.partition(".")
        flat = path.replace(".", "_")
        return f"lora_{'unet' if root == 'unet' else 'te'}_{flat}.{_KOHYA_PARTS[self.part]}"


def parse_key(name: str) -> Key | None:
    """What a tensor is by its name, in any of these tongues; None where it is not understood."""
    if match := _KOHYA.fullmatch(name):
        path, root = _dotted(match[2]), "unet" if match[1] == "unet" else "text_encoder"
    elif match := _DIFFUSERS.fullmatch(name):
        path, root = _PROCESSOR.sub(lambda m: f".{m[1]}" + (".0" if m[1] == "to_out" else ""), match[2]), match[1]
    else:
        return None
    known = path and "lora" not in path.split(".")  # which is a part's sign, no module's name
    return Key(f"{root}.{path}", _PARTS[match[3]]) if known else None


def is_kv(module: str) -> bool:
    """Whether a module is a key or value projection of the UNet's cross-attention."""
    return module.startswith("unet.") and module.endswith((".attn2.to_k", ".attn2.to_v"))


def _dotted(flat: str) -> str | None:
    """A module's path from its name with underscores; None where a piece is no word."""
    pieces, at = [], 0
    while at < len(flat):
        match = _WORD.match(flat, at)
        if match is None:
            return None
        pieces.append(match[1])
        at = match.end()
    return ".".join(pieces)
