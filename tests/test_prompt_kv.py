"""K,V outside the UNet are the UNet's own: judged by plain diffusers, admitted by name and shape, kept by content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from adapter_store.version import entries_of
from cpserve import prompts
from cpserve.adapter import Adapter
from cpserve.base import BaseModel
from cpserve.engines.eager import EagerEngine
from cpserve.errors import AdapterError
from cpserve.prompts import Prompt, tokenize
from tests import plain
from tests.tiny import make_adapter

TEXTS = ("a photo of <dog>", "a red bowl on the moon", "")


def test_mixed_rows_equal_plain_diffusers(eager: EagerEngine, folders: dict[str, Path], shape: str) -> None:
    """Parity row by row: a batch of mixed adapters, scales, prompts, timesteps is what diffusers computes singly."""
    a, b = make_adapter(eager.spec, 1, ("<dog>", "<cat>")), make_adapter(eager.spec, 2)
    rows = [
        Prompt("<cat> on <dog>", a),
        *(Prompt(t, x) for t in TEXTS for x in (a, b)),
        Prompt("red dog"),
        Prompt(TEXTS[0], a, 0.5),
    ]
    z = torch.randn(len(rows), 4, 8, 16, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 999, len(rows)).round()
    bank, slot = eager.bank.packed(rows)
    ours = eager.infer(z, t, bank, slot, *eager.spec.sizes(z))
    for i, row in enumerate(rows):
        judge = plain.unet_row(folders[shape], row.adapter, row.text, z[i], t[i], row.scale)
        torch.testing.assert_close(ours[i], judge, atol=1e-4, rtol=0)


def test_learned_tokens_are_numbered_like_diffusers(base: BaseModel, folders: dict[str, Path], shape: str) -> None:
    """A prompt with learned tokens has the ids that diffusers gives it after `load_textual_inversion`."""
    adapter = make_adapter(base.spec, 1, ("<dog>", "<cat>"))
    judge = plain.pipeline(folders[shape], adapter).tokenizer
    text = ["a photo of <dog> on <cat>"]
    expected = judge(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tokenize(base.spec.tokenizer, text, adapter.tokens), expected)
    assert len(base.spec.tokenizer) not in tokenize(base.spec.tokenizer, text), "the base's tokenizer learns nothing"


def test_weights_are_matched_by_name(eager: EagerEngine) -> None:
    """An adapter with its keys in another order is the same adapter: same hash, same K,V."""
    adapter = make_adapter(eager.spec, 1)
    shuffled = replace(adapter, lora=dict(reversed(adapter.lora.items())))
    assert shuffled.content_hash == adapter.content_hash
    ours, theirs = (EagerEngine(eager.base).bank.packed([Prompt("a dog", x)])[0] for x in (adapter, shuffled))
    assert torch.equal(ours, theirs)


def test_the_order_of_tokens_is_part_of_an_adapter(eager: EagerEngine) -> None:
    """Tokens are numbered in their order, so with two of them swapped a cache must not give one adapter the other's prompts."""
    adapter = make_adapter(eager.spec, 1, ("<dog>", "<cat>"))
    manifest = msgspec.structs.replace(adapter.manifest, concepts=adapter.manifest.concepts[::-1])
    swapped = replace(adapter, manifest=manifest)
    one = eager.bank.packed([Prompt("<dog>", adapter), Prompt("<dog>", swapped)])
    assert torch.equal(one[0][one[1][0]], one[0][one[1][1]]), "the same token of the same vector"
    other = EagerEngine(eager.base).bank.packed([Prompt("<dog>", swapped), Prompt("<cat>", adapter)])
    assert not torch.equal(other[0][other[1][0]], other[0][other[1][1]])


def test_scale_zero_is_the_base_bit_for_bit(eager: EagerEngine) -> None:
    """An adapter at scale 0 leaves a prompt without learned tokens as the base has it, bit for bit."""
    bank, _ = eager.bank.packed([Prompt("a red bowl", make_adapter(eager.spec, 1), 0.0), Prompt("a red bowl")])
    assert len(bank) == 2
    assert torch.equal(bank[0], bank[1])


def test_same_name_other_content_other_kv(eager: EagerEngine) -> None:
    """A new revision under an old name gives new K,V, and the K,V that a call in flight holds stay as they were."""
    old, new = make_adapter(eager.spec, 1), make_adapter(eager.spec, 2)
    assert old.manifest == new.manifest
    in_flight, _ = eager.bank.packed([Prompt("a dog", old)])
    before = in_flight.clone()
    assert not torch.allclose(eager.bank.packed([Prompt("a dog", new)])[0], in_flight)
    assert torch.equal(in_flight, before)


def test_a_freed_address_never_aliases(eager: EagerEngine) -> None:
    """Adapters made and freed in turn, so that addresses are used again, each get their own K,V."""
    addresses = set()
    for seed in range(30):
        adapter = make_adapter(eager.spec, seed)
        addresses.add(id(adapter))
        ours, _ = eager.bank.packed([Prompt("a dog", adapter)])
        fresh, _ = EagerEngine(eager.base).bank.packed([Prompt("a dog", adapter)])
        assert torch.equal(ours, fresh)
        del adapter
    assert len(addresses) < 30, "no address came up twice, so nothing was tested"


def test_the_bank_is_bounded(eager: EagerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bank keeps the most recent prompts, up to a fixed size, and serves a call that is larger than itself."""
    row = eager.bank.packed([Prompt("")])[0].nbytes
    monkeypatch.setattr(prompts, "BANK_BYTES", 3 * row)
    bank, slot = eager.bank.packed([Prompt(f"{i}") for i in range(5)])
    assert slot.tolist() == [0, 1, 2, 3, 4]
    assert [text for _, text, _ in eager.bank._rows] == ["2", "3", "4"]
    assert torch.equal(eager.bank.packed([Prompt("0")])[0][0], bank[0])


def _changed(adapter: Adapter, **lora: torch.Tensor) -> Adapter:
    names = {"k_a": "to_k.lora_A", "k_b": "to_k.lora_B"}
    keys = {k: next(key for key in adapter.lora if names[k] in key) for k in lora}
    return replace(adapter, lora={**adapter.lora, **{keys[k]: v for k, v in lora.items()}})


def test_foreign_layers_are_refused_with_the_way_out(eager: EagerEngine) -> None:
    """An adapter that touches anything but K,V is refused, and the hint says to merge it."""
    adapter = make_adapter(eager.spec, 1)
    key = next(iter(adapter.lora)).replace("to_k", "to_q")
    style = replace(adapter, lora={**adapter.lora, key: torch.zeros(4, 32)})
    with pytest.raises(AdapterError, match="to_q") as refused:
        eager.bank.packed([Prompt("a dog", style)])
    assert "export --merge" in refused.value.hint


def test_unfit_factors_are_refused(eager: EagerEngine) -> None:
    """Wrong shapes, a missing partner and numbers that are not finite are refused with the site's name."""
    adapter = make_adapter(eager.spec, 1)
    d = eager.spec.sites.weight.shape[1]
    site = eager.spec.sites.sites[0].name
    alone = replace(adapter, lora={k: v for k, v in adapter.lora.items() if "to_v.lora_B" not in k})
    unfit = [
        _changed(adapter, k_a=torch.zeros(4, d + 1)),
        _changed(adapter, k_b=torch.zeros(7, 4)),
        _changed(adapter, k_a=torch.zeros(3, d)),
        _changed(adapter, k_a=torch.full((4, d), torch.nan)),
        _changed(adapter, k_a=torch.full((4, d), torch.inf)),
        alone,
    ]
    for bad in unfit:
        with pytest.raises(AdapterError, match=site) as refused:
            eager.bank.packed([Prompt("a dog", bad)])
        assert refused.value.hint
    assert not eager.bank._rows


@pytest.mark.parametrize("row", [torch.zeros(3), torch.zeros(2, 2), torch.tensor(torch.nan), None])
def test_unfit_embeddings_are_refused(eager: EagerEngine, row: torch.Tensor | None) -> None:
    """A learned token's embedding that is missing, of another width or not finite is refused with the token's name."""
    adapter = make_adapter(eager.spec, 1)
    bad = replace(adapter, embeddings={} if row is None else {"<dog>": row})
    with pytest.raises(AdapterError, match="<dog>"):
        eager.bank.packed([Prompt("<dog>", bad)])


def test_an_adapter_survives_its_own_files(base: BaseModel) -> None:
    """What `files` writes, `read` reads: the same content hash."""
    adapter = make_adapter(base.spec, 1, ("<dog>", "<cat>"))
    files = adapter.files()
    manifest = msgspec.structs.replace(adapter.manifest, files=entries_of(files))
    read = Adapter.read(manifest, files.__getitem__)
    assert read.content_hash == adapter.content_hash
    assert read.files().keys() == files.keys()


def test_equal_adapters_are_equal_files(base: BaseModel) -> None:
    """Written twenty times, every file has the same bytes; an order of chance would pass once in half a million."""
    written = [make_adapter(base.spec, 1, ("<dog>", "<cat>")).files() for _ in range(20)]
    assert all(files == written[0] for files in written)
