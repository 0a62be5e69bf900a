"""What an engine promises, whatever runs it, judged by plain diffusers; each law is one that some server breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cpserve import prompts
from cpserve.base import BaseModel
from cpserve.engine import Engine, on_grid, open_engine
from cpserve.engines.eager import EagerEngine
from cpserve.engines.ort import OrtEngine
from cpserve.errors import EngineError
from cpserve.prompts import Prompt
from cpserve.recognition import Judging, classify
from cpserve.sample import dpm_solver, guided, starting_noise
from tests import plain
from tests.conftest import once
from tests.retarget import openvino, retarget
from tests.tiny import make_adapter, outspoken

NOISE = (4, 8, 8)


@pytest.fixture(params=["eager", "onnx", "openvino"])
def engine(request: pytest.FixtureRequest, base: BaseModel, shape: str) -> Iterator[Engine]:
    """Each law holds for torch and for a compiled bundle, whatever runs it."""
    if request.param == "eager":
        opened: Engine = EagerEngine(base)
    else:
        name = "bundles" if request.param == "onnx" else "openvino_bundles"
        opened = open_engine(bundle=request.getfixturevalue(name)[shape], threads=1)
    assert opened.kind == request.param
    with opened:
        yield opened


@pytest.fixture(scope="session")
def openvino_bundles(
    bases: dict[str, BaseModel], bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Bundles for OpenVINO in float32, of the graphs traced before."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")

    def made(name: str, base: BaseModel) -> Path:
        return once(
            tmp_path_factory, f"openvino-{name}", lambda folder: retarget(base, bundles[name], folder, openvino(base))
        )

    return {name: made(name, base) for name, base in bases.items()}


def rows(count: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded latents `[B,4,side,side]` and a timestep of its own for each row."""
    z = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(5))
    return z, torch.linspace(950, 3, count).round()


def run(engine: Engine, prompts: list[Prompt], z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return engine.denoise(z, t, *engine.bank.packed(prompts))


def test_rows_equal_plain_diffusers(engine: Engine, folders: dict[str, Path], shape: str) -> None:
    """Parity row by row, timesteps and adapters mixed: the compiled engine, torch and diffusers agree to 1e-4."""
    a, b = make_adapter(engine.spec, 1, ("<dog>", "<cat>")), make_adapter(engine.spec, 2)
    mixed = [
        Prompt("a <dog> on the moon", a),
        Prompt("a <dog> on the moon", b),
        Prompt("a red cat"),
        Prompt("<cat>", a, 0.3),
    ]
    z, t = rows(len(mixed))
    ours = engine.infer(z, t, *engine.bank.packed(mixed), *engine.spec.sizes(z))
    for i, p in enumerate(mixed):
        judge = plain.unet_row(folders[shape], p.adapter, p.text, z[i], t[i], p.scale)
        torch.testing.assert_close(ours[i], judge, atol=1e-4, rtol=0)


def test_a_then_b_then_a_is_a_again(engine: Engine) -> None:
    """Swapping to another adapter and back leaves nothing behind: the first result returns bit for bit."""
    a, b = make_adapter(engine.spec, 1), make_adapter(engine.spec, 2)
    z, t = rows(2)
    first, other, again = (run(engine, [Prompt("a photo of <dog>", x)] * 2, z, t) for x in (a, b, a))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_rows_of_one_batch_equal_single_runs(engine: Engine) -> None:
    """Rows under adapter A, adapter B and the base in one batch equal the three single runs."""
    mixed = [
        Prompt("a photo of <dog>", make_adapter(engine.spec, 1)),
        Prompt("<dog>", make_adapter(engine.spec, 2)),
        Prompt("dog"),
    ]
    z, t = rows(3)
    together = run(engine, mixed, z, t)
    for i, prompt in enumerate(mixed):
        torch.testing.assert_close(
            together[i : i + 1], run(engine, [prompt], z[i : i + 1], t[i : i + 1]), atol=1e-4, rtol=0
        )


def test_a_thousand_swaps_build_nothing(bundles: dict[str, Path], shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 adapters in turn on a compiled engine: each graph is opened once, and the bank stays bounded."""
    with OrtEngine(bundles[shape], threads=1) as engine:
        z, t = rows(1)
        row = engine.bank.packed([Prompt("")])[0].nbytes
        monkeypatch.setattr(prompts, "BANK_BYTES", 8 * row)
        adapter = make_adapter(engine.spec, 0)
        outputs = set()
        for i in range(1000):
            # one number changes, and so does the content: a thousand different adapters, cheaply made
            adapter.__dict__.pop("content_hash", None)
            next(iter(adapter.lora.values()))[0, 0] = i
            bank, slot = engine.bank.packed([Prompt("a <dog>", adapter)])
            if i % 50 == 0:
                outputs.add(float(engine.denoise(z, t, bank, slot).sum()))
            assert len(engine.bank._rows) <= 8
        assert len(outputs) == 20
        assert engine.builds == {"text_encoder": 1, "unet": 1}


def test_a_picture_is_the_same_on_every_engine(
    base: BaseModel, bundles: dict[str, Path], shape: str, folders: dict[str, Path]
) -> None:
    """One seed draws one picture: alone or third in a batch, on torch or compiled, within one step of 255."""

    def pictures(engine: Engine, prompts: list[Prompt], seeds: list[int]) -> torch.Tensor:
        bank, slots = engine.bank.packed([*prompts, *[Prompt("", p.adapter) for p in prompts]])
        denoise = guided(lambda z, t, slot: engine.denoise(z, t, bank, slot), *slots.chunk(2), 2.0)
        z = dpm_solver(denoise, starting_noise(seeds, NOISE), engine.spec.schedule, 6)
        return on_grid(engine.decode(z)).int()

    adapter = make_adapter(base.spec, 1)
    seven, others = Prompt("a photo of <dog>", adapter), [Prompt("a cat"), Prompt("")]
    with EagerEngine(base) as torch_engine, open_engine(str(folders[shape]), bundle=bundles[shape]) as compiled:
        assert isinstance(compiled, OrtEngine)
        alone = pictures(torch_engine, [seven], [7])
        assert alone.float().std() > 10, "a flat picture would prove nothing"
        for engine in (torch_engine, compiled):
            assert (pictures(engine, [*others, seven], [1, 2, 7])[2:] - alone).abs().max() <= 1


WRONG: dict[str, Any] = {
    "rank": lambda z, t, bank, slot: (z[0], t, bank, slot),
    "channels": lambda z, t, bank, slot: (z[:, :3], t, bank, slot),
    "timestep for each row": lambda z, t, bank, slot: (z, t[:1], bank, slot),
    "scalar timestep": lambda z, t, bank, slot: (z, t[0], bank, slot),
    "timestep type": lambda z, t, bank, slot: (z, t.long(), bank, slot),
    "latents type": lambda z, t, bank, slot: (z.half(), t, bank, slot),
    "prompt length": lambda z, t, bank, slot: (z, t, bank[:, 1:], slot),
    "packed width": lambda z, t, bank, slot: (z, t, bank[..., 1:], slot),
    "slot past the bank": lambda z, t, bank, slot: (z, t, bank, slot + 1),
    "negative slot": lambda z, t, bank, slot: (z, t, bank, slot - 1),
    "slot type": lambda z, t, bank, slot: (z, t, bank, slot.int()),
    "odd side": lambda z, t, bank, slot: (z[..., :15], t, bank, slot),
}


def test_a_shape_outside_the_signature_is_refused(engine: Engine) -> None:
    """Rows outside the signature are a clear error with a hint, not a rebuild and not the runner's own message."""
    z, t = rows(2)
    bank, slot = engine.bank.packed([Prompt("a dog")] * 2)
    for name, wrong in WRONG.items():
        with pytest.raises(EngineError) as refused:
            engine.denoise(*wrong(z, t, bank, slot))
        assert refused.value.hint, name
        assert "unet" not in getattr(engine, "builds", {}), name


@pytest.mark.parametrize(("count", "side"), [(1, 8), (3, 24), (70, 8)])
def test_any_batch_and_size_inside_the_signature_runs(engine: Engine, count: int, side: int) -> None:
    """Batches of one and of more than 63, and sizes that were not the exporter's example, run without a rebuild."""
    z, t = rows(count, side)
    assert run(engine, [Prompt("a dog")] * count, z, t).shape == z.shape


def test_a_closed_engine_says_so(engine: Engine) -> None:
    """A closed engine refuses work; closing twice is fine."""
    z, t = rows(1)
    bank, slot = engine.bank.packed([Prompt("a dog")])
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.denoise(z, t, bank, slot)


def test_an_engine_left_open_warns(base: BaseModel) -> None:
    """An engine that is collected while open says so."""
    engine = EagerEngine(base)
    with pytest.warns(ResourceWarning, match="never closed"):
        del engine


def test_open_engine_refuses_what_it_cannot_open() -> None:
    """An unknown engine, a bundle engine without a bundle, and a bundle for torch are errors with a hint."""
    for kind, bundle in (("warp", None), ("onnx", None), ("eager", "bundle")):
        with pytest.raises(EngineError) as refused:
            open_engine(engine=kind, bundle=bundle)
        assert refused.value.hint


def test_every_engine_gives_the_same_answers(engine: Engine, base: BaseModel) -> None:
    """A picture has torch's label, evaluations and, to 1e-3, probabilities, whichever engine predicts."""
    adapter, judging = outspoken(base.spec), Judging(draws=6, error=0.1)
    noise = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    with EagerEngine(base) as eager:
        wanted = classify(eager, images, adapter, judging)
    assert len({answer.evaluations for answer in wanted}) > 1, "answers that are all alike would prove nothing"
    for one, other in zip(classify(engine, images, adapter, judging), wanted, strict=True):
        assert (one.label, one.evaluations) == (other.label, other.evaluations)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-3)
