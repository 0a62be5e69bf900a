"""Cross-attention keys and values, computed outside the UNet and packed into one tensor.

The adapters touch only the K and V projections of the cross-attention, and those depend only on the prompt. So
`packed [P,S,W]` holds, per prompt, every cross-attention layer's K then V along one axis, `W = sum over layers of 2 C`, and
travels into the UNet as `encoder_hidden_states`; one attention processor a layer slices its part. One UNet serves every
adapter. What else SDXL's UNet reads of a prompt, its pooled text `[D]`, passes by the projections: it follows each state in
`e [P,S,d+D]`, and each position's K,V in `packed`, where W counts it. Knows where the K,V sites are and how K,V are computed;
does not know prompts (`prompts.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from cpserve.errors import AdapterError

LORA_PREFIX = "unet."
SIZES = 6  # height and width of the original, top and left of the crop, height and width of the picture


@dataclass(frozen=True)
class Site:
    """One K,V pair: the attention module's name in the UNet and its width C."""

    name: str
    width: int

    def key(self, projection: str, factor: str) -> str:
        """diffusers' name of a LoRA factor: projection `to_k` or `to_v`, factor `A [r,d]` or `B [C,r]`."""
        return f"{LORA_PREFIX}{self.name}.{projection}.lora_{factor}.weight"


@dataclass(frozen=True, eq=False)
class KVSites:
    """Every K,V site of a UNet in order, with the frozen projections stacked as `weight [W-D,d]` float32; `pooled` is D."""

    sites: tuple[Site, ...]
    weight: Tensor
    pooled: int = 0

    @classmethod
    def of(cls, unet: nn.Module) -> KVSites:
        """Find the cross-attention layers of a diffusers UNet.

        Raises:
            AdapterError: there is none, or one has biases on K or V.
        """
        layers = {n: m for n, m in unet.named_modules() if n.endswith(".attn2")}
        if not layers or any(m.to_k.bias is not None or m.to_v.bias is not None for m in layers.values()):
            raise AdapterError(
                "the UNet has no cross-attention with plain K and V projections",
                hint="use a Stable-Diffusion-shaped base",
            )
        stacked = [p.weight.detach().float() for m in layers.values() for p in (m.to_k, m.to_v)]
        sites = tuple(Site(n, m.to_k.out_features) for n, m in layers.items())
        return cls(sites, torch.cat(stacked), pooled_width(unet))

    @property
    def packed_width(self) -> int:
        """W."""
        return len(self.weight) + self.pooled

    @property
    def added(self) -> int:
        """How many numbers the UNet takes of a row beside its prompt."""
        return SIZES if self.pooled else 0

    @cached_property
    def parts(self) -> tuple[tuple[Site, str, slice], ...]:
        """For each projection in packing order: its site, `to_k` or `to_v`, and its slice of the packed axis."""
        flat = [(s, p) for s in self.sites for p in ("to_k", "to_v")]
        ends = list(accumulate(s.width for s, _ in flat))
        return tuple((s, p, slice(end - s.width, end)) for (s, p), end in zip(flat, ends, strict=True))

    def lora_keys(self) -> list[str]:
        """The keys that a K,V-only adapter may hold."""
        return [site.key(projection, factor) for site, projection, _ in self.parts for factor in "AB"]

    def check(self, lora: Mapping[str, Tensor]) -> None:
        """Admit an adapter to the live bank, by name and shape, never by position.

        Raises:
            AdapterError: it touches anything but K,V, lacks a factor's partner, has a wrong shape or a number that is not finite.
        """
        foreign = sorted(set(lora) - set(self.lora_keys()))
        if foreign:
            raise AdapterError(
                f"the adapter touches {foreign[0]} ({len(foreign)} tensors outside the cross-attention K and V)",
                hint="merge it into the UNet instead: cpserve export --merge",
            )
        d = self.weight.shape[1]
        for site, projection, _ in self.parts:
            a, b = (lora.get(site.key(projection, f)) for f in "AB")
            if a is None and b is None:
                continue
            fits = a is not None and b is not None and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
            if a is None or b is None or not fits or a.shape[1] != d or b.shape[0] != site.width:
                raise AdapterError(
                    f"the adapter's {projection} of {site.name} does not fit {site.width} x {d}",
                    hint="use the base model that the adapter was learned on",
                )
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise AdapterError(
                    f"the adapter's {projection} of {site.name} holds numbers that are not finite",
                    hint="take an earlier version: cpserve adapters log",
                )

    def project(self, e: Tensor, lora: Mapping[str, Tensor] | None = None, scale: float = 1.0) -> Tensor:
        """Packed K,V `[P,S,W]` of text states `e [P,S,d+D]` under `W + scale B A` (LoRA with alpha == r)."""
        states, pooled = self.split(e)
        kv = states @ self.weight.to(e.device, e.dtype).T
        if lora and scale != 0:
            kv = kv + scale * self.project_change(states, lora)
        return torch.cat([kv, pooled.to(kv.dtype)], dim=-1)

    def project_change(self, states: Tensor, lora: Mapping[str, Tensor]) -> Tensor:
        """What an adapter adds to the K,V of states `[P,S,d]`: `B A e` `[P,S,W-D]`, zero at the sites that it leaves alone."""
        changes = []
        for site, projection, _ in self.parts:
            a, b = (lora.get(site.key(projection, f)) for f in "AB")
            untouched = a is None or b is None
            changes.append(states.new_zeros(*states.shape[:-1], site.width) if untouched else states @ a.T @ b.T)  # type: ignore[union-attr]
        return torch.cat(changes, dim=-1)

    def split(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """The states `[P,S,d]` and the pooled text `[P,S,D]` of `e`."""
        d = self.weight.shape[1]
        return e[..., :d], e[..., d:]


def pooled_width(unet: Any) -> int:
    """D, as the UNet's configuration has it."""
    config = unet.config
    if config.addition_embed_type != "text_time":
        return 0
    return int(config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention, `[B,L,C]`.

    With gradients on the CPU it is written out: the fused kernel's backward pass there is several times slower.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if torch.is_grad_enabled() and q.device.type == "cpu" and not torch.compiler.is_compiling():
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        mixed = weights @ v
    else:
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    joined: Tensor = mixed.transpose(1, 2).flatten(2)
    return joined


class SelfAttention:
    """diffusers' attention processor for self-attention, through `attend`."""

    def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        mixed = attend(attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states), attn.heads)
        return attn.to_out[1](attn.to_out[0](mixed))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PackedAttention:
    """diffusers' attention processor for cross-attention: K and V are slices of the packed tensor `[B,S,W]`."""

    k: slice
    v: slice

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        key, value = encoder_hidden_states[..., self.k], encoder_hidden_states[..., self.v]
        mixed = attend(attn.to_q(hidden_states), key, value, attn.heads)
        return attn.to_out[1](attn.to_out[0](mixed))  # type: ignore[no-any-return]


def pack_unet(unet: Any, sites: KVSites) -> None:
    """Make a diffusers UNet take packed K,V as its `encoder_hidden_states`, in place. Its weights stay as they are."""
    where = {(site.name, projection): part for site, projection, part in sites.parts}
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        module = name.removesuffix(".processor")
        packed = PackedAttention(where[module, "to_k"], where[module, "to_v"]) if (module, "to_k") in where else None
        processors[name] = packed or SelfAttention()
    unet.set_attn_processor(processors)


class PackedUNet(nn.Module):
    """The UNet as every engine runs it: the signature's inputs to its output, the gather inside."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.pooled = pooled_width(unet)

    def forward(
        self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor, added: Tensor | None = None
    ) -> Tensor:
        rows = kv_bank.index_select(0, slot)
        # a UNet that knows neither does not look at them; float32, as what it joins the pooled text with always is
        further = {"text_embeds": rows[:, 0, rows.shape[-1] - self.pooled :].float(), "time_ids": added}
        output = self.unet(latents, timestep, encoder_hidden_states=rows, added_cond_kwargs=further, return_dict=False)
        return output[0]  # type: ignore[no-any-return]
