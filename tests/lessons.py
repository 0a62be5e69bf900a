"""Lessons short enough for a test: concepts of noise, learned in a few steps."""

from __future__ import annotations

import io
import zipfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel
from cpserve.concept import Concept, Picture
from cpserve.prompts import tokenize
from trainer import Record, Settings, learn

QUICK = Settings(steps=6, batch=4, rank=4, variants=2, fisher_draws=3, warm_up=2, dsc_steps=3, dsc_batch=2)


def concept(name: str, seed: int = 0) -> Concept:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    return Concept(name, tuple(Picture(f"{i}.png", Image.fromarray(p)) for i, p in enumerate(pixels)))


def zipped(path: Path, seed: int, pictures: int = 2) -> Path:
    """A concept's pictures as a zip."""
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(pictures):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
            archive.writestr(f"{i}.png", buffer.getvalue())
    return path


def lineage(base: BaseModel, folder: Path, settings: Settings, *names: str) -> list[Adapter]:
    """The adapter after each concept, as it was then: copies, which nothing that is learned later can touch."""
    adapter = empty_adapter(base.spec.entry)
    past: list[Adapter] = []
    for number, name in enumerate(names):
        adapter = learn(base, concept(name, number), adapter, settings, Record(folder / f"{name}{number}"), past=past)
        past.append(deepcopy(adapter))
    return past


def learned(base: BaseModel, folder: Path, settings: Settings, *names: str) -> Adapter:
    return lineage(base, folder, settings, *names)[-1]


def packed_of(base: BaseModel, adapter: Adapter, texts: list[str]) -> torch.Tensor:
    """Packed K,V of prompts under an adapter."""
    sites = base.spec.sites
    ids = tokenize(base.spec.tokenizer, texts, adapter.tokens)
    e = base.encode_text(ids, adapter.extra_rows(sites.weight.shape[1]))
    return sites.project(e, adapter.lora)
