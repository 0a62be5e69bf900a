"""C-LoRA's penalty: `lambda || |sum_{i<n} B_i A_i| * (B_n A_n) ||_F^2`, elementwise (Smith et al. 2024, "Continual Diffusion")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cpserve.prompt_kv import KVSites


@dataclass(frozen=True, eq=False)
class Overlap:
    """`past` is `|sum_{i<n} B_i A_i|` `[C,d]` by the keys of its factors A and B."""

    past: Mapping[tuple[str, str], Tensor]
    weight: float

    @classmethod
    def of(cls, sites: KVSites, lora: Mapping[str, Tensor], weight: float) -> Overlap:
        """From the folded earlier updates."""
        return cls({pair: update.abs() for pair, update in updates(sites, lora).items()}, weight)

    def term(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The penalty, a scalar."""
        parts = [(past * (parameters[b] @ parameters[a])).pow(2).sum() for (a, b), past in self.past.items()]
        return self.weight * torch.stack(parts).sum()


def updates(sites: KVSites, lora: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """`B A` `[C,d]` of every projection that a LoRA changes, by the keys of its factors A and B."""
    pairs = [(site.key(projection, "A"), site.key(projection, "B")) for site, projection, _ in sites.parts]
    return {(a, b): lora[b].float() @ lora[a].float() for a, b in pairs if a in lora}
