"""The header of a LoRA's file, as diffusers writes it: ranks and alphas, so that no loader has to guess the scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ROOTS = ("unet", "text_encoder")  # the models that a module's path begins with


def lora_header(ranks: Mapping[str, int]) -> dict[str, str]:
    """The metadata for safetensors, given each module's rank; every alpha is the rank.

    One entry and no more: safetensors writes several in an order of chance, and equal adapters are to be equal files.
    """
    told: dict[str, Any] = {}
    for root in ROOTS:
        own = {m.removeprefix(f"{root}."): rank for m, rank in ranks.items() if m.startswith(f"{root}.")}
        if own:
            usual = max(own.values())
            odd = {module: rank for module, rank in own.items() if rank != usual}
            told |= {f"{root}.r": usual, f"{root}.lora_alpha": usual, f"{root}.target_modules": sorted(own)}
            told |= {f"{root}.rank_pattern": odd, f"{root}.alpha_pattern": odd}
    return {"lora_adapter_metadata": json.dumps(told, sort_keys=True)} if told else {}
