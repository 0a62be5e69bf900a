"""OpenVINO runs the same graphs, in the precision that was asked for, and builds only the shapes that it was made for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from cpserve import Drawing, generate
from cpserve.base import BaseModel
from cpserve.bundle import read_bundle
from cpserve.engine import open_engine
from cpserve.engines.compiled import filled, turns
from cpserve.errors import EngineError
from cpserve.prompts import Prompt
from export import parity
from export.build import plan_export
from export.target import CPU_ROWS, Target, resolve
from tests.conftest import once
from tests.retarget import openvino, retarget

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from cpserve.engines import openvino as engines
from cpserve.engines.openvino import OpenvinoEngine


@pytest.fixture(scope="module")
def bundle(bases: dict[str, BaseModel], bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the fastest precision of this CPU."""
    target = replace(openvino(bases["sd21"]), precision=None)
    return once(
        tmp_path_factory, "openvino-fastest", lambda folder: retarget(bases["sd21"], bundles["sd21"], folder, target)
    )


@pytest.mark.parametrize(
    ("fixed", "streams"),
    [
        ((), 1),
        ((1,), 1),
        ((2,), 1),
        ((3, 8), 1),
        ((1, 2, 4, 8), 1),
        ((1,), 2),
        ((1, 2, 4, 8), 2),
        ((1, 2), 3),
        (CPU_ROWS, 2),
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 31])
def test_turns_hold_every_row_once(rows: int, fixed: tuple[int, ...], streams: int) -> None:
    """Slices follow each other without gap, as long as one compiled count once filled; no stream waits while rows are left, unless
    one slice takes them all.
    """
    numbers, seen = torch.arange(rows), 0
    for cut in turns(rows, fixed, streams):
        assert torch.equal(torch.cat([numbers[s] for s in cut]), numbers[seen : cut[-1].stop])
        assert len({len(filled(numbers[s], fixed)) for s in cut}) == 1 or not fixed
        assert not fixed or len(filled(numbers[cut[0]], fixed)) in fixed
        if 1 in fixed:
            whole = (rows - seen) in fixed and (rows - seen) % streams
            assert len(cut) == (1 if whole else min(streams, rows - seen))
        if reached := [count for count in fixed if count * len(cut) <= rows - seen]:
            assert cut[0].stop - cut[0].start == reached[-1]
        seen = cut[-1].stop
    assert seen == rows


def test_odd_rests_have_all_cores() -> None:
    """Two streams share what can be shared evenly; of the rest, what is one of the counts is one slice."""
    lengths = {n: [[s.stop - s.start for s in cut] for cut in turns(n, CPU_ROWS, 2)] for n in (1, 2, 3, 6, 13, 21)}
    assert lengths == {
        1: [[1]], 2: [[1, 1]], 3: [[3]], 6: [[3, 3]], 13: [[6, 6], [1]], 21: [[10, 10], [1]],
    }  # fmt: skip


def test_the_precision_asked_for_is_the_one_computed_in(bundle: Path) -> None:
    """The compiled UNet reports the manifest's precision; the text encoder, whose K,V are kept, stays in float32."""
    recipe = read_bundle(bundle).manifest.recipe
    with OpenvinoEngine(bundle, threads=1) as engine:
        assert engine.precision == recipe.precision
        hints = [engine.compiled(g, ()).get_property("INFERENCE_PRECISION_HINT") for g in ("unet", "text_encoder")]
    assert recipe.precision in str(hints[0])
    assert "float32" in str(hints[1])


def test_a_cpu_without_bf16_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch, bases: dict[str, BaseModel]) -> None:
    """Where the CPU has float32 alone, a bf16 bundle runs in that and reports it, and exporting one is refused."""
    monkeypatch.setattr(engines, "precisions", lambda _: ("float32",))
    with OpenvinoEngine(bundle, threads=1) as engine:
        assert engine.precision == "float32"
    assert resolve(Target(runner="openvino"), bases["sd21"]).precision == "float32"
    with pytest.raises(EngineError, match="does not compute in bfloat16"):
        resolve(Target(runner="openvino", precision="bfloat16"), bases["sd21"])


def test_each_shape_is_built_once(bundle: Path) -> None:
    """Adapters and prompts in any number build nothing; a row count is compiled when it is first met."""
    with OpenvinoEngine(bundle, threads=1) as engine:
        z, t = torch.zeros(2, 4, 8, 8), torch.tensor([3.0, 900.0])
        for count in (1, 2, 5):
            bank, slot = engine.bank.packed([Prompt("a" * i) for i in range(count)])
            engine.denoise(z, t, bank, slot[-1:].repeat(2))
        assert engine.builds == {"text_encoder": 1, "unet": 1}
        engine.denoise(z[:1], t[:1], bank, slot[:1])
        assert engine.builds["unet"] == 2


def test_a_size_that_was_not_compiled_is_refused(bundle: Path) -> None:
    """A side outside the bundle's is a clear error, never a silent build."""
    with OpenvinoEngine(bundle, threads=1) as engine:
        bank, slot = engine.bank.packed([Prompt("a dog")])
        with pytest.raises(EngineError, match="compiled for 8, 16, 24"):
            engine.denoise(torch.zeros(1, 4, 32, 32), torch.tensor([3.0]), bank, slot)
        assert not engine.builds["unet"]


def test_a_result_outlives_the_next_call(bundle: Path) -> None:
    """What one call returned is not written over by the next."""
    with OpenvinoEngine(bundle, threads=1) as engine:
        bank, slot = engine.bank.packed([Prompt("a dog")])
        first = engine.denoise(torch.zeros(1, 4, 8, 8), torch.tensor([3.0]), bank, slot)
        kept = first.clone()
        engine.denoise(torch.ones(1, 4, 8, 8), torch.tensor([900.0]), bank, slot)
        assert torch.equal(first, kept)


def test_streams_do_not_mix_rows(bundle: Path) -> None:
    """Slices of a call that run at the same time give each row what it gives alone, time after time."""
    z = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, kinds = torch.tensor([900.0, 500, 20, 3, 300, 700, 100]), ["a dog", "a cat", "a red bowl", "", "a", "b", "c"]
    with OpenvinoEngine(bundle, threads=2) as engine:
        assert engine.streams == 2
        bank, slot = engine.bank.packed([Prompt(kind) for kind in kinds])
        alone = torch.cat([engine.denoise(z[i : i + 1], t[i : i + 1], bank, slot[i : i + 1]) for i in range(7)])
        for order in ([0, 1, 2, 3, 4, 5, 6], [3, 1, 6, 5, 0, 2, 4]) * 10:
            found = engine.denoise(z[order], t[order], bank, slot[order])
            torch.testing.assert_close(found, alone[order], atol=parity.LIMITS[engine.precision], rtol=0)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """torch's, and as many as before afterwards."""
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(usual)


@pytest.mark.usefixtures("three_threads")
def test_torch_gets_its_threads_back(bundle: Path) -> None:
    """While a compiled engine draws torch has one thread, and afterwards as many as before, whatever happened."""
    seen: list[int] = []
    with OpenvinoEngine(bundle, threads=1) as engine:
        generate(engine, [Prompt("")], [0], Drawing(steps=2), lambda *_: seen.append(torch.get_num_threads()))
        assert set(seen) == {1}
        with pytest.raises(EngineError):
            generate(engine, [Prompt("")], [0], Drawing(size=32 * engine.spec.vae_factor))
    assert torch.get_num_threads() == 3


def test_the_manifest_chooses_the_engine(bundle: Path, bundles: dict[str, Path]) -> None:
    """`auto` opens what the bundle was made for; its graphs run in ONNX Runtime too, where that is asked for."""
    for path, engine, kind in (
        (bundle, "auto", "openvino"),
        (bundles["sd21"], "auto", "onnx"),
        (bundle, "onnx", "onnx"),
    ):
        with open_engine(engine=engine, bundle=path, threads=1) as opened:
            assert opened.kind == kind


def test_targets_have_keys_of_their_own(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """Runner, precision, row counts and sizes are each part of the bundle's key."""
    base = bases["sd21"]
    one = openvino(base)
    targets = [Target(), one, replace(one, rows=(2,)), replace(one, sizes=one.sizes[:1])]
    keys = {plan_export(base, tmp_path / "none", target).recipe.key for target in targets}
    recipe = plan_export(base, tmp_path / "none", one).recipe
    keys.add(msgspec.structs.replace(recipe, precision="bfloat16").key)
    assert len(keys) == 5


def test_a_lower_precision_that_strays_too_far_is_not_let_out(
    bases: dict[str, BaseModel], bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each precision has its own stated tolerance, and is held to it."""
    assert parity.LIMITS["float32"] < parity.LIMITS["float16"] < parity.LIMITS["bfloat16"] < 0.1
    monkeypatch.setitem(parity.LIMITS, "float32", -1.0)
    with pytest.raises(EngineError, match="differs from torch"):
        retarget(bases["sd21"], bundles["sd21"], tmp_path / "bundle", openvino(bases["sd21"]))
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_compiled_is_refused(bases: dict[str, BaseModel]) -> None:
    """Sizes between the base's steps, and shapes for ONNX Runtime, are errors with a hint."""
    for target in (Target(runner="openvino", sizes=(63,)), Target(rows=(2,)), Target(precision="bfloat16")):
        with pytest.raises(EngineError) as refused:
            resolve(target, bases["sd21"])
        assert refused.value.hint
