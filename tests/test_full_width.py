"""Stable Diffusion 1.5's UNet at full width, 860 million parameters of random weights, within 20 GiB."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cpserve.adapter import empty_adapter
from cpserve.base import BaseModel, load_base
from cpserve.concept import Concept, Picture
from export.build import export_onnx
from tests import plain
from tests.tiny import FULL_SD15, write_pipeline
from trainer import Record, Settings, learn

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("full") / "base"
    pipe = plain.pipeline(write_pipeline(folder, FULL_SD15))
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpserve.base._pipeline", lambda *_: pipe)
        return load_base("full-width")


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def test_a_step_trains(base: BaseModel, tmp_path: Path) -> None:
    """One step of the default method, with all that comes before and after it, moves every factor and the token."""
    picture = Picture("0.png", Image.effect_noise((512, 512), 64).convert("RGB"))
    settings = Settings(steps=1, batch=1, variants=1, rank=4)
    start = empty_adapter(base.spec.entry)
    adapter = learn(base, Concept("dog", (picture,)), start, settings, Record(tmp_path / "record"))
    assert len(adapter.lora) == 2 * len(base.spec.sites.parts)
    assert all(t.isfinite().all() and t.any() for t in adapter.lora.values())
    assert torch.isfinite(adapter.embeddings["<dog>"]).all()
    assert peak_gib() < 20


def test_the_unet_exports(base: BaseModel, tmp_path: Path) -> None:
    """The UNet's graph equals torch's to 1e-4, with its weights beside it."""
    assert base.spec.sites.packed_width == 24_960
    bundle = export_onnx(base, tmp_path / "bundle")
    assert (bundle.root / "unet.onnx.data").stat().st_size > 3 << 30
    assert bundle.manifest.parity["unet"] <= 1e-4
    assert peak_gib() < 20
