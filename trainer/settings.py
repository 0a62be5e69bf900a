"""How a concept is learned: every number, its unit and where it comes from. Saved in the manifest of what it made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from cpserve.errors import TrainingError
from trainer.methods import METHODS

TEMPLATES = ("a photo of {}", "a picture of {}", "a drawing of {}", "{}")
"""Wordings that a concept is learned under: neutral, since nobody said what else its pictures show."""

PROTECTED = (
    *TEMPLATES, *(f"a photo of {{}} on a {c} background" for c in ("white", "red", "green", "blue")),
    "a {} on the table", "{} at night", "a small {}", "a big {} in the middle", "two pictures of {} side by side",
    "{} and a house", "the {} is blue", "what a lovely {}", "{} in the snow", "a close-up of {}", "a cartoon of {}",
    "{} with a hat", "a statue of {}", "a toy shaped like {}", "{} on the beach", "look at the {}",
)  # fmt: skip
"""Wordings whose K,V `null-space` keeps for earlier concepts. As users write others still, many different ones count for
more than each of them kept exactly (LOG.md)."""

NOUNS = (
    "person", "dog", "car", "tree", "chair", "bird", "flower", "woman", "boat", "cup", "mountain", "fish", "book", "child",
    "horse", "shoe", "cake", "train", "clock", "man", "bag", "ball", "hat", "table",
)  # fmt: skip
"""Ordinary things, whose prompts `null-space` keeps, too: what the base can draw, it is to go on drawing."""

UNSEEN = ("a {} in a garden at night", "my {}, seen from above", "an oil painting of {}", "{} next to a tree")
"""Wordings that nobody learns under and nothing protects: how far their K,V move says what a bound on the others is worth."""

UNSEEN_NOUNS = ("bridge", "crown", "guitar", "lion", "pizza", "rainbow", "robot", "snail")
"""Ordinary things that nothing protects, for the same."""

GENERIC_PROMPT = "a photo"
"""c_0, the pretrained concept that diffusion-classifier scores compare with."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Defaults fit the built-in base on two CPU cores. Marks as in docs/METHOD.md: [F] the paper, [B] what it builds
    on, [O] our own choice.
    """

    method: str = "null-space"
    """One of METHODS; the default is our own [O]."""
    rank: int = 16
    """Rank r of the K,V factors of one concept; alpha == r [B: Hu et al. 2022; O: the value]."""
    steps: int = 300
    """Optimiser steps a concept [O]."""
    batch: int = 8
    """Rows a step [O]."""
    accumulate: int = 1
    """Parts that a step's rows are run in, one after another, where memory is short (gradient accumulation). The Fisher of
    `ewc-dc` runs `dc_concepts` + 2 rows at once, whatever this says."""
    factor_rate: float = 1e-3
    """AdamW's rate for the factors A and B [O]."""
    token_rate: float = 1e-2
    """AdamW's rate for the learned token [B: textual inversion, Gal et al. 2023; O: the value]."""
    warm_up: int = 20
    """Steps over which the rate rises; then it falls to zero along a cosine [O]."""
    variants: int = 32
    """Crops and flips of each picture, made and encoded once [O]."""
    mirror: bool = True
    """Whether half of them are mirrored: not where left and right matter, as with letters [O]."""
    seed: int = 0
    """Of everything random: the same seed, pictures and threads give the same adapter, bit for bit."""
    ewc_lambda: float = 1e6
    """EWC's weight of the quadratic penalty, for `ewc` [B: the term; O: the value]."""
    dc_lambda: float = 10.0
    """The same for `ewc-dc` and `dsc+ewc-dc`, whose Fisher is that much larger [F: the term; O: the value]."""
    fisher_draws: int = 64
    """Draws of (picture, timestep, noise) for the Fisher information [O]."""
    fisher_decay: float = 1.0
    """Online EWC's gamma, `F <- gamma F + F_new` [O]."""
    dc_delta: float = 1.0
    """EWC-DC's weight of the diffusion-classifier terms in the Fisher's loss [O]."""
    dc_concepts: int = 5
    """Seen concepts that EWC-DC's scores compare with, k [F]; drawn once a concept [O]."""
    dsc_steps: int = 60
    """DSC's optimiser steps after learning [O]; each runs the UNet on 9 rows a picture, 3 of them with gradients."""
    dsc_batch: int = 8
    """Pictures a step of DSC [O]."""
    dsc_rate: float = 1e-3
    """AdamW's rate for the factors during DSC [O]."""
    dsc_scores: float = 0.01
    """DSC's a1 = a2: weight of the cross-entropies between the teachers' and the student's scores [F: the terms; O: the value]."""
    dsc_eps: float = 1.0
    """DSC's b1 = b2: weight of the distances between the teachers' and the student's eps, means over elements [O]."""
    c_lora_lambda: float = 100.0
    """C-LoRA's weight [B: the term; O: the value]."""
    prior_weight: float = 0.0
    """Weight of the loss on pictures of the class that the base drew (DreamBooth, Ruiz et al. 2023) [B]; 0: no such pictures."""
    prior_pictures: int = 32
    """Pictures of the class drawn for it [B: the term; O: the value]."""
    null_nouns: int = len(NOUNS)
    """Null space: of how many of NOUNS the prompts are protected [O]; 0 where nothing but concepts counts."""
    null_energy: float = 5e-2
    """Null space: the largest share of a protected prompt's state that may lie outside the basis [O]."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise TrainingError(f"there is no method {self.method!r}", hint=f"use one of {', '.join(METHODS)}")
        if not 0 <= self.seed < 2**32:
            raise TrainingError(f"seed is {self.seed}", hint="seed lies between 0 and 4294967295")
        if any(isinstance(v, float) and not math.isfinite(v) for v in asdict(self).values()):
            raise TrainingError("a setting is no finite number", hint="look at the numbers in --config")
        if any(isinstance(v, float) and v < 0 for v in asdict(self).values()):
            raise TrainingError("a rate or weight is negative", hint="look at the numbers in --config")
        for name in ("rank", "steps", "batch", "variants", "fisher_draws", "dsc_steps", "dsc_batch", "prior_pictures"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}", hint=f"{name} counts from 1")
        for name in ("warm_up", "dc_concepts", "null_nouns"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} is {getattr(self, name)}", hint=f"{name} counts from 0")
        if not 1 <= self.accumulate <= self.batch:
            raise TrainingError(
                f"accumulate is {self.accumulate}", hint=f"a step's {self.batch} rows make 1 to {self.batch} parts"
            )

    @classmethod
    def of(cls, values: dict[str, Any]) -> Settings:
        """From a configuration file's table.

        Raises:
            TrainingError: a key is unknown or has another type than its default.
        """
        kinds: dict[str, type] = {f.name: type(f.default) for f in fields(cls)}
        for key, value in values.items():
            if key not in kinds:
                raise TrainingError(f"there is no setting {key!r}", hint=f"settings are {', '.join(kinds)}")
            if type(value) not in {kinds[key], int if kinds[key] is float else kinds[key]}:
                raise TrainingError(f"{key} is {value!r}", hint=f"{key} is a {kinds[key].__name__}")
        return cls(**{key: kinds[key](value) for key, value in values.items()})

    def dump(self) -> dict[str, Any]:
        """As plain values, for the manifest."""
        return asdict(self)
