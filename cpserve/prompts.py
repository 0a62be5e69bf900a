"""Prompts with learned tokens, and the bank of their packed K,V.

A row of the bank is keyed by what it depends on, (adapter content, prompt, scale), never by a name or a memory address.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cpserve.adapter import Adapter
from cpserve.base import BaseSpec

BANK_BYTES = 1 << 30  # a prompt of Stable Diffusion 1.5 takes 7.3 MiB
CPU = torch.device("cpu")
TEXTS = 256  # text states kept; one of Stable Diffusion 1.5 takes 0.2 MiB


@dataclass(frozen=True, eq=False)
class Prompt:
    """Words under an adapter; `scale` weighs its LoRA (its learned tokens stay as they are)."""

    text: str
    adapter: Adapter | None = None
    scale: float = 1.0

    @property
    def key(self) -> tuple[str, str, float]:
        """What its K,V depend on."""
        return (self.adapter.content_hash if self.adapter else "", self.text, self.scale if self.adapter else 0.0)


def tokenize(tokenizer: Any, texts: Sequence[str], learned: Sequence[str] = ()) -> Tensor:
    """Ids `[P,S]` int64, padded and truncated; the i-th learned token has id `vocabulary + i`, as diffusers numbers them."""
    tokenizer = _extended(tokenizer, tuple(learned)) if learned else tokenizer
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    return ids


def left_out(tokenizer: Any, text: str, learned: Sequence[str] = ()) -> str:
    """The end of a text that `tokenize` cuts off."""
    tokenizer = _extended(tokenizer, tuple(learned)) if learned else tokenizer
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    rest = tokenizer.decode(ids[tokenizer.model_max_length - 2 :])  # two are the begin and the end
    return str(rest).replace("</w>", " ").strip()  # a word's end, where the tokenizer has no decoder of its own


@lru_cache(maxsize=16)
def _extended(tokenizer: Any, learned: tuple[str, ...]) -> Any:
    """A copy of the tokenizer that knows the learned tokens. Copying CLIP's takes 0.1 s, much longer than a prompt does."""
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(list(learned))
    return extended


@dataclass(eq=False)
class PromptBank:
    """Computes each prompt's packed K,V once and keeps the most recent ones, up to `BANK_BYTES` of them.

    `encode_text` is an engine's: ids `[P,S]`, extra rows `[E,d]` -> e `[P,S,d+D]`. K,V are computed on the CPU, whatever
    `device` the engine's rows are on: that takes no longer than a step, and an adapter's factors never have to be moved.
    """

    spec: BaseSpec
    encode_text: Callable[[Tensor, Tensor], Tensor]
    device: torch.device = CPU
    _rows: OrderedDict[tuple[str, str, float], Tensor] = field(default_factory=OrderedDict)
    _texts: OrderedDict[tuple[bytes, str], Tensor] = field(default_factory=OrderedDict)

    @torch.no_grad()
    def packed(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """The bank of this call, `[P,S,W]` float32 with P distinct prompts, and each prompt's slot `[len(prompts)]` int64.

        Raises:
            AdapterError: an adapter touches more than K,V or does not fit the base.
        """
        distinct = {p.key: p for p in prompts}
        bank = torch.stack([self.row(prompt) for prompt in distinct.values()])
        number = {key: i for i, key in enumerate(distinct)}
        return bank, torch.tensor([number[p.key] for p in prompts], device=self.device)

    @torch.no_grad()
    def row(self, prompt: Prompt) -> Tensor:
        """One prompt's packed K,V `[S,W]` float32; not to be written to.

        Raises:
            AdapterError: the adapter touches more than K,V or does not fit the base.
        """
        if prompt.key not in self._rows:
            self._rows[prompt.key] = self._compute(prompt).to(self.device)
        self._rows.move_to_end(prompt.key)
        row = self._rows[prompt.key]
        while len(self._rows) * row.nbytes > BANK_BYTES:
            self._rows.popitem(last=False)
        return row

    def clear(self) -> None:
        """Forget every prompt."""
        self._rows.clear()
        self._texts.clear()

    def _compute(self, prompt: Prompt) -> Tensor:
        adapter = prompt.adapter
        if adapter is not None:
            self.spec.sites.check(adapter.lora)
        lora = {k: t.float() for k, t in adapter.lora.items()} if adapter else None
        return self.spec.sites.project(self._states(prompt), lora, prompt.scale)[0]

    def _states(self, prompt: Prompt) -> Tensor:
        """Text states `[1,S,d+D]`, read once for all adapters whose learned tokens are not in the text: the empty prompt's are."""
        adapter, width = prompt.adapter, self.spec.sites.weight.shape[1]
        extra = adapter.extra_rows(width) if adapter else torch.zeros(0, width)
        ids = tokenize(self.spec.tokenizer, [prompt.text], adapter.tokens if adapter else ())
        learned = adapter is not None and int(ids.max()) >= len(self.spec.tokenizer)
        key = (ids.numpy().tobytes(), adapter.content_hash if adapter and learned else "")
        if key not in self._texts:
            self._texts[key] = self.encode_text(ids, extra).float().cpu()
        self._texts.move_to_end(key)
        if len(self._texts) > TEXTS:
            self._texts.popitem(last=False)
        return self._texts[key]
