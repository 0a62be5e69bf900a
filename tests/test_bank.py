"""A bank's slots are keyed by content; what a row in flight holds is never written to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpserve.bank import SlotBank
from cpserve.base import BaseModel
from cpserve.engines.eager import EagerEngine
from cpserve.errors import AdapterError, EngineError
from cpserve.prompts import Prompt, PromptBank
from tests.tiny import make_adapter

SLOTS = 3


def counted(base: BaseModel) -> tuple[PromptBank, list[int]]:
    """A prompt bank, and a list that grows with every prompt that its text encoder reads."""
    read: list[int] = []

    def encode(ids: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        read.append(len(ids))
        return base.encode_text(ids, extra)

    return PromptBank(base.spec, encode), read


@pytest.fixture(scope="module")
def prompts(bases: dict[str, BaseModel]) -> list[Prompt]:
    """Six, of which the last two differ from the first in their adapter's content and in its scale alone."""
    spec = bases["sd21"].spec
    a, b = make_adapter(spec, 1), make_adapter(spec, 2)
    texts = [Prompt("a <dog>", a), Prompt("a cat", a), Prompt("a cat"), Prompt("")]
    return [*texts, Prompt("a <dog>", b), Prompt("a <dog>", a, 0.5)]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_a_swap_never_shows_in_a_row_in_flight(
    bases: dict[str, BaseModel], prompts: list[Prompt], acts: list[tuple[int, bool]]
) -> None:
    """However prompts come and go, every held slot holds its own prompt's K,V; only a full bank refuses, and changes nothing."""
    cache = PromptBank(bases["sd21"].spec, bases["sd21"].encode_text)
    bank = SlotBank(cache, SLOTS)
    held: list[tuple[int, int]] = []
    for number, comes in acts:
        if comes:
            full = len({n for n, _ in held}) == SLOTS and number not in {n for n, _ in held}
            if full:
                with pytest.raises(EngineError, match="held by rows in flight"):
                    bank.hold(prompts[number])
            else:
                held.append((number, bank.hold(prompts[number])))
        elif any(n == number for n, _ in held):
            held.remove(next(one for one in held if one[0] == number))
            bank.release(prompts[number])
        for n, slot in held:
            assert torch.equal(bank.table[slot], cache.row(prompts[n]))
        assert bank.held == len({n for n, _ in held})


def test_a_batch_goes_on_while_slots_are_swapped(bases: dict[str, BaseModel], prompts: list[Prompt]) -> None:
    """A row's result is the same, bit for bit, before and after all the other slots changed hands."""
    with EagerEngine(bases["sd21"]) as engine:
        bank = SlotBank(engine.bank, SLOTS)
        mine = bank.hold(prompts[0])
        z, t, slot = torch.ones(1, 4, 8, 8), torch.tensor([700.0]), torch.tensor([mine])
        before = engine.denoise(z, t, bank.table, slot)
        for prompt in prompts[1:]:
            bank.hold(prompt)
            bank.release(prompt)
        assert bank.swaps == len(prompts)
        assert torch.equal(engine.denoise(z, t, bank.table, slot), before)


def test_the_least_recently_used_slot_goes_first(bases: dict[str, BaseModel], prompts: list[Prompt]) -> None:
    """A prompt that was just used stays; held or not, it is found again without a swap."""
    bank = SlotBank(counted(bases["sd21"])[0], SLOTS)

    def use(number: int) -> None:
        bank.hold(prompts[number])
        bank.release(prompts[number])

    for number in (0, 1, 2, 0, 3):  # 3 takes the place of 1
        use(number)
    assert bank.swaps == 4
    use(0)
    use(2)
    assert bank.swaps == 4
    use(1)
    assert bank.swaps == 5


def test_a_prompts_kv_are_computed_once(bases: dict[str, BaseModel], prompts: list[Prompt]) -> None:
    """Swapped out and in again, or asked for in batches, a text is read once for all adapters that change no word of it."""
    cache, read = counted(bases["sd21"])
    bank = SlotBank(cache, 1)
    for prompt in prompts * 2:
        bank.hold(prompt)
        bank.release(prompt)
    cache.packed(prompts * 3)
    assert sum(read) == 4, "a <dog> of each adapter, a cat, and the empty prompt"


def test_a_refused_adapter_takes_no_slot(bases: dict[str, BaseModel], prompts: list[Prompt]) -> None:
    """An adapter of other layers is refused at admission, and the bank is as it was."""
    bank = SlotBank(counted(bases["sd21"])[0], 1)
    bank.hold(prompts[0])
    bank.release(prompts[0])
    kept = bank.table.clone()
    adapter = make_adapter(bases["sd21"].spec, 1)
    foreign = replace(adapter, lora={**adapter.lora, "unet.conv_in.lora_A.weight": torch.ones(1, 4)})
    with pytest.raises(AdapterError, match="outside the cross-attention"):
        bank.hold(Prompt("a <dog>", foreign))
    assert torch.equal(bank.table, kept)
    bank.hold(prompts[0])
    assert bank.swaps == 1


def test_letting_go_of_what_nobody_holds_is_an_error(bases: dict[str, BaseModel], prompts: list[Prompt]) -> None:
    """A release too many is found, before it could unpin another row's slot."""
    bank = SlotBank(counted(bases["sd21"])[0], SLOTS)
    bank.hold(prompts[0])
    bank.release(prompts[0])
    with pytest.raises(EngineError, match="nobody holds"):
        bank.release(prompts[0])
