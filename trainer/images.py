"""A concept's pictures as latents: crops and flips, encoded once. The pictures themselves are not needed afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cpserve.at_once import PIXELS, few
from cpserve.base import BaseModel
from cpserve.concept import Concept

SMALLEST_CROP = 0.85  # of the shorter side: less and small pictures lose their subject


def variant(image: Image.Image, side: int, rng: np.random.Generator, *, mirror: bool) -> Image.Image:
    """A random square crop of at least SMALLEST_CROP of the shorter side, near the middle; half of them mirrored, if any are."""
    shorter = min(image.size)
    size = shorter * rng.uniform(SMALLEST_CROP, 1.0)
    left = (image.width - size) / 2 + (shorter - size) * rng.uniform(-0.5, 0.5)
    top = (image.height - size) / 2 + (shorter - size) * rng.uniform(-0.5, 0.5)
    crop = image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + size, top + size))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 and mirror else crop


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """`[B,3,H,W]` in [-1, 1]."""
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def digest(concept: Concept) -> str:
    """A hash of a concept's pictures and captions."""
    sha = hashlib.sha256()
    for picture in concept.pictures:
        sha.update(f"{picture.image.size}{picture.caption}".encode() + picture.image.tobytes())
    return sha.hexdigest()


def encode_pictures(base: BaseModel, images: Sequence[Image.Image], batch: int = 32) -> Tensor:
    """Latents `[B,4,h,w]` of unit scale of pictures at the base's size, on the CPU."""
    parts = (to_tensor(images[i : i + batch]) for i in range(0, len(images), batch))
    return torch.cat(
        [base.encode_pictures(some.to(base.device)).cpu() for part in parts for (some,) in few(PIXELS, part)]
    )


def encode_concept(base: BaseModel, concept: Concept, variants: int, seed: int, *, mirror: bool = True) -> Tensor:
    """Latents `[pictures * variants, 4, h, w]` of unit scale, picture by picture."""
    made = []
    for number, picture in enumerate(concept.pictures):
        rng = np.random.default_rng((seed, number))
        made += [variant(picture.image, base.spec.pixels, rng, mirror=mirror) for _ in range(variants)]
    return encode_pictures(base, made)
