"""Laws of the bound that learns all concepts at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.joint import Joint, learn_jointly
from cpserve.base import BaseModel
from tests.lessons import QUICK, concept, packed_of
from trainer.lora import start_token


def test_every_token_is_learned(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """All tokens move from where they began, the factors move, and the same call gives the same adapter."""
    base, names = bases["sd21"], ("dog", "cat", "bowl")
    asked = [concept(name, number) for number, name in enumerate(names)]
    adapter = learn_jointly(base, asked, QUICK, tmp_path / "one")
    assert adapter.tokens == ["<dog>", "<cat>", "<bowl>"]
    for j, token in enumerate(adapter.tokens):
        assert (adapter.embeddings[token] - start_token(base, None, QUICK.seed + j)).abs().max() > 1e-3
    assert all(t.abs().max() > 0 for key, t in adapter.lora.items() if ".lora_B." in key)
    again = learn_jointly(base, asked, QUICK, tmp_path / "two")
    assert again.content_hash == adapter.content_hash
    assert torch.isfinite(packed_of(base, adapter, ["a photo of <dog> and <bowl>"])).all()


def test_pictures_are_learned_under_their_own_concept() -> None:
    """Each row's prompt is one of the wordings of the concept that the row shows."""
    seen: list[torch.Tensor] = []

    class Watched(Joint):
        def _losses(self, x0: torch.Tensor, slot: torch.Tensor, *_: object) -> Iterator[torch.Tensor]:
            seen.append(torch.stack([x0, slot]))
            return iter(())

    unused: Any = None
    latents, ids = torch.arange(3).repeat_interleave(5), torch.zeros(12, 8)
    task = Watched(unused, QUICK, latents, ids, unused, unused, templates=4, captions=unused)
    for step in range(20):
        task.losses(step)
    concepts, slots = torch.cat(seen, 1)
    assert torch.equal(slots // 4, concepts)
    assert slots.unique().tolist() == list(range(12))
