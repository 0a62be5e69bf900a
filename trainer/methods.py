"""What each method is made of: which factors move, what holds them back, and what is kept for the next concept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method as a list of parts that compose. Marks of docs/METHOD.md: [F] the paper, [B] what it builds on, [O] our own."""

    fresh: bool = False
    """New factors for each concept over the folded earlier ones; else the same factors are moved on [F]."""
    protect: bool = False
    """The new factors cannot act on the directions of known prompts (`penalties/null_space.py`) [O]."""
    overlap: bool = False
    """C-LoRA's penalty on elements that earlier updates use (`penalties/c_lora.py`) [B]."""
    fisher: str = ""
    """The quadratic penalty of EWC: with the Fisher of the `denoise` loss [B], or of the `dc` loss [F]."""
    consolidate: bool = False
    """Distil diffusion-classifier scores of the new and of past adapters afterwards (`consolidate.py`) [F]."""


BY_NAME = {
    "none": Method(),
    "fold": Method(fresh=True),
    "ewc": Method(fisher="denoise"),
    "ewc-dc": Method(fisher="dc"),
    "dsc": Method(consolidate=True),
    "dsc+ewc-dc": Method(fisher="dc", consolidate=True),
    "c-lora": Method(fresh=True, overlap=True),
    "null-space": Method(fresh=True, protect=True),
}
METHODS = tuple(BY_NAME)
