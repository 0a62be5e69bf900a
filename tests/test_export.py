"""A bundle computes what torch computes, is keyed by everything it depends on, and never half appears."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
import torch
from filelock import FileLock

from cpserve.base import BaseModel, load_base
from cpserve.bundle import FILE_NAME, read_bundle
from cpserve.engines.eager import EagerEngine
from cpserve.engines.ort import OrtEngine
from cpserve.errors import EngineError
from cpserve.prompts import Prompt
from export import build, onnx_from_unet, parity
from export.build import export_onnx, plan_export
from export.target import Target
from tests import plain
from tests.tiny import SD15, SHAPES, make_adapter, write_pipeline

GRAPHS = ("unet", "text_encoder", "vae_encoder", "vae_decoder")


@pytest.fixture
def bundle(bundles: dict[str, Path], shape: str, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(bundles[shape], tmp_path / "bundle"))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, bundles: dict[str, Path], shape: str) -> list[str]:
    """Tracing replaced by a copy of graphs traced before; the names of those that were asked for."""
    asked: list[str] = []
    made = bundles[shape]  # before tracing is replaced

    def copy(graph: onnx_from_unet.Graph, folder: Path) -> None:
        asked.append(graph.name)
        shutil.copy(made / f"{graph.name}.onnx", folder)

    monkeypatch.setattr(build, "write_graph", copy)
    return asked


def test_every_graph_was_measured(bundles: dict[str, Path], shape: str) -> None:
    """The manifest says of each how far it is from torch, and the limits are those that docs/engines.md names."""
    assert set(read_bundle(bundles[shape]).manifest.parity) == set(GRAPHS)
    assert parity.LIMITS == {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}


@pytest.mark.parametrize("learned", [0, 1, 3])
def test_text_encoder_takes_learned_tokens(base: BaseModel, bundles: dict[str, Path], shape: str, learned: int) -> None:
    """The compiled text encoder equals torch with no, one and three learned tokens."""
    vocabulary, d = len(base.spec.tokenizer), base.spec.sites.weight.shape[1]
    draw = torch.Generator().manual_seed(learned)
    ids, extra = torch.randint(vocabulary + learned, (4, 77), generator=draw), torch.randn(learned, d, generator=draw)
    ids[0, :learned] = torch.arange(vocabulary, vocabulary + learned)
    with OrtEngine(bundles[shape], threads=1) as engine:
        torch.testing.assert_close(
            engine.encode_text(ids, extra), base.encode_text(ids, extra).detach(), atol=1e-4, rtol=0
        )


def test_latents_are_of_unit_scale(
    base: BaseModel, bundles: dict[str, Path], folders: dict[str, Path], shape: str
) -> None:
    """The compiled VAE scales latents by the factor in the VAE's own configuration, as diffusers does, both ways."""
    judge = plain.pipeline(folders[shape]).vae
    pictures = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with OrtEngine(bundles[shape], threads=1) as engine, torch.no_grad():
        expected = judge.encode(pictures).latent_dist.mean * judge.config.scaling_factor
        torch.testing.assert_close(engine.encode_pictures(pictures), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(engine.decode(expected), base.decode(expected), atol=1e-4, rtol=0)


def test_a_bundle_needs_no_base(bundle: Path, folders: dict[str, Path], shape: str) -> None:
    """With its base in no place that it knows, a bundle opens, knows its base and runs it under an adapter."""
    document = json.loads((bundle / FILE_NAME).read_text())
    assert document["base"] == str(folders[shape])
    (bundle / FILE_NAME).write_text(json.dumps(document | {"base": "/gone"}))
    with OrtEngine(bundle, threads=1) as engine:
        bank, slot = engine.bank.packed([Prompt("a <dog>", make_adapter(engine.spec, 1))])
        compiled = engine.denoise(torch.ones(1, 4, 8, 8), torch.tensor([500.0]), bank, slot)
        spec = engine.spec
    base = load_base(str(folders[shape]))
    assert spec.entry.fingerprint == base.spec.entry.fingerprint
    assert spec.signature == base.spec.signature
    assert spec.schedule.config == base.spec.schedule.config
    assert torch.equal(spec.sites.weight, base.spec.sites.weight)
    with EagerEngine(base) as eager:
        ours = eager.denoise(
            torch.ones(1, 4, 8, 8),
            torch.tensor([500.0]),
            *eager.bank.packed([Prompt("a <dog>", make_adapter(base.spec, 1))]),
        )
    torch.testing.assert_close(compiled, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", [*(f"{g}.onnx" for g in GRAPHS), "kv_projections.safetensors", "tokenizer/tokenizer.json"]
)
def test_a_changed_byte_is_found(bundle: Path, name: str) -> None:
    """A flipped byte anywhere in a file is an error that names the file."""
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(EngineError, match=name):
        OrtEngine(bundle)


def test_a_missing_file_is_found(bundle: Path) -> None:
    """A file that is gone is an error that names it."""
    (bundle / "vae_decoder.onnx").unlink()
    with pytest.raises(EngineError, match=r"vae_decoder\.onnx"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d["recipe"].update(scaling_factor=0.18251), "was changed"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d["recipe"].update(schema_version=99), "schema_version"),
        (lambda d: d["files"].append({**d["files"][0], "path": "../outside"}), "outside"),
        (lambda d: d["files"].append({**d["files"][0], "path": "\0"}), "missing"),
        (lambda d: d["files"].append({**d["files"][0], "path": 150 * "ä"}), "missing"),
        (lambda d: d.update(files=[f for f in d["files"] if f["path"] != "unet.onnx"]), r"unet\.onnx is missing"),
    ],
)
def test_a_changed_manifest_is_found(bundle: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    """A recipe that was edited, an unknown field, a newer schema, a path out of the folder, a file left out: refused."""
    document = json.loads((bundle / FILE_NAME).read_text())
    change(document)
    (bundle / FILE_NAME).write_text(json.dumps(document))
    with pytest.raises(EngineError, match=match):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "change", [{"beta_schedule": "x"}, {"num_train_timesteps": 0}, {"num_train_timesteps": 10**13}]
)
def test_a_strangers_schedule_is_refused_in_words(bundle: Path, change: dict[str, Any]) -> None:
    """Whole and hashed anew, and nothing that an export makes."""
    manifest = read_bundle(bundle).manifest
    recipe = msgspec.structs.replace(manifest.recipe, schedule={**manifest.recipe.schedule, **change})
    (bundle / FILE_NAME).write_bytes(msgspec.structs.replace(manifest, recipe=recipe, key=recipe.key).dump())
    with pytest.raises(EngineError, match="cannot be read"):
        read_bundle(bundle)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    """A folder without a manifest is an error that says how to make a bundle."""
    with pytest.raises(EngineError) as refused:
        OrtEngine(tmp_path)
    assert "cpserve export" in refused.value.hint


def test_exporting_again_is_up_to_date(base: BaseModel, bundle: Path, traced: list[str]) -> None:
    """A bundle with the same key is not built again, whatever folder it lies in."""
    assert plan_export(base, bundle).action == "up to date"
    assert export_onnx(base, bundle).root == bundle
    assert not traced


def test_a_damaged_bundle_is_replaced(base: BaseModel, bundle: Path, traced: list[str]) -> None:
    """Exporting over a bundle with a changed byte makes it sound again, and reports each part that it works on."""
    (bundle / "unet.onnx").write_bytes(b"")
    told: list[str] = []
    export_onnx(base, bundle, progress=told.append)
    assert traced == list(GRAPHS)
    assert len(told) == len(GRAPHS) + 1
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]
    read_bundle(bundle)


def test_the_key_holds_everything(bases: dict[str, BaseModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine's key changes with weights, configuration, VAE factor, schedule, tokenizer, opset and libraries."""

    def key(base: BaseModel) -> str:
        return plan_export(base, tmp_path / "none").recipe.key

    base = bases["sd15"]
    keys = {key(base), key(bases["sd21"])}
    keys.add(key(load_base(str(write_pipeline(tmp_path / "weights", SD15, seed=1)))))
    keys.add(key(load_base(str(write_pipeline(tmp_path / "factor", SD15, scaling_factor=0.5)))))
    heads = replace(SD15, unet={"attention_head_dim": 4})
    keys.add(key(load_base(str(write_pipeline(tmp_path / "heads", heads)))))
    schedule = replace(base.spec.schedule, config={**base.spec.schedule.config, "beta_end": 0.013})
    keys.add(key(replace(base, spec=replace(base.spec, schedule=schedule))))
    folder = write_pipeline(tmp_path / "tokens", SD15)
    vocabulary = folder / "tokenizer" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"%</w>"', '"%%</w>"'))
    keys.add(key(load_base(str(folder))))
    monkeypatch.setattr(build, "OPSET", 23)
    keys.add(key(base))
    monkeypatch.undo()
    monkeypatch.setattr(build, "version", lambda name: f"{name} of another day")
    keys.add(key(base))
    assert len(keys) == 9


def test_the_key_ignores_where_things_lie(
    bases: dict[str, BaseModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    """A base's copy in another folder, and one that has drawn since, have the same key."""
    copied = load_base(str(shutil.copytree(folders["sd15"], tmp_path / "copy")))
    before = plan_export(copied, tmp_path / "none").recipe.key
    with EagerEngine(copied) as engine:
        engine.bank.packed([Prompt("a <dog>", make_adapter(copied.spec, 1)), Prompt("a dog")])
    assert plan_export(copied, tmp_path / "none").recipe.key == before
    assert plan_export(bases["sd15"], tmp_path / "none").recipe.key == before


def test_the_key_ignores_the_order_of_a_set(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """diffusers lists the settings that a scheduler's file leaves out in an order of chance."""
    base, keys = bases["sd15"], set()
    for names in (["a", "b"], ["b", "a"]):
        schedule = replace(base.spec.schedule, config={**base.spec.schedule.config, "_use_default_values": names})
        keys.add(plan_export(replace(base, spec=replace(base.spec, schedule=schedule)), tmp_path).recipe.key)
    assert len(keys) == 1


def test_a_plan_tells_names_and_sizes(base: BaseModel, bundles: dict[str, Path], shape: str, tmp_path: Path) -> None:
    """The plan's size is that of the bundle to within the graphs' own weightless part, and planning writes nothing."""
    plan = plan_export(base, tmp_path / "bundle")
    assert plan.action == "build"
    assert not any(tmp_path.iterdir())
    made = {p.name for p in bundles[shape].iterdir()}
    assert {f.name.rstrip("/") for f in plan.files} == made
    weights = (bundles[shape] / "unet.onnx").stat().st_size
    assert 0.7 * weights < next(f.bytes for f in plan.files if f.name == "unet.onnx") <= weights
    assert plan.bytes == sum(f.bytes for f in plan.files)


def test_what_is_not_a_bundle_is_left_alone(base: BaseModel, bundle: Path, tmp_path: Path, traced: list[str]) -> None:
    """A file, a folder of other things and a bundle with a stranger's file in it are refused and stay as they are."""
    file, folder, deep = tmp_path / "file", tmp_path / "folder", tmp_path / "deep"
    file.write_text("mine")
    for where, words in ((folder, "{}"), (deep, '{"files":' + 100_000 * "[")):
        where.mkdir()
        (where / FILE_NAME).write_text(words)
    (bundle / "notes.txt").write_text("mine")
    for out in (file, folder, deep, bundle):
        with pytest.raises(EngineError, match="left alone"):
            export_onnx(base, out)
    assert file.read_text() == (bundle / "notes.txt").read_text() == "mine"
    assert not traced


def test_a_bundle_of_an_older_schema_is_replaced(base: BaseModel, bundle: Path, traced: list[str]) -> None:
    """What an earlier version made is not read, but made again in its place, unless something else lies in it."""
    manifest = json.loads((bundle / FILE_NAME).read_text())
    manifest["recipe"] = {"schema_version": 3, "of": "fields unknown"}
    (bundle / FILE_NAME).write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="schema_version"):
        read_bundle(bundle)
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(EngineError, match="left alone"):
        export_onnx(base, bundle)
    (bundle / "notes.txt").unlink()
    assert plan_export(base, bundle).action == "replace"
    assert read_bundle(export_onnx(base, bundle).root).manifest.key == plan_export(base, bundle).recipe.key
    assert traced


@pytest.mark.usefixtures("traced")
def test_graphs_that_differ_are_not_let_out(shape: str, tmp_path: Path) -> None:
    """Graphs that compute something other than the base are an error, and neither bundle nor litter appears."""
    other = load_base(str(write_pipeline(tmp_path / "base", SHAPES[shape], seed=1)))
    with pytest.raises(EngineError, match="differs from torch"):
        export_onnx(other, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_an_old_bundle_survives_a_failed_export(
    base: BaseModel, bundle: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a new bundle fails its parity check, the old one stays."""
    monkeypatch.setattr(build, "OPSET", 19)
    monkeypatch.setitem(parity.LIMITS, "float32", -1.0)
    before = (bundle / FILE_NAME).read_bytes()
    with pytest.raises(EngineError, match="differs"):
        export_onnx(base, bundle)
    assert traced
    assert (bundle / FILE_NAME).read_bytes() == before


def test_half_precision_is_really_half(bases: dict[str, BaseModel], bundles: dict[str, Path], tmp_path: Path) -> None:
    """A float16 bundle has half the bytes where it says so, differs from float32, and by no more than its tolerance."""
    bundle = plan_export(bases["sd21"], tmp_path / "bundle", Target(precision="float16")).execute()
    assert bundle.manifest.recipe.precision == "float16"
    for name in ("unet", "vae_decoder"):
        half, full = (p / f"{name}.onnx" for p in (bundle.root, bundles["sd21"]))
        assert half.stat().st_size < 0.75 * full.stat().st_size
        assert 1e-4 < bundle.manifest.parity[name] < 2e-2
        graph = onnx.load(half).graph
        assert {t.type.tensor_type.elem_type for t in graph.output} == {onnx.TensorProto.FLOAT}
        weights = [w for w in graph.initializer if len(w.dims) > 1]
        assert sum(w.data_type == onnx.TensorProto.FLOAT16 for w in weights) > 0.9 * len(weights)
    assert max(bundle.manifest.parity[name] for name in ("text_encoder", "vae_encoder")) <= 1e-4


def test_graphs_say_nothing_of_the_machine(bundles: dict[str, Path], shape: str) -> None:
    """No graph carries a path or a Python source line of the machine that traced it."""
    for name in GRAPHS:
        content = onnx.load(bundles[shape] / f"{name}.onnx", load_external_data=False).SerializeToString()
        assert b".py" not in content
        assert str(Path.home()).encode() + b"/" not in content


def test_inputs_are_the_signatures(base: BaseModel, bundles: dict[str, Path], shape: str) -> None:
    """The UNet graph's names, ranks and fixed axes are those of the signature's table."""
    graph = onnx.load(bundles[shape] / "unet.onnx").graph
    for given, expected in zip(
        [*graph.input, *graph.output], [*base.spec.signature.inputs, base.spec.signature.output], strict=True
    ):
        assert given.name == expected.name
        for axis, size in zip(given.type.tensor_type.shape.dim, expected.axes, strict=True):
            assert axis.dim_value == (0 if isinstance(size, str) else size)


@pytest.mark.usefixtures("bundle", "traced")
def test_what_killed_exports_left_goes_away(base: BaseModel, tmp_path: Path) -> None:
    """The next export to the same place removes a dead one's folder, and leaves that of a living one and other people's."""
    dead, alive, other = (tmp_path / "place" / name for name in (".out.dead", ".out.alive", ".out.mine"))
    for folder in (dead, alive, other):
        (folder / "bundle").mkdir(parents=True)
    (dead / build.LOCK).touch()
    with FileLock(alive / build.LOCK):
        export_onnx(base, tmp_path / "place" / "out")
    assert {p.name for p in (tmp_path / "place").iterdir()} == {"out", ".out.alive", ".out.mine"}
