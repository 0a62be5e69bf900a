"""A LoRA of any layer is folded into the base as diffusers and peft would apply it, and concept adapters stay live on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cpserve.base import BaseModel
from cpserve.engines.eager import EagerEngine
from cpserve.errors import AdapterError
from cpserve.manifest import WEIGHTS
from cpserve.prompts import Prompt
from export.build import plan_export
from export.merged import Lora, merge
from tests.tiny import make_adapter

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1", "proj_in", "time_emb_proj"]


def plain_pipeline(folder: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def style(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on attention, convolutions, time embedding and text encoder, made and written by peft and diffusers."""
    pipe = plain_pipeline(folders["sd15"])
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS, init_lora_weights="gaussian"))
    for parameter in (p for n, p in pipe.unet.named_parameters() if "lora_B" in n):
        parameter.data = 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("style")
    d, attention = pipe.text_encoder.config.hidden_size, "text_model.encoder.layers.0.self_attn"
    text = {}
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        text[f"{attention}.{projection}.lora_A.weight"] = 0.5 * torch.randn(4, d)
        text[f"{attention}.{projection}.lora_B.weight"] = 0.1 * torch.randn(d, 4)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet), text_encoder_lora_layers=text
    )
    return folder


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_merging_is_what_diffusers_does(
    bases: dict[str, BaseModel], folders: dict[str, Path], style: Path, scale: float, tmp_path: Path
) -> None:
    """With a style merged and a concept live, each row is what diffusers computes with both loaded, and the base is unchanged."""
    base = bases["sd15"]
    adapter = make_adapter(base.spec, 1)
    pipe = plain_pipeline(folders["sd15"])
    pipe.load_lora_weights(style, adapter_name="style")
    save_file({k: t.contiguous() for k, t in adapter.lora.items()}, tmp_path / "concept.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="concept.safetensors", adapter_name="concept")
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 801.0])
    before = {name: p.clone() for name, p in base.unet.state_dict().items()}
    read = base.text_encoder.state_dict()
    assert any(not torch.equal(p, read[n]) for n, p in merge(base, [Lora(style)]).text_encoder.state_dict().items())
    with EagerEngine(merge(base, [Lora(style, scale)])) as engine:
        ours = engine.infer(z, t, *engine.bank.packed([Prompt("a dog", adapter), Prompt("a dog")]))
    with EagerEngine(base) as engine:
        without = engine.infer(z, t, *engine.bank.packed([Prompt("a dog", adapter), Prompt("a dog")]))
    assert (ours - without).abs().amax() > 0.1
    for i, weight in enumerate((1.0, 0.0)):
        pipe.set_adapters(["style", "concept"], [scale, weight])
        with torch.no_grad():
            e, _ = pipe.encode_prompt("a dog", "cpu", 1, do_classifier_free_guidance=False, lora_scale=None)
            judge = pipe.unet(z[i : i + 1], t[i], e).sample[0]
        # folded weights round otherwise than a sum of two products; the style itself moves the output by 0.1 and more
        torch.testing.assert_close(ours[i], judge, atol=1e-3, rtol=0)
    assert all(torch.equal(p, before[name]) for name, p in base.unet.state_dict().items())


def test_kohyas_file_is_the_same(bases: dict[str, BaseModel], style: Path, tmp_path: Path) -> None:
    """The same LoRA in kohya's format gives the same weights."""
    state = convert_all_state_dict_to_peft(load_file(style / WEIGHTS))
    save_file(convert_state_dict_to_kohya(state), tmp_path / "kohya.safetensors")
    ours, theirs = (merge(bases["sd15"], [Lora(path)]) for path in (style, tmp_path / "kohya.safetensors"))
    for name, weight in ours.unet.state_dict().items():
        torch.testing.assert_close(weight, theirs.unet.state_dict()[name], atol=1e-6, rtol=1e-5)
    for name, weight in ours.text_encoder.state_dict().items():
        torch.testing.assert_close(weight, theirs.text_encoder.state_dict()[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.spec.sites.weight, theirs.spec.sites.weight, atol=1e-6, rtol=1e-5)


def test_the_key_holds_what_was_merged(bases: dict[str, BaseModel], style: Path, tmp_path: Path) -> None:
    """Content, scale and order of merged LoRAs are part of the key; their names are not, nor is the base's identity changed."""
    base = bases["sd15"]
    copied = tmp_path / "another-name.safetensors"
    copied.write_bytes((style / WEIGHTS).read_bytes())

    def recipe(*loras: Lora) -> Any:
        return plan_export(base, tmp_path / "none", loras=loras).recipe

    keys = [recipe(*loras).key for loras in ([], [Lora(style)], [Lora(style, 0.5)], [Lora(style), Lora(style, 0.5)])]
    assert len(set(keys)) == 4
    assert recipe(Lora(copied)).key == keys[1]
    assert recipe(Lora(style)).fingerprint == base.spec.entry.fingerprint


def test_what_does_not_fit_is_refused(bases: dict[str, BaseModel], style: Path, tmp_path: Path) -> None:
    """Another architecture, no file, a pickle and a broken file are one sentence with a hint; nothing is left out in silence."""
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    (tmp_path / "weights.bin").write_bytes(b"")
    strange = {**load_file(style / WEIGHTS), "unet.nowhere.to_q.lora_A.weight": torch.ones(4, 32)}
    save_file(strange, tmp_path / "strange.safetensors")
    wrong = [
        (bases["sd21"], style),
        (bases["sd15"], tmp_path / "missing"),
        (bases["sd15"], tmp_path / "weights.bin"),
        (bases["sd15"], tmp_path / "broken.safetensors"),
        (bases["sd15"], tmp_path / "strange.safetensors"),
    ]
    for base, path in wrong:
        with pytest.raises(AdapterError) as refused:
            merge(base, [Lora(path)])
        assert refused.value.hint
