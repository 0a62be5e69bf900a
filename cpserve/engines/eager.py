"""The base model's own torch modules as an engine: the reference that every compiled engine is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from cpserve.base import BaseModel
from cpserve.engine import Engine


class EagerEngine(Engine):
    """Runs torch modules, in float32, where they are."""

    kind = "eager"

    def __init__(self, base: BaseModel) -> None:
        super().__init__(base.spec)
        self.base = base

    @torch.no_grad()
    def infer(self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor, *added: Tensor) -> Tensor:
        output: Tensor = self.base.unet(latents, timestep, kv_bank, slot, *added)
        return output

    @torch.no_grad()
    def encode_text(self, ids: Tensor, extra: Tensor) -> Tensor:
        return self.base.encode_text(ids, extra)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        return self.base.encode_pictures(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        return self.base.decode(latents)
