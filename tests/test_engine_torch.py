"""torch's engines: the compiled one draws what the plain one draws, in half precision; on a GPU all draw what the CPU does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpserve import Drawing, generate
from cpserve.base import BaseModel, load_base
from cpserve.engine import Engine, open_engine
from cpserve.engines.eager import CompileEngine, EagerEngine
from cpserve.engines.ort import OrtEngine
from cpserve.prompts import Prompt
from cpserve.recognition import Judging, classify
from export.parity import LIMITS
from tests.tiny import make_adapter

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")


def promises_any_memory() -> bool:
    """Whether Linux was told to overcommit without end."""
    setting = Path("/proc/sys/vm/overcommit_memory")
    return setting.exists() and setting.read_text().strip() == "1"


def mixed(engine: Engine) -> Tensor:
    """The UNet's output for rows that mix adapters, prompts and timesteps, on the CPU."""
    a, b = make_adapter(engine.spec, 1), make_adapter(engine.spec, 2)
    bank, slot = engine.bank.packed([Prompt("a <dog>", a), Prompt("a <dog>", b), Prompt("a red bowl")])
    z = torch.randn(3, engine.spec.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([900.0, 500.0, 20.0])
    return engine.denoise(z.to(engine.device), t.to(engine.device), bank, slot).cpu()


def assert_equal_rows(found: Tensor, judge: Tensor, precision: str) -> None:
    assert (found - judge).abs().max() <= LIMITS[precision] * max(1.0, float(judge.abs().max()))


def test_half_precision_is_a_copy(base: BaseModel) -> None:
    """The compile engine computes in half precision, says so, and leaves the base in float32 as it was."""
    with EagerEngine(base) as eager, CompileEngine(base) as engine, torch.compiler.set_stance("force_eager"):
        judge = mixed(eager)
        found = mixed(engine)
        assert engine.precision in {"bfloat16", "float16"}
        assert not torch.equal(found, judge)
        assert_equal_rows(found, judge, engine.precision)
        assert torch.equal(mixed(eager), judge)


def test_the_unet_sees_few_large_rows_at_once(bases: dict[str, BaseModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that mix adapters, prompts and timesteps give the same, and SDXL's with their sizes, where one fills a call."""
    for base in (bases["sd15"], bases["sdxl"]):
        seen: list[int] = []
        with EagerEngine(base) as engine, monkeypatch.context() as patch:
            judge = mixed(engine)
            patch.setattr("cpserve.engines.eager.CELLS", 64)
            hook = base.unet.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
            torch.testing.assert_close(mixed(engine), judge, atol=1e-4, rtol=0)
            hook.remove()
        assert seen == [1, 1, 1]


def test_the_autoencoder_sees_few_large_pictures_at_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a budget of one picture's pixels it sees them one by one, and what comes out is the same."""
    side, seen = base.spec.pixels, list[int]()
    encode = BaseModel.encode_pictures

    def counted(self: BaseModel, pictures: Tensor) -> Tensor:
        seen.append(len(pictures))
        return encode(self, pictures)

    monkeypatch.setattr(BaseModel, "encode_pictures", counted)
    pictures = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with EagerEngine(base) as engine:
        whole = engine.encode_pictures(pictures)
        decoded = engine.decode(whole)
        monkeypatch.setattr("cpserve.engines.eager.PIXELS", side**2)
        torch.testing.assert_close(engine.encode_pictures(pictures), whole)
        torch.testing.assert_close(engine.decode(whole), decoded, atol=1e-4, rtol=0)
    assert seen == [3, 1, 1, 1]


def test_a_graph_for_any_rows_sees_few_large_ones_at_once(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's session takes all that it is given, and attention's memory goes with the rows."""
    seen: list[int] = []
    with OrtEngine(bundles["sd15"], threads=1) as engine:
        judge = mixed(engine)
        [(key, runner)] = [(k, r) for k, r in engine._runners.items() if k[0] == "unet"]
        engine._runners[key] = lambda *inputs: (seen.append(len(inputs[0])), runner(*inputs))[1]
        monkeypatch.setattr("cpserve.engines.compiled.CELLS", 64)
        torch.testing.assert_close(mixed(engine), judge, atol=1e-4, rtol=0)
    assert seen == [1, 1, 1]


@pytest.mark.skipif(promises_any_memory(), reason="the system would kill the process, not refuse it the memory")
def test_onnx_runtime_without_memory_says_so(bundles: dict[str, Path]) -> None:
    """Attention over a quarter of a million places does not fit, and the error is the one that everybody knows."""
    with OrtEngine(bundles["sd15"], threads=1) as engine:
        bank, slot = engine.bank.packed([Prompt("a dog")])
        large = torch.zeros(1, engine.spec.channels, 512, 512)
        with pytest.raises(MemoryError, match="ONNX Runtime"):
            engine.denoise(large, torch.tensor([500.0]), bank, slot)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiling_costs_no_precision(bases: dict[str, BaseModel]) -> None:
    """What torch.compile makes of the UNet is about as far from float32 as half precision itself, and draws whole pictures."""
    base = bases["sd15"]
    with EagerEngine(base) as eager, CompileEngine(base) as engine:
        judge, found = mixed(eager), mixed(engine)
        with torch.compiler.set_stance("force_eager"):
            lowered = mixed(engine)
        assert (found - judge).abs().mean() <= 1.5 * (lowered - judge).abs().mean()
        [drawn] = generate(engine, [Prompt("a dog")], [0], Drawing(steps=4))
        assert drawn.image.size == (base.spec.pixels, base.spec.pixels)


@pytest.fixture(params=["eager", "compile", "onnx"])
def on_gpu(request: pytest.FixtureRequest, folders: dict[str, Path], bundles: dict[str, Path]) -> Iterator[Engine]:
    """An engine on the GPU."""
    if request.param == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in runtime.get_available_providers():
            pytest.skip("onnxruntime-gpu is not installed")
    bundle = bundles["sd21"] if request.param == "onnx" else None
    with open_engine(str(folders["sd21"]), engine=request.param, bundle=bundle) as engine:
        assert engine.device.type == "cuda"
        yield engine


@gpu
def test_rows_on_a_gpu_equal_the_cpu(on_gpu: Engine, folders: dict[str, Path]) -> None:
    """Rows of mixed adapters, prompts and timesteps equal torch's on the CPU; once more, they are the same bit for bit."""
    with EagerEngine(load_base(str(folders["sd21"]))) as judge:
        first = mixed(on_gpu)
        # TF32 is off by default, so that float32 means float32 there, too
        tolerance = 1e-3 if on_gpu.precision == "float32" else LIMITS[on_gpu.precision]
        assert (first - mixed(judge)).abs().max() <= tolerance * max(1.0, float(first.abs().max()))
        assert torch.equal(mixed(on_gpu), first)


@gpu
def test_drawing_and_recognising_on_a_gpu(on_gpu: Engine, folders: dict[str, Path]) -> None:
    """Pictures come out as on the CPU to within a few steps of 255, and are recognised alike."""
    adapter = make_adapter(on_gpu.spec, 1, ("<dog>", "<cat>"))
    with EagerEngine(load_base(str(folders["sd21"]))) as judge:
        [ours], [theirs] = (
            generate(e, [Prompt("a <dog>", adapter)], [0], Drawing(steps=4, guidance=1.0)) for e in (on_gpu, judge)
        )
        answers = [classify(e, [theirs.image], adapter, Judging(draws=8, error=0.0))[0] for e in (on_gpu, judge)]
    pixels = [torch.frombuffer(bytearray(d.image.tobytes()), dtype=torch.uint8).int() for d in (ours, theirs)]
    assert (pixels[0] - pixels[1]).float().abs().mean() <= 4
    assert answers[0].label == answers[1].label
