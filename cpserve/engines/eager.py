"""The base model's own torch modules as an engine: the reference that every compiled engine is held to, and its fast mode."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cpserve.at_once import CELLS, PIXELS, few
from cpserve.base import BaseModel
from cpserve.engine import Engine
from cpserve.slope import SlopeOfError


class EagerEngine(Engine):
    """Runs torch modules, in float32, where they are."""

    kind = "eager"

    def __init__(self, base: BaseModel) -> None:
        super().__init__(base.spec)
        self.base = base
        self.device = base.device

    @torch.no_grad()
    def infer(self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor, *added: Tensor) -> Tensor:
        parts = few(CELLS, latents, timestep, slot, *added)
        return torch.cat([self._predicted(z, t, kv_bank, s, *a) for z, t, s, *a in parts])

    def _predicted(self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor, *added: Tensor) -> Tensor:
        output: Tensor = self.base.unet(latents, timestep, kv_bank, slot, *added)
        return output

    def infer_slopes(self, rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        slope = SlopeOfError(self.base.unet)
        return [slope(*row) for row in rows]

    @torch.no_grad()
    def encode_text(self, ids: Tensor, extra: Tensor) -> Tensor:
        return self.base.encode_text(ids.to(self.device), extra.to(self.device))

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        return torch.cat([self.base.encode_pictures(some.to(self.device)) for (some,) in few(PIXELS, pictures)])

    def decode(self, latents: Tensor) -> Tensor:
        cell = self.spec.vae_factor**2  # in pixels
        return torch.cat([self.base.decode(some) for (some,) in few(PIXELS // cell, latents)])


class CompileEngine(EagerEngine):
    """The UNet through `torch.compile`, in half precision; the rest runs once a prompt or a picture and stays as it is.

    What is lowered is a copy: `base` is left alone. Every new number of rows is compiled when it first comes; after the second
    torch takes the axis for free.
    """

    kind = "compile"

    def __init__(self, base: BaseModel) -> None:
        super().__init__(replace(base, unet=copy.deepcopy(base.unet)))
        dtype = half_precision(self.device)
        self.precision = str(dtype).removeprefix("torch.")
        self.base.unet.to(dtype).compile()

    def _predicted(self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor, *added: Tensor) -> Tensor:
        dtype = getattr(torch, self.precision)  # float16 and bfloat16 know no fractions of large numbers: t, sizes stay
        output: Tensor = self.base.unet(latents.to(dtype), timestep, kv_bank.to(dtype), slot, *added)
        return output.float()

    def infer_slopes(self, rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        dtype = getattr(torch, self.precision)
        as_it_is = SlopeOfError(self.base.unet.forward)  # the way back would be compiled anew
        return [
            as_it_is(z.to(dtype), t, kv.to(dtype), target.to(dtype), *added).float()
            for z, t, kv, target, *added in rows
        ]


def half_precision(device: torch.device) -> torch.dtype:
    """What a device multiplies fastest at the least loss; CPUs have no fast float16."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16
