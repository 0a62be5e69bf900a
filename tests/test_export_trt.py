"""A plan is built for real, without a GPU, from the very graphs that were compared with torch. Running one needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpserve.base import BaseModel
from cpserve.bundle import read_bundle
from cpserve.engine import open_engine
from cpserve.engines import trt as engines
from cpserve.engines.trt import profile_of, used
from cpserve.errors import EngineError
from cpserve.prompts import Prompt
from export import plan_from_onnx
from export.build import plan_export
from export.target import Target, resolve
from tests.conftest import once
from tests.retarget import retarget
from tests.tiny import make_adapter

try:
    AHEAD = plan_from_onnx.ahead_of_time(engines.load_tensorrt())
except EngineError:
    AHEAD = False
ahead = pytest.mark.skipif(not AHEAD, reason="tensorrt-rtx, which builds without a GPU, is not installed")
gpu = pytest.mark.skipif(not (AHEAD and torch.cuda.is_available()), reason="there is no NVIDIA GPU here")


def trt(base: BaseModel) -> Target:
    return Target(runner="trt", rows=(1, 2), sizes=(8 * base.spec.vae_factor,), gpus=("sm86",))


@pytest.fixture(scope="module")
def bundle(bases: dict[str, BaseModel], bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = bases["sd15"]
    return once(tmp_path_factory, "trt", lambda folder: retarget(base, bundles["sd15"], folder, trt(base)))


@ahead
def test_plans_are_built_without_a_gpu(bundle: Path, bases: dict[str, BaseModel]) -> None:
    """The bundle holds plans of the UNet and the decoder, as large as their weights at least, and their graphs' parity."""
    manifest = read_bundle(bundle).manifest
    sizes = {entry.path: entry.size for entry in manifest.files}
    weights = sum(4 * p.numel() for p in bases["sd15"].unet.parameters())
    assert sizes["unet.plan"] > 0.5 * weights
    assert sizes["vae_decoder.plan"] > 0
    assert max(manifest.parity.values()) <= 1e-4
    assert manifest.recipe.gpus == ("sm86",)
    assert any(name.startswith("tensorrt") for name in manifest.recipe.libraries)


@ahead
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_engine_says_so(bundle: Path) -> None:
    """Opening a plan without a GPU is an error that names the way out; that way works."""
    with pytest.raises(EngineError, match="no NVIDIA GPU") as refused:
        open_engine(bundle=bundle)
    assert "--engine onnx" in refused.value.hint
    with open_engine(engine="onnx", bundle=bundle, threads=1) as engine:
        assert engine.kind == "onnx"


def test_a_bundle_without_plans_is_none_for_tensorrt(bundles: dict[str, Path]) -> None:
    """Whatever is installed here."""
    with pytest.raises(EngineError, match="holds no TensorRT plans") as refused:
        open_engine(engine="trt", bundle=bundles["sd15"])
    assert "cpserve export --trt" in refused.value.hint


@ahead
def test_a_graph_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    """What TensorRT cannot parse is an error in TensorRT's own words."""
    (tmp_path / "unet.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"cannot build unet\.onnx"):
        plan_from_onnx.write_plan(tmp_path / "unet.onnx", tmp_path / "unet.plan", [], ("sm86",))
    assert not (tmp_path / "unet.plan").exists()


@ahead
def test_plans_have_keys_of_their_own(
    bases: dict[str, BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Architectures, precision, shapes and TensorRT's version are each part of the key."""
    base = bases["sd15"]
    one = trt(base)
    others = [
        one,
        replace(one, gpus=("sm89",)),
        replace(one, precision="float16"),
        replace(one, rows=(2,)),
        replace(one, sizes=(128,)),
    ]
    keys = {plan_export(base, tmp_path / "none", t).recipe.key for t in others}
    monkeypatch.setattr(engines.load_tensorrt(), "__version__", "0")
    keys.add(plan_export(base, tmp_path / "none", one).recipe.key)
    assert len(keys) == 6


def test_bf16_plans_are_refused(bases: dict[str, BaseModel]) -> None:
    """A precision whose graph cannot be compared is not promised."""
    with pytest.raises(EngineError, match="bf16"):
        resolve(Target(runner="trt", precision="bfloat16"), bases["sd15"])


def test_without_tensorrt_exporting_says_what_to_install(
    bases: dict[str, BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing library is one sentence and the command that installs it."""
    monkeypatch.setattr(engines, "MODULES", ("no_such_module",))
    engines.load_tensorrt.cache_clear()
    with pytest.raises(EngineError) as refused:
        resolve(Target(runner="trt"), bases["sd15"])
    engines.load_tensorrt.cache_clear()
    assert "pip install" in refused.value.hint


def test_the_bank_is_cut_to_the_rows() -> None:
    """However many prompts a bank holds, the plan is handed at most one a row, and every row finds its own."""
    bank = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))
    for slot in (torch.tensor([8, 2, 8]), torch.tensor([5])):
        kept, renumbered = used(bank, slot)
        assert len(kept) <= len(slot)
        assert torch.equal(kept[renumbered], bank[slot])


def test_a_shape_outside_every_profile_is_refused() -> None:
    """Profiles are chosen by shape; none that fits is a clear error."""

    class Engine:
        num_optimization_profiles = 2

        def get_tensor_profile_shape(self, _name: str, i: int) -> list[tuple[int, ...]]:
            return [(i + 1, 4, 8, 8)] * 3

    assert profile_of(Engine(), {"latents": (2, 4, 8, 8)}) == 1
    with pytest.raises(EngineError, match="no profile"):
        profile_of(Engine(), {"latents": (3, 4, 8, 8)})


@gpu
def test_a_plan_equals_torch(bundle: Path, bases: dict[str, BaseModel]) -> None:
    """On a GPU, rows of mixed adapters through the plan equal torch's to 1e-3; swapping back and forth leaves nothing."""
    spec = bases["sd15"].spec
    a, b = make_adapter(spec, 1), make_adapter(spec, 2)
    prompts = [Prompt("a <dog>", a), Prompt("a <dog>", b)]
    z, t = torch.ones(2, 4, 8, 8), torch.tensor([500.0, 20.0])
    with open_engine(bundle=bundle) as engine, open_engine(engine="onnx", bundle=bundle) as judge:
        first, other, again = (engine.infer(z, t, *engine.bank.packed(p)) for p in (prompts, prompts[::-1], prompts))
        torch.testing.assert_close(first, judge.infer(z, t, *judge.bank.packed(prompts)), atol=1e-3, rtol=0)
        assert torch.equal(first, again)
        assert not torch.allclose(first, other, atol=1e-3)
