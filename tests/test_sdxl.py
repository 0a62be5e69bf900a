"""What only SDXL has: two text encoders and their pooled text, sizes of each row, an empty prompt of zeros."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from safetensors.torch import save_file

from cpserve.base import BaseModel, load_base
from cpserve.drawing import Drawing, draw_latents
from cpserve.engines.eager import EagerEngine
from cpserve.errors import BaseModelError, EngineError
from cpserve.prompts import Prompt
from cpserve.sample import starting_noise
from export.build import plan_export
from export.merged import Lora, merge
from export.target import Target
from tests import plain
from tests.lessons import QUICK, lineage
from tests.tiny import POOLED, SDXL, make_adapter, write_pipeline
from trainer.lora import start_token

Z = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))
T = torch.tensor([801.0, 3.0])
STYLED = {"unet": ("to_q", "to_v", "ff.net.2"), "text_encoder": ("q_proj", "fc2"), "text_encoder_2": ("v_proj", "fc1")}


@pytest.fixture
def engine(bases: dict[str, BaseModel]) -> Iterator[EagerEngine]:
    with EagerEngine(bases["sdxl"]) as opened:
        yield opened


@pytest.mark.parametrize("negative", ["", "a red bowl"])
def test_pictures_equal_diffusers(engine: EagerEngine, folders: dict[str, Path], negative: str) -> None:
    """From the same noise, under an adapter, with and without a negative prompt, diffusers' pipeline draws the same to 1e-3."""
    adapter, text, seed = make_adapter(engine.spec, 1), "a photo of <dog> on the moon", 3
    drawing = Drawing(steps=12, guidance=2.0, negative=negative, sampler="euler")
    ours = engine.decode(draw_latents(engine, [Prompt(text, adapter)], [seed], drawing))
    pipe = plain.pipeline(folders["sdxl"], adapter)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    noise = starting_noise([seed], (4, 8, 8))
    options = {"num_inference_steps": 12, "guidance_scale": 2.0, "negative_prompt": negative or None}
    theirs = pipe(text, latents=noise, output_type="pt", **options).images
    torch.testing.assert_close((ours.clamp(-1, 1) + 1) / 2, theirs, atol=1e-3, rtol=0)


def test_rows_have_sizes_of_their_own(engine: EagerEngine, folders: dict[str, Path]) -> None:
    """Rows of one call may speak of pictures of other sizes and crops, each as diffusers' UNet takes it."""
    added = torch.tensor([[512.0, 384, 0, 16, 64, 128], [16, 32, 0, 0, 16, 32]])
    bank, slot = engine.bank.packed([Prompt("a red dog"), Prompt("the moon")])
    ours = engine.denoise(Z, T, bank, slot, added)
    pipe = plain.pipeline(folders["sdxl"])
    e, _, pooled, _ = pipe.encode_prompt(["a red dog", "the moon"], device="cpu", do_classifier_free_guidance=False)
    with torch.no_grad():
        theirs = pipe.unet(Z, T, e, added_cond_kwargs={"text_embeds": pooled, "time_ids": added}).sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(ours[0], engine.denoise(Z, T, bank, slot)[0], atol=1e-3)


def test_sizes_are_in_the_signature(engine: EagerEngine, bases: dict[str, BaseModel]) -> None:
    """Too few sizes, sizes of too few rows, and sizes for a UNet that takes none are refused with the shape or names."""
    bank, slot = engine.bank.packed([Prompt("a dog")] * 2)
    for wrong in (torch.zeros(2, 5), torch.zeros(1, 6)):
        with pytest.raises(EngineError, match="added"):
            engine.denoise(Z, T, bank, slot, wrong)
    with EagerEngine(bases["sd15"]) as other:
        bank, slot = other.bank.packed([Prompt("a dog")] * 2)
        with pytest.raises(EngineError, match="5 inputs") as refused:
            other.denoise(Z, T, bank, slot, torch.zeros(2, 6))
    assert refused.value.hint


def test_text_is_read_by_both_encoders(engine: EagerEngine) -> None:
    """A learned token changes the states of each encoder by its own share of the embedding, the pooled text by the second's."""
    adapter = make_adapter(engine.spec, 1)
    first, second = engine.spec.text_widths
    e = engine.bank._states(Prompt("a <dog>", adapter))
    assert e.shape == (1, 77, first + second + POOLED)
    for part, moved in ((slice(0, first), (True, False, False)), (slice(first, None), (False, True, True))):
        row = adapter.embeddings["<dog>"].clone()
        row[part] += 1.0
        other = engine.bank._states(Prompt("a <dog>", replace(adapter, embeddings={"<dog>": row})))
        widths = [first, second, POOLED]
        changes = [not torch.equal(x, y) for x, y in zip(e.split(widths, -1), other.split(widths, -1), strict=True)]
        assert tuple(changes) == moved


def test_what_follows_a_learned_word_is_read(engine: EagerEngine) -> None:
    """The pooled text is that of the end, not of the last learned word."""
    adapter = make_adapter(engine.spec, 1)
    one, other = (engine.bank._states(Prompt(f"a <dog> {rest}", adapter))[0, 0, -POOLED:] for rest in ("red", "bowl"))
    assert float((one - other).abs().max()) > 0.1


@pytest.mark.parametrize("method", ["none", "null-space"])  # factors that are moved on, and fresh ones
def test_a_token_is_learned_in_both_encoders(bases: dict[str, BaseModel], tmp_path: Path, method: str) -> None:
    """Each encoder's share of the new token moves away from where it started; earlier tokens stay."""
    base = bases["sdxl"]
    one, two = lineage(base, tmp_path, replace(QUICK, method=method), "dog", "cat")
    assert two.text_widths == base.spec.text_widths
    assert torch.equal(one.embeddings["<dog>"], two.embeddings["<dog>"])
    moved = two.embeddings["<cat>"] - start_token(base, None, QUICK.seed + 1)
    assert all(float(part.abs().max()) > 1e-3 for part in moved.split(list(two.text_widths)))


def test_half_precision_is_within_its_tolerance(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """A float16 bundle, its sizes kept in float32, passes the parity check and is not float32 in disguise."""
    bundle = plan_export(bases["sdxl"], tmp_path / "bundle", Target(precision="float16")).execute()
    assert 1e-4 < bundle.manifest.parity["unet"] < 2e-2


def test_merging_is_what_diffusers_does(bases: dict[str, BaseModel], folders: dict[str, Path], tmp_path: Path) -> None:
    """With a style on the UNet and both text encoders merged, a row is what diffusers computes with the style loaded."""
    draw = torch.Generator().manual_seed(3)
    pipe = DiffusionPipeline.from_pretrained(folders["sdxl"])
    style = {}
    for name, layers in STYLED.items():
        for path, module in getattr(pipe, name).named_modules():
            if path.endswith(layers):
                out, width = module.weight.shape
                style[f"{name}.{path}.lora_A.weight"] = 0.3 * torch.randn(4, width, generator=draw)
                style[f"{name}.{path}.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=draw)
    save_file(style, tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path)
    with EagerEngine(merge(bases["sdxl"], [Lora(tmp_path)])) as engine:
        ours = engine.denoise(Z, T, *engine.bank.packed([Prompt("a red dog")] * 2))
        sizes = engine.spec.sizes(Z)[0]
    e, _, pooled, _ = pipe.encode_prompt(["a red dog"] * 2, device="cpu", do_classifier_free_guidance=False)
    with torch.no_grad():
        theirs = pipe.unet(Z, T, e, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    with EagerEngine(bases["sdxl"]) as engine:
        assert not torch.allclose(ours, engine.denoise(Z, T, *engine.bank.packed([Prompt("a red dog")] * 2)), atol=0.05)


def _without_first_encoder(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))


def _with_other_words(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer_2" / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a</w>"], ids["b</w>"] = ids["b</w>"], ids["a</w>"]
    (folder / "tokenizer_2" / "tokenizer.json").write_text(json.dumps(vocabulary))


def _with_fewer_sizes(folder: Path) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["addition_time_embed_dim"] -= 1
    (folder / "unet" / "config.json").write_text(json.dumps(config))


def _with_scaled_channels(folder: Path) -> None:
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(
        json.dumps(config | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})
    )


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (_with_scaled_channels, "channel by channel"),
        (_without_first_encoder, "too few"),
        (_with_other_words, "two tokenizers differ"),
        (_with_fewer_sizes, "reads other text"),
    ],
)
def test_what_is_not_whole_is_refused(tmp_path: Path, harm: Callable[[Path], None], match: str) -> None:
    """A refiner, tokenizers of other words, a UNet made for other text, latents scaled by channel: refused when they are loaded."""
    harm(write_pipeline(tmp_path / "sdxl", SDXL))
    with pytest.raises(BaseModelError, match=match) as refused:
        load_base(str(tmp_path / "sdxl"))
    assert refused.value.hint
