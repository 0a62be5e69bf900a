"""The Hub in the whole story: learn on top of it, draw from it, take in other programs' files, and do without us."""

# ruff: noqa: F811, ARG001 - fixtures are named by arguments; without torch there is no story

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")  # the rest of the suite of the Hub does without
from safetensors.torch import save

from adapter_store import Store
from adapter_store.foreign import read_lora, write_lora
from adapter_store.layout import MATRIX
from cpserve.adapter import Adapter
from cpserve.base import BaseModel
from cpserve.cli.eval import _value as evaluation_value
from cpserve.cli.eval import _write as write_evaluation
from cpserve.drawing import Drawing, draw_latents
from cpserve.engines.eager import EagerEngine
from cpserve.evaluation import Evaluation
from cpserve.manifest import WEIGHTS
from cpserve.prompts import Prompt
from cpserve.sample import starting_noise
from tests.command import run
from tests.hubserver import Fault, HubServer
from tests.hubserver.client import environment, hub  # noqa: F401
from tests.lessons import zipped
from tests.tiny import make_adapter

PETS = "hf://me/pets"
BASE = "sd21"  # the one with fewer levels


@pytest.fixture(scope="module")
def learned(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three concepts, and a store whose adapter `pets` learned the first two."""
    home = tmp_path_factory.mktemp("learned")
    for seed, name in enumerate(("dog", "cat", "cow")):
        zipped(home / f"{name}.zip", seed)
    (home / "quick.toml").write_text("batch = 2\nvariants = 2\nrank = 2\n")
    concepts = ("--concept", home / "dog.zip", "--concept", home / "cat.zip")
    run("train", *concepts, "--adapter", "pets", *quick(home, folders), "--store", home / "store")
    return home


def quick(home: Path, folders: dict[str, Path]) -> tuple[object, ...]:
    return "--base", folders[BASE], "--config", home / "quick.toml", "--steps", 2


def test_learning_goes_on_from_the_hub_and_back_to_it(
    learned: Path, folders: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    """A second learner's version is trained from the Hub's head and follows it; the first, now behind, is told and keeps all."""
    first = Store(learned / "store")
    first.push("pets", PETS)
    cow = ("train", "--concept", learned / "cow.zip", *quick(learned, folders))
    assert "on top of pets@v2" in run(*cow, "--adapter", PETS, "--dry-run", "--store", tmp_path / "b").stdout
    assert not (tmp_path / "b").exists()
    told = run(*cow, "--adapter", PETS, "--push", "--store", tmp_path / "b")
    assert f"pushed v3 to {PETS}" in told.stderr
    version = first.version(PETS)
    assert version.manifest.version == 3
    assert version.manifest.trained_from == version.manifest.previous == first.version("pets@v2").pin
    assert first.verify(PETS) == []

    other = ("train", "--concept", learned / "cow.zip", "--name", "bull", *quick(learned, folders))
    Store(tmp_path / "c").pull(f"{PETS}@v2", for_training=True)
    run(*other, "--adapter", "pets", "--store", tmp_path / "c")
    late = run("adapters", "push", "pets", PETS, "--store", tmp_path / "c", code=1)
    assert "has moved on" in late.stderr
    assert "--fork OTHER" in late.stderr
    assert Store(tmp_path / "c").version("pets@v3").manifest.concepts[-1].name == "bull"
    run("adapters", "push", "pets", PETS, "--fork", "bulls", "--store", tmp_path / "c")
    assert first.verify("hf://me/bulls") == []
    for wrong in (("--push",), ("--as", "x"), ("--fork", "x")):
        run(*other, "--adapter", "pets", *wrong, code=2)


def test_what_past_versions_teach_comes_from_the_hub(
    learned: Path, folders: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    """A method that learns from past versions fetches those, and those alone, on a machine that has none of them."""
    Store(learned / "store").push("pets", PETS)
    cow = ("train", "--concept", learned / "cow.zip", *quick(learned, folders))
    (tmp_path / "dsc.toml").write_text("batch = 2\nvariants = 2\nrank = 2\ndsc_steps = 1\n")
    dsc = ("--config", tmp_path / "dsc.toml", "--method", "dsc")
    run(*cow, *dsc, "--adapter", PETS, "--store", tmp_path / "b")
    assert Store(tmp_path / "b").version("pets").manifest.version == 3


def test_a_base_on_another_hub_gets_no_stored_token(hub: HubServer, tmp_path: Path) -> None:
    """What `hf auth login` left stays here when a base is asked for elsewhere; the refusal is a sentence."""
    cache = tmp_path / "home"
    cache.mkdir()
    (cache / "token").write_text("hf_stored")
    known = {k: v for k, v in {**os.environ, **environment(hub, cache)}.items() if k != "HF_TOKEN"}
    line = [str(Path(sys.executable).with_name("cpserve")), "generate", "x", "--no-adapter", "--base", "me/model"]
    refused = subprocess.run(line, env=known, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: the base model 'me/model' cannot be loaded")
    assert hub.asked
    assert not any(request.token for request in hub.asked)


def test_an_endpoint_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    """A malformed `HF_ENDPOINT` is told before the Hub's client, which reads it when it is imported, breaks on it."""
    line = [str(Path(sys.executable).with_name("cpserve")), "adapters", "list", "hf://a/b"]
    known = {**os.environ, "HF_ENDPOINT": "http://[x"}
    refused = subprocess.run(line, env=known, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: 'http://[x' is no address of a Hub\nhint: ")


def test_who_loses_the_race_with_a_finished_version_is_told_and_can_go_on_both_ways(
    learned: Path, folders: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    """`train --push` overtaken in the very moment of its commit: its version stays here, and both commands it names work."""
    Store(learned / "store").push("pets", PETS)
    winner, loser = Store(tmp_path / "winner"), Store(tmp_path / "loser")
    winner.pull(PETS, for_training=True)
    cow = ("train", "--concept", learned / "cow.zip", *quick(learned, folders))
    run(*cow, "--name", "bull", "--adapter", "pets", "--store", winner.root)
    hub.faults.add(Fault("POST", "/api/models/me/pets/commit/", first=lambda: winner.push("pets", PETS)))
    told = run(*cow, "--adapter", PETS, "--push", "--store", loser.root, code=1)
    assert f"{PETS} has moved on: its head is v3 (dog, cat, bull), which pets@v3 does not follow" in told.stderr
    assert f"cpserve adapters push pets {PETS} --fork OTHER" in told.stderr
    assert f"cpserve train --adapter {PETS} --as OTHER" in told.stderr
    assert [concept.name for concept in loser.version("pets@v3").manifest.concepts] == ["dog", "cat", "cow"]
    assert loser.verify() == []
    assert [m.version for m in loser.log(PETS)] == [3, 2, 1]
    run("adapters", "push", "pets", PETS, "--fork", "cows", "--store", loser.root)
    run(*cow, "--adapter", PETS, "--as", "both", "--push", "--store", loser.root)
    assert [concept.name for concept in loser.version(PETS).manifest.concepts] == ["dog", "cat", "bull", "cow"]
    assert loser.verify(PETS) == loser.verify("hf://me/cows") == loser.verify() == []


def test_references_to_the_hub_work_where_an_adapter_is_named(
    learned: Path, folders: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    """`generate` and `classify` take `hf://`, and what they draw is what the local version draws."""
    Store(learned / "store").push("pets", PETS)
    where = ("-n", 1, "--steps", 2, "--base", folders[BASE], "--json")
    local = ("--adapter", "pets@v1", "--out", tmp_path / "a", "--store", learned / "store")
    there = ("--adapter", f"{PETS}@v1", "--out", tmp_path / "b", "--store", tmp_path / "none")
    made = [json.loads(run("generate", "a photo of <dog>", *where, *each).stdout) for each in (local, there)]
    drawn = [Image.open(each["pictures"][0]["file"]) for each in made]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert made[1]["pictures"][0]["adapter"] == f"{PETS}@v1"
    run(
        "classify",
        tmp_path / "a",
        "--adapter",
        PETS,
        "--draws",
        2,
        "--base",
        folders[BASE],
        "--store",
        tmp_path / "none",
    )


def kv_file(base: BaseModel, tongue: str) -> bytes:
    adapter = make_adapter(base.spec, 3)
    return write_lora(read_lora("x", save(dict(adapter.lora))), tongue)


@pytest.mark.parametrize("tongue", ["kohya", "diffusers"])
def test_an_imported_lora_of_keys_and_values_is_live(
    bases: dict[str, BaseModel], folders: dict[str, Path], hub: HubServer, tmp_path: Path, tongue: str
) -> None:
    """It becomes a version, here or on the Hub, holds the file's very numbers, and draws; what touches more is for merging."""
    base = bases[BASE]
    (tmp_path / "kv.safetensors").write_bytes(kv_file(base, tongue))
    at = ("--base", folders[BASE], "--store", tmp_path / "store")
    assert "--adapter kv@v1" in run("adapters", "import", tmp_path / "kv.safetensors", "kv", *at).stdout
    assert "hf://me/kv@v1 holds" in run("adapters", "import", tmp_path / "kv.safetensors", "hf://me/kv", *at).stdout
    version = Store(tmp_path / "store").version("kv")
    read = Adapter.read(version.manifest, version.read)
    assert all((read.lora[name] == tensor).all() for name, tensor in make_adapter(base.spec, 3).lora.items())
    run("generate", "a photo", "-n", 1, "--steps", 2, "--adapter", "kv", "--out", tmp_path / "out", *at)

    more = dict(make_adapter(base.spec, 3).lora)
    [(a, _), (b, factor)] = list(more.items())[:2]
    more |= {a.replace("attn2", "attn1"): factor.T.contiguous(), b.replace("attn2", "attn1"): factor.clone()}
    (tmp_path / "more.safetensors").write_bytes(write_lora(read_lora("x", save(more)), tongue))
    told = run("adapters", "import", tmp_path / "more.safetensors", "more", *at)
    assert "export --merge more@v1" in told.stdout
    assert "are no keys or values" in told.stderr
    refused = run("generate", "a photo", "-n", 1, "--adapter", "more", "--out", tmp_path / "out", *at, code=1)
    assert "export --merge" in refused.stderr
    refused = run("train", "--concept", zipped(tmp_path / "dog.zip", 0), "--adapter", "more", *at, code=1)
    assert "the adapter touches" in refused.stderr
    Store(tmp_path / "store").push("more", "hf://me/more")
    for ref in ("more@v1", "hf://me/more@v1:0.5"):
        planned = run("export", "--onnx", "--merge", ref, "--out", tmp_path / "b", "--dry-run", "--json", *at)
        assert len(json.loads(planned.stdout)["merged"]) == 1


def test_an_import_for_another_base_is_refused(
    bases: dict[str, BaseModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Shapes are held to the base before anything is stored."""
    (tmp_path / "kv.safetensors").write_bytes(kv_file(bases["sd15"], "kohya"))
    at = ("--base", folders[BASE], "--store", tmp_path / "store")
    refused = run("adapters", "import", tmp_path / "kv.safetensors", "kv", *at, code=1)
    assert "in this base it is" in refused.stderr
    assert not (tmp_path / "store").exists()


def test_what_eval_writes_can_be_put_on_a_card(learned: Path, tmp_path: Path) -> None:
    """The file that `cpserve eval` leaves is the one that `annotate` reads."""
    store = Store(shutil.copytree(learned / "store", tmp_path / "mine"))
    picture = Image.new("RGB", (8, 8))
    made = Evaluation(
        concepts=("dog", "cat"),
        kept={0: {0: 1.0}, 1: {0: 0.5, 1: 1.0}},
        alignment={0: {}, 1: {}},
        dc={0: {}, 1: {}},
        a_mmd={},
        f_mmd={0: 0.25},
        drift=[0.1, 0.2],
        pictures={0: {0: [picture]}, 1: {0: [picture], 1: [picture]}},
    )
    (tmp_path / "measured").mkdir()
    write_evaluation(tmp_path / "measured", made, evaluation_value(made, "pixels", store.version("pets")), [1, 2])
    run("adapters", "annotate", "pets", tmp_path / "measured", "--store", store.root)
    version = store.version("pets@v3")
    assert version.manifest.metrics["kept"] == 0.5
    assert MATRIX in version.paths()
    assert f"({MATRIX})" in version.read("README.md").decode()


PLAIN = """
import sys
sys.modules.update(dict.fromkeys(("cpserve", "trainer", "adapter_store", "export")))
import numpy as np, torch
{snippet}
from diffusers import DPMSolverMultistepScheduler
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
noise = torch.from_numpy(np.load(sys.argv[1]))
np.save(sys.argv[2], pipe({prompt!r}, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="np").images)
"""


@pytest.mark.parametrize("number", [1, 3])
def test_plain_diffusers_draws_what_was_pulled(
    learned: Path, folders: dict[str, Path], bases: dict[str, BaseModel], hub: HubServer, tmp_path: Path, number: int
) -> None:
    """Without cpserve, the card's own snippet loads a version from the folder pulled, and draws what cpserve draws."""
    store = Store(shutil.copytree(learned / "store", tmp_path / "mine"))
    cow = ("--concept", learned / "cow.zip", "--adapter", "pets", "--store", store.root)
    run("train", *cow, *quick(learned, folders))
    store.push("pets", PETS)
    other = Store(tmp_path / "other")
    other.pull(f"{PETS}@v{number}")
    folder = other.checkout(f"pets@v{number}", tmp_path / "pets")
    [snippet] = re.findall(r"```python\n(.*?)\npipe\(", (folder / "README.md").read_text(), re.DOTALL)
    base, version = bases[BASE], other.version(f"pets@v{number}")
    snippet = snippet.replace(json.dumps(base.spec.entry.id), repr(str(folders[BASE])))
    prompt = f"a photo of {version.manifest.concepts[-1].token}"
    noise = starting_noise([5], (base.spec.channels, base.spec.latent_size, base.spec.latent_size))
    np.save(tmp_path / "noise.npy", noise.numpy())
    script = PLAIN.format(snippet=snippet, prompt=prompt)
    subprocess.run([sys.executable, "-c", script, "../noise.npy", "../made.npy"], cwd=folder, check=True)
    with EagerEngine(base) as engine:
        adapter = Adapter.read(version.manifest, version.read)
        latents = draw_latents(engine, [Prompt(prompt, adapter)], [5], Drawing(steps=4, guidance=3.0))
        ours = (engine.decode(latents).clamp(-1, 1) + 1) / 2
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - np.load(tmp_path / "made.npy")).max() < 1e-3
    assert WEIGHTS in version.paths()
    for concept in version.manifest.concepts:
        assert (folder / "samples" / f"{concept.name}-0.png").is_file()
