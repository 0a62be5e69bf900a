"""Laws of other programs' LoRAs: judged by diffusers' own converters, admitted or refused with the reason, and written back."""

from __future__ import annotations

import ast
import json
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.numpy import load, save

from adapter_store import Store
from adapter_store.card import render_card
from adapter_store.diff import diff
from adapter_store.foreign import check_shapes, draft_of, read_lora, write_lora
from adapter_store.lora_keys import Key, is_kv, parse_key
from cpserve.errors import AdapterError
from tests.hubserver.content import BASE, draft

BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"
KV = (f"unet.{BLOCK}.attn2.to_k", f"unet.{BLOCK}.attn2.to_v")
OTHER = (
    f"unet.{BLOCK}.attn1.to_out.0",
    f"unet.{BLOCK}.ff.net.0.proj",
    "unet.mid_block.attentions.0.proj_in",
    "unet.up_blocks.1.resnets.0.time_emb_proj",
    "text_encoder.text_model.encoder.layers.3.self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.3.mlp.fc1",
)
LAW = settings(max_examples=100)


def lora(modules=KV, rank=3, alpha=None, naming="kohya", seed=0, width=8, d=6):
    """A file's tensors by name."""
    noise = np.random.default_rng(seed)
    made = {}
    for module in modules:
        for part, shape in (("A", (rank, d)), ("B", (width, rank))):
            made[getattr(Key(module, part), naming)] = noise.normal(size=shape).astype(np.float32)
        if alpha is not None:
            made[getattr(Key(module, "alpha"), naming)] = np.array(alpha, np.float32)
    return made


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("alpha", [None, 3.0, 1.0, 8.0])
def test_both_namings_mean_the_same(naming, alpha):
    """Whatever the names and the alpha: afterwards alpha is the rank, and `B A` is what the file meant."""
    tensors = lora(KV + OTHER, alpha=alpha, naming=naming)
    read = read_lora("x", save(tensors))
    for module, (a, b) in read.modules.items():
        names = [getattr(Key(module, part), naming) for part in "AB"]
        meant = tensors[names[1]] @ tensors[names[0]] * ((3.0 if alpha is None else alpha) / 3)
        np.testing.assert_allclose(b @ a, meant, rtol=1e-5, atol=1e-5)
    assert read.layers == "other"
    assert set(read.others) == set(OTHER)
    assert read_lora("x", save(lora(KV))).layers == "kv"


@pytest.mark.parametrize("tongue", ["kohya", "diffusers"])
def test_what_is_written_reads_back_bit_for_bit(tongue):
    """Converting and importing again changes no bit."""
    read = read_lora("x", save(lora(KV + OTHER, alpha=2.0)))
    again = read_lora("x", write_lora(read, tongue))
    assert again.modules.keys() == read.modules.keys()
    for module, pair in read.modules.items():
        assert all(np.array_equal(x, y) for x, y in zip(pair, again.modules[module], strict=True))


def test_diffusers_own_converter_agrees_on_kohyas_names():
    """diffusers reads what we write for kohya as the very modules that we meant, and writes the names that we write."""
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
    from safetensors.torch import load as load_torch

    read = read_lora("x", save(lora(KV + OTHER)))
    theirs, alphas = utils._convert_non_diffusers_lora_to_diffusers(load_torch(write_lora(read, "kohya")))
    unet = {k: v for k, v in theirs.items() if k.startswith("unet.")}
    ours = load_torch(write_lora(read, "diffusers"))
    converted = convert_unet_state_dict_to_peft(unet)
    assert converted.keys() == {k for k in ours if k.startswith("unet.")}
    assert all((converted[k] == ours[k]).all() for k in converted)
    assert set(alphas.values()) == {3.0}
    back = convert_state_dict_to_kohya({k: v for k, v in ours.items() if k.startswith("unet.")})
    assert {k for k in back if "lora_unet" in k} == {k for k in load(write_lora(read, "kohya")) if "lora_unet" in k}


def test_comfyui_finds_every_module_and_nothing_is_left_over():
    """It looks under `lora_unet_` and diffusers' path with underscores for dots, in the text encoder under `lora_te_`."""
    found = load(write_lora(read_lora("x", save(lora(KV + OTHER, alpha=2.0))), "kohya"))
    modules = [module.partition(".") for module in KV + OTHER]
    looked_for = {
        f"lora_{'te' if root == 'text_encoder' else root}_{path.replace('.', '_')}" for root, _, path in modules
    }
    assert set(found) == {
        f"{key}.{part}" for key in looked_for for part in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    assert all(found[f"{key}.alpha"] == len(found[f"{key}.lora_down.weight"]) for key in looked_for)


def test_our_files_load_in_plain_diffusers():
    """diffusers reads ranks and alphas of mixed ranks from the header that we write."""
    modules = {KV[0]: (np.ones((2, 6), np.float32), np.ones((8, 2), np.float32))}
    modules[KV[1]] = (np.ones((5, 6), np.float32), np.ones((8, 5), np.float32))
    content = write_lora(type(read_lora("x", save(lora())))(modules), "diffusers")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    told = json.loads(header["lora_adapter_metadata"])
    assert told["unet.r"] == told["unet.lora_alpha"] == 5
    assert told["unet.rank_pattern"] == told["unet.alpha_pattern"] == {KV[0].removeprefix("unet."): 2}
    assert np.array_equal(read_lora("x", content).modules[KV[0]][1], modules[KV[0]][1])


def test_a_header_with_an_alpha_is_believed_and_nonsense_is_not():
    """diffusers keeps the alpha in the header: for all modules, or for one; anything odd there counts for nothing."""
    tensors = lora(KV, naming="diffusers")
    whole = read_lora("x", save(tensors)).modules

    def scale(header, module):
        read = read_lora("x", save(tensors, metadata={"lora_adapter_metadata": header})).modules
        return float((read[module][1] / whole[module][1]).mean())

    told = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn2.to_v": 12}}
    assert scale(json.dumps(told), KV[0]) == pytest.approx(2)
    assert scale(json.dumps(told), KV[1]) == pytest.approx(4)
    for odd in (
        "",
        "[]",
        "{",
        '{"unet.lora_alpha": "x"}',
        '{"unet.lora_alpha": true}',
        '{"unet.alpha_pattern": 3}',
        "[" * 5000,
    ):
        assert scale(odd, KV[0]) == 1
    with pytest.raises(AdapterError, match="rslora"):
        scale('{"unet.use_rslora": true}', KV[0])


REFUSED = {
    "a pickle": (b"\x80\x02}q\x00.", "not a safetensors file"),
    "nothing": (save({}), "holds no tensor"),
    "a whole model": (save({"model.diffusion_model.out.0.weight": np.ones(3, np.float32)}), "no names that are known"),
    "a LoHa": (save({"lora_unet_mid_block_x.hada_w1_a": np.ones((2, 2), np.float32)}), "a LoHa"),
    "a DoRA": (save(lora() | {"lora_unet_conv_in.dora_scale": np.ones(2, np.float32)}), "a DoRA"),
    "SDXL": (save({"lora_te2_text_model.lora_down.weight": np.ones((2, 2), np.float32)}), "SDXL"),
    "half a pair": (save(dict(list(lora().items())[:3])), "one factor without the other"),
    "ranks that differ": (save(lora() | {Key(KV[0], "A").kohya: np.ones((2, 6), np.float32)}), "do not make a LoRA"),
    "three axes": (save(lora() | {Key(KV[0], "A").kohya: np.ones((3, 6, 1), np.float32)}), "do not make a LoRA"),
    "a wide second factor": (
        save({f"lora_unet_conv_in.lora_{part}.weight": np.ones((2, 2, 3, 3), np.float32) for part in ("down", "up")}),
        "do not make a LoRA",
    ),
    "not finite": (save(lora() | {Key(KV[0], "A").kohya: np.full((3, 6), np.nan, np.float32)}), "not finite"),
    "whole numbers": (save(lora() | {Key(KV[0], "A").kohya: np.ones((3, 6), np.int32)}), "not of floating point"),
    "an alpha of two numbers": (save(lora(alpha=[1.0, 2.0])), "is no number"),
    "an alpha out of range": (
        save(lora(alpha=3e38) | {Key(KV[0], "B").kohya: np.full((8, 3), 9, np.float32)}),
        "is too large",
    ),
    "the same twice": (save(lora() | lora(naming="diffusers")), "comes twice"),
}


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_each_refusal_gives_its_reason(content, words):
    """What is no plain LoRA of a UNet and its text encoder is refused in a sentence with a way out."""
    with pytest.raises(AdapterError, match=words) as caught:
        read_lora("style.safetensors", content)
    assert caught.value.hint
    assert "style.safetensors" in str(caught.value)


def test_another_bases_shapes_are_refused():
    """Keys and values are held to the base; what lives elsewhere is looked at when it is merged."""
    read = read_lora("x", save(lora(KV + OTHER)))
    check_shapes("x", read, dict.fromkeys(KV, (8, 6)))
    for shapes in ({}, dict.fromkeys(KV, (8, 7)), {KV[0]: (8, 6)}):
        with pytest.raises(AdapterError, match="is made for 8x6") as caught:
            check_shapes("x", read, shapes)
        assert "--base" in caught.value.hint


def test_an_import_is_a_version_that_says_where_it_came_from(tmp_path):
    """It is stored, verified and compared as any other, and marked by the layers that it touches."""
    store = Store(tmp_path)
    for number, modules in enumerate((KV, KV + OTHER), start=1):
        content = save(lora(modules, seed=number))
        made, files = draft_of(read_lora("style", content), BASE, "style.safetensors", content)
        version = store.commit("style", files, made, expected_head=None)
        assert version.manifest.layers == ("kv" if modules == KV else "other")
        assert version.manifest.settings["file"] == "style.safetensors"
        assert version.manifest.method == "imported"
    assert store.verify() == []
    found = diff(store.version("style@v1"), store.version("style@v2"))
    assert set(found.layers) == set(KV + OTHER)


@LAW
@given(
    place=st.integers(0),
    value=st.integers(0, 255),
    cut=st.integers(0, 300),
    naming=st.sampled_from(["kohya", "diffusers"]),
)
def test_any_damage_is_a_lora_or_an_adapter_error(place, value, cut, naming):
    """Whatever happens to a file's bytes: a LoRA of finite factors, or one clean error."""
    data = bytearray(save(lora(alpha=2.0, naming=naming), metadata={"format": "pt"}))
    data[place % len(data)] = value
    for content in (bytes(data), bytes(data[: len(data) - cut])):
        try:
            modules, hint = read_lora("x", content).modules, "none is needed"
        except AdapterError as error:
            modules, hint = {}, error.hint
        assert hint
        assert all(np.isfinite(array).all() for pair in modules.values() for array in pair)


WORDS = st.sampled_from(["down_blocks", "mid_block", "attentions", "attn2", "to_k", "to_out", "ff", "net", "0", "11"])


@LAW
@given(
    root=st.sampled_from(["unet", "text_encoder"]),
    path=st.lists(WORDS, min_size=1, max_size=6).map(".".join),
    part=st.sampled_from(["A", "B", "alpha"]),
)
def test_a_key_is_understood_as_it_was_written(root, path, part):
    """In diffusers' names and in kohya's, where underscores stand for dots and in names alike."""
    key = Key(f"{root}.{path}", part)
    assert parse_key(key.diffusers) == parse_key(key.kohya) == key
    assert is_kv(key.module) == (root == "unet" and path.endswith(".attn2.to_k"))


@LAW
@given(
    name=st.from_regex(
        r"(lora_unet|unet)[_.](to_k|attn2|lora|[a-z0-9]{1,3})([_.](to_k|lora|lora_A|alpha|processor|[a-z0-9]{1,3})){0,3}"
        r"\.(lora_down\.weight|lora\.up\.weight|lora_A\.weight|alpha)",
        fullmatch=True,
    )
    | st.text(max_size=60)
)
def test_any_name_is_a_key_or_none(name):
    """What was understood of any name is written and understood again as the same."""
    key = parse_key(name)
    assert key is None or parse_key(key.diffusers) == key


def test_a_card_is_what_the_hub_reads(tmp_path):
    """Its front matter is YAML with a gallery of every concept's sample; a base that is not on the Hub is left out of it."""
    local = draft(2)
    (tmp_path / "README.md").write_text(render_card(local, "pets"), "utf-8")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert [w["text"] for w in data["widget"]] == ["a photo of <dog>", "a photo of <cat>"]
    assert [w["output"]["url"] for w in data["widget"]] == ["samples/dog-0.png", "samples/cat-0.png"]
    assert data["instance_prompt"] == "a photo of <cat>"
    assert {"text-to-image", "lora", "diffusers", "template:sd-lora"} <= set(data["tags"])
    assert "base_model" not in data
    there = replace(local, base=replace(BASE, id="user/model-1.5"))
    (tmp_path / "README.md").write_text(render_card(there, "pets"), "utf-8")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("user/model-1.5", "adapter")
    assert "<Gallery />" in render_card(local, "pets")
    for kind in ("builtin:", "user/"):  # a stranger's manifest puts no code of its own into the snippet
        [snippet] = re.findall(
            r"```python\n(.*?)```",
            render_card(replace(local, base=replace(BASE, id=f'{kind}x"; exit() #')), "pets"),
            re.DOTALL,
        )
        assert not [node for node in ast.walk(ast.parse(snippet)) if getattr(node, "id", "") == "exit"]
