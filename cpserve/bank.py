"""The long-lived bank of a running batch: slots of packed K,V that rows hold while they are drawn.

A slot is keyed by content, pinned as long as any row holds it, and else given to the next prompt, the least recently used
one first. A pinned slot is never written to, so that a swap cannot show in a row that is in flight. One loop owns a bank:
it is not made for several threads.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

import torch
from torch import Tensor

from cpserve.errors import EngineError
from cpserve.prompts import Prompt, PromptBank

Key = tuple[str, str, float]


class SlotBank:
    """`table [P,S,W]` float32 goes into every call as its `kv_bank`; `hold` says which slot of it is a prompt's."""

    def __init__(self, prompts: PromptBank, slots: int) -> None:
        """`prompts` computes K,V and keeps them; `slots` is P."""
        sites = prompts.spec.sites
        self.prompts = prompts
        self.table: Tensor = torch.zeros(slots, prompts.spec.tokens, sites.packed_width, device=prompts.device)
        self.swaps = 0  # slots written so far
        self._free = list(range(slots))
        self._slots: OrderedDict[Key, int] = OrderedDict()  # the least recently used first
        self._held: Counter[Key] = Counter()

    def hold(self, prompt: Prompt) -> int:
        """The prompt's slot, pinned until it was let go of as often as it was held.

        Raises:
            EngineError: every slot is held.
            AdapterError: the adapter touches more than K,V or does not fit the base; no slot has changed.
        """
        key = prompt.key
        if key not in self._slots:
            row = self.prompts.row(prompt)  # may refuse the adapter, so before a slot is given away
            self._slots[key] = slot = self._vacate()
            self.table[slot] = row
            self.swaps += 1
        self._slots.move_to_end(key)
        self._held[key] += 1
        return self._slots[key]

    def release(self, prompt: Prompt) -> None:
        """Let go of a prompt. Its K,V stay until the slot is needed.

        Raises:
            EngineError: nobody holds it.
        """
        if not self._held[prompt.key]:
            raise EngineError("a prompt was let go of that nobody holds", hint="release once for each hold")
        self._held[prompt.key] -= 1

    @property
    def held(self) -> int:
        """How many slots are pinned."""
        return sum(count > 0 for count in self._held.values())

    def _vacate(self) -> int:
        if self._free:
            return self._free.pop(0)
        for key in self._slots:
            if not self._held[key]:
                del self._held[key]
                return self._slots.pop(key)
        raise EngineError(
            f"all {len(self.table)} slots of the bank are held by rows in flight",
            hint="let rows finish first, or make the bank larger",
        )
