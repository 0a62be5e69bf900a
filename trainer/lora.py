"""What is trained: the K,V factors and one token's embedding, over an adapter that stays as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cpserve.adapter import Adapter, Tensors
from cpserve.base import BaseModel
from cpserve.prompt_kv import KVSites

START_NOISE = 0.02


@dataclass(frozen=True, eq=False)
class Trainable:
    """`factors` by diffusers' key and `token [d]`; `frozen` is an earlier adapter's LoRA that they add to.

    `complement [d,d]`, where given, is `I - Q Q^T`: the factors then see only what lies outside the protected directions.
    """

    sites: KVSites
    factors: dict[str, Tensor]
    token: Tensor
    frozen: Tensors
    complement: Tensor | None = None

    def packed(self, e: Tensor) -> Tensor:
        """Packed K,V `[P,S,W]` of text states `[P,S,d+D]`, differentiable in the factors and in e."""
        packed = self.sites.project(e, self.frozen)
        seen, pooled = self.sites.split(e)
        change = self.sites.project_change(seen if self.complement is None else seen @ self.complement, self.factors)
        return packed + nn.functional.pad(change, (0, pooled.shape[-1]))

    def lora(self) -> dict[str, Tensor]:
        """Everything learned as one LoRA: ranks of the frozen part and of the factors concatenated."""
        mine = {k: t.detach() for k, t in self.factors.items()}
        if self.complement is not None:
            mine = {k: t @ self.complement if ".lora_A." in k else t for k, t in mine.items()}
        return fold(self.frozen, mine)


def fold(first: Tensors, second: Tensors) -> dict[str, Tensor]:
    """The LoRA whose change is the sum of both: `[B1 B2] [A1; A2]`."""
    joined = dict(first)
    for key, tensor in second.items():
        axis = 0 if ".lora_A." in key else 1
        joined[key] = torch.cat([joined[key], tensor], axis) if key in joined else tensor
    return {key: tensor.contiguous() for key, tensor in joined.items()}


def recompress(sites: KVSites, lora: Tensors) -> dict[str, Tensor]:
    """The same change at the smallest rank: exact, by SVD, wherever the rank has passed what `C x d` can hold."""
    made = dict(lora)
    for site, projection, _ in sites.parts:
        a_key, b_key = site.key(projection, "A"), site.key(projection, "B")
        if a_key in made and len(made[a_key]) > min(site.width, made[a_key].shape[1]):
            u, s, v = torch.linalg.svd(made[b_key].double() @ made[a_key].double(), full_matrices=False)
            made[b_key], made[a_key] = (u * s).float().contiguous(), v.float().contiguous()
    return made


def fresh_factors(sites: KVSites, rank: int, seed: int) -> dict[str, Tensor]:
    """New factors: A random, B zero, so that training starts from no change (Hu et al. 2022)."""
    generator = torch.Generator().manual_seed(seed)
    d = sites.weight.shape[1]
    made = {}
    for site, projection, _ in sites.parts:
        made[site.key(projection, "A")] = torch.randn(rank, d, generator=generator) / d**0.5
        made[site.key(projection, "B")] = torch.zeros(site.width, rank)
    return made


def rank_of(lora: Tensors) -> int:
    """The largest rank of any layer; 0 of no LoRA."""
    return max((len(t) for k, t in lora.items() if ".lora_A." in k), default=0)


def start_token(base: BaseModel, class_word: str | None, seed: int) -> Tensor:
    """The new token's embedding `[d]`: that of the class word where given, else the mean of all, plus a little noise."""
    table = base.text_encoder.table
    ids = base.spec.tokenizer(class_word or "", add_special_tokens=False).input_ids
    centre = (table[ids] if ids else table).mean(0)
    noise = torch.randn(centre.shape, generator=torch.Generator().manual_seed(seed))
    return (centre.float() + START_NOISE * table.std() * noise.to(table.device)).detach()


def states(base: BaseModel, ids: Tensor, earlier: Tensor, token: Tensor) -> Tensor:
    """Text states `[P,S,d+D]`, the new token's row after the earlier tokens' `[E,d]`. Differentiable in `token`."""
    return base.encode_text(ids.to(token.device), torch.cat([earlier, token[None]]))


def trainable(
    base: BaseModel, start: Adapter, token: Tensor, rank: int, seed: int, basis: Tensor | None, *, fresh: bool
) -> Trainable:
    """Set up training on top of `start`: fresh factors over its frozen LoRA, or its own factors moved on.

    All tensors given are where the base is, and so are those made.
    """
    sites = replace(base.spec.sites, weight=base.spec.sites.weight.to(base.device))
    go_on = bool(start.lora) and not fresh
    factors = {k: t.float().clone() for k, t in start.lora.items()} if go_on else fresh_factors(sites, rank, seed)
    complement = None if basis is None else torch.eye(basis.shape[0], device=basis.device) - basis @ basis.T
    frozen = {} if go_on else {k: t.float() for k, t in start.lora.items()}
    leaves = {k: nn.Parameter(t.to(base.device)) for k, t in factors.items()}
    return Trainable(sites, dict(leaves), nn.Parameter(token), frozen, complement)
