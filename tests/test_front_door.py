"""Laws of the whole path: teach, keep, check out, draw, recognise."""

from __future__ import annotations

import io
import pkgutil
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image

import cpserve
from adapter_store import Store
from adapter_store.card import render_card
from cpserve.adapter import Adapter, empty_adapter
from cpserve.base import BaseModel, load_base
from cpserve.drawing import Drawing, draw_latents, generate
from cpserve.engines.eager import EagerEngine
from cpserve.errors import AdapterError, EngineError
from cpserve.learning import head_adapter, learn
from cpserve.prompts import Prompt
from cpserve.recognition import NONE, Judging, classify
from cpserve.sample import starting_noise
from tests.test_trainer import QUICK, concept

ADAPTER = "pets"


@pytest.fixture(scope="module", name="shape", params=["sd15", "sdxl"])
def _shape(request: pytest.FixtureRequest) -> str:
    """With one text encoder and with two."""
    return request.param


@pytest.fixture(scope="module", name="base")
def _base(bases: dict[str, BaseModel], shape: str) -> BaseModel:
    return bases[shape]


@pytest.fixture(scope="module")
def store(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which `pets` learned a dog (v1) and a cat (v2)."""
    made = Store(tmp_path_factory.mktemp("store"))
    learn(base, [concept("dog"), concept("cat", 1)], made, ADAPTER, QUICK)
    return made


PLAIN = """
import sys
sys.modules["cpserve"] = sys.modules["trainer"] = sys.modules["adapter_store"] = None
import numpy as np, torch
{snippet}
from diffusers import DPMSolverMultistepScheduler
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
noise = torch.from_numpy(np.load(sys.argv[1]))
made = pipe("a photo of <cat>", latents=noise, num_inference_steps=8, guidance_scale=3.0, output_type="np")
np.save(sys.argv[2], made.images)
"""


def test_a_card_finds_the_built_in_base() -> None:
    """What the card says of an adapter on it opens it with plain diffusers, wherever it was installed, and it draws."""
    card = render_card(empty_adapter(load_base().spec.entry).manifest, "pets")
    [snippet] = re.findall(r"```python\n(.*?)\npipe\.load_lora", card, re.DOTALL)
    made: dict[str, Any] = {}
    exec(snippet, made)
    [picture] = made["pipe"]("a cat", num_inference_steps=1).images
    assert picture.size == (64, 64)


def test_plain_diffusers_draws_a_checked_out_version(base: BaseModel, shape: str, store: Store, tmp_path: Path) -> None:
    """Diffusers, with cpserve not importable, loads a checked-out folder by the card's snippet and draws the same to 1e-3."""
    folder = store.checkout(f"{ADAPTER}@v2", tmp_path / "pets")
    noise = starting_noise([5], (base.spec.channels, base.spec.latent_size, base.spec.latent_size))
    np.save(tmp_path / "noise.npy", noise.numpy())
    [snippet] = re.findall(r"```python\n(.*?)\npipe\(", (folder / "README.md").read_text(), re.DOTALL)
    assert snippet.count("load_textual_inversion") == {"sd15": 2, "sdxl": 4}[shape]
    script = [sys.executable, "-c", PLAIN.format(snippet=snippet), "../noise.npy", "../made.npy"]
    subprocess.run(script, cwd=folder, check=True, capture_output=True)
    theirs = np.load(tmp_path / "made.npy")
    with EagerEngine(base) as engine:
        adapter = head_adapter(store, ADAPTER, base, "none")
        latents = draw_latents(engine, [Prompt("a photo of <cat>", adapter)], [5], Drawing(steps=8, guidance=3.0))
        ours = (engine.decode(latents).clamp(-1, 1) + 1) / 2
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max() < 1e-3


def test_a_picture_belongs_to_its_seed(base: BaseModel, store: Store) -> None:
    """A picture is the same alone, in a batch, and beside other prompts."""
    prompt = Prompt("a photo of <dog>", head_adapter(store, ADAPTER, base, "none"))
    with EagerEngine(base) as engine:
        [alone] = generate(engine, [prompt], [7], Drawing(steps=4))
        crowd = generate(engine, [Prompt("a cat"), prompt, prompt], [7, 8, 7], Drawing(steps=4))
    difference = np.abs(np.asarray(alone.image, int) - np.asarray(crowd[2].image, int)).max()
    assert difference <= 1  # rounding to 8 bits may fall either way when a sum is taken in another order
    assert np.asarray(crowd[1].image, int).tolist() != np.asarray(crowd[2].image, int).tolist()


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_more_steps_than_the_schedule_holds_are_refused(base: BaseModel, sampler: str) -> None:
    """So many steps that sampling would not begin at noise are an error with a number that works, not a wrong picture."""
    with EagerEngine(base) as engine, pytest.raises(EngineError, match="cannot be cut") as caught:
        generate(engine, [Prompt("a cat")], [0], Drawing(steps=700, sampler=sampler))
    assert "125" in caught.value.hint


def test_answers_are_whole_and_independent(base: BaseModel, store: Store) -> None:
    """Probabilities over concepts and `none of these` sum to one; a picture's answer does not depend on its neighbours."""
    adapter = head_adapter(store, ADAPTER, base, "none")
    images = [p.image for p in concept("dog").pictures]
    judging = Judging(draws=4, error=0.0)
    with EagerEngine(base) as engine:
        together = classify(engine, images, adapter, judging)
        alone = [classify(engine, [image], adapter, judging)[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert set(one.probabilities) == {"dog", "cat", NONE}
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-3)
        assert one.evaluations == 4 * 3


def test_an_adapter_that_knows_nothing_cannot_classify(base: BaseModel) -> None:
    """Classifying by an adapter without concepts says how to teach one."""
    with EagerEngine(base) as engine, pytest.raises(AdapterError, match="no concept") as caught:
        classify(engine, [Image.new("RGB", (64, 64))], empty_adapter(base.spec.entry))
    assert "cpserve train" in caught.value.hint


def test_every_version_shows_every_concept(store: Store) -> None:
    """Each version carries seeded samples of all concepts so far, and its concepts know the version they came in."""
    assert [c.since for c in store.version(f"{ADAPTER}@v2").manifest.concepts] == [1, 2]
    samples = {p for p in store.version(f"{ADAPTER}@v2").paths() if p.startswith("samples/")}
    assert {p.split("/")[1].split("-")[0] for p in samples} == {"dog", "cat"}


def test_a_concept_carries_how_well_its_samples_showed_it(base: BaseModel, store: Store) -> None:
    """The share of those stored with its version that `classify` puts right there; what comes later leaves it alone."""
    then, now = (store.version(f"{ADAPTER}@v{n}") for n in (1, 2))
    assert now.manifest.concepts[0] == then.manifest.concepts[0]
    for version in (then, now):
        concept = version.manifest.concepts[-1]
        samples = [Image.open(io.BytesIO(version.read(f"samples/{concept.name}-{i}.png"))) for i in range(4)]
        with EagerEngine(base) as engine:
            answers = classify(engine, samples, Adapter.read(version.manifest, version.read))
        assert concept.dc_accuracy == sum(a.label == concept.name for a in answers) / 4


def test_trained_from_pins_the_version_before(store: Store) -> None:
    """A learned version names the version that it was trained from, by the hash of its document."""
    first, second = (store.version(f"{ADAPTER}@v{n}") for n in (1, 2))
    assert first.manifest.trained_from is None
    assert second.manifest.trained_from == first.pin == second.manifest.previous


def test_other_weights_are_told_of_before_anything_is_learned(base: BaseModel, store: Store) -> None:
    """An adapter may go on with other weights of its architecture, but whoever takes the warning for an error has lost nothing."""
    was = base.spec.entry
    entry = structs.replace(was, fingerprint=structs.replace(was.fingerprint, weights="0" * 64))
    other = replace(base, spec=replace(base.spec, entry=entry))
    with warnings.catch_warnings(action="error"), pytest.raises(UserWarning, match="pictures will too"):
        learn(other, [concept("fox", 2)], store, ADAPTER, QUICK)
    assert store.head(ADAPTER) == 2
    assert not store.run(ADAPTER).exists()


def test_public_names_are_no_modules() -> None:
    """Each public name of `cpserve` is the thing itself, also after every submodule was imported; no name is both."""
    modules = {m.name for m in pkgutil.iter_modules(cpserve.__path__)}
    assert not modules & set(cpserve.__all__)
    assert all(callable(getattr(cpserve, name)) for name in cpserve.__all__)
    assert sorted(cpserve.__all__) == sorted(cpserve._HOMES)
