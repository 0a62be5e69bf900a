"""Laws of the error's slope by K,V: what it is, what it tells of labels, the same on every engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from PIL import Image

from cpserve.adapter import Adapter
from cpserve.base import BaseModel
from cpserve.elimination import Race
from cpserve.engine import Engine, open_engine
from cpserve.engines.eager import CompileEngine, EagerEngine
from cpserve.errors import EngineError
from cpserve.prompts import Prompt
from cpserve.recognition import SLOPES, Judging, classify, draws_of, labels_of, latents_of
from cpserve.score import Draw, draws
from cpserve.slope import EVALUATIONS, slope_of_error
from export.target import Target
from tests.conftest import once
from tests.lessons import QUICK, learned
from tests.retarget import openvino, retarget

NAMES = ("dog", "cat", "rex", "cup", "hat")
FEW = Judging(draws=8, kept=2)


@pytest.fixture(scope="module")
def adapter(bases: dict[str, BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return learned(bases["sdxl"], tmp_path_factory.mktemp("learned"), QUICK, *NAMES)


@pytest.fixture(scope="module")
def with_slopes(
    bases: dict[str, BaseModel], bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = Target(slopes=True)
    return once(tmp_path_factory, "bundle-slopes", lambda out: retarget(bases["sdxl"], bundles["sdxl"], out, target))


@pytest.fixture(params=["eager", "onnx", "openvino"])
def engine(
    request: pytest.FixtureRequest, bases: dict[str, BaseModel], with_slopes: Path, tmp_path: Path
) -> Iterator[Engine]:
    """Every engine that runs here, with slopes. The base's lowest level has four pixels: of one, float32's slopes are far off."""
    base = bases["sdxl"]
    if request.param == "openvino":
        with_slopes = retarget(base, with_slopes, tmp_path / "bundle", replace(openvino(base), slopes=True))
    with EagerEngine(base) if request.param == "eager" else open_engine(bundle=with_slopes) as made:
        yield made


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def test_a_slope_is_how_the_error_rises(base: BaseModel, eager: EagerEngine) -> None:
    """Along any direction of K,V the error rises by its product with the slope: a quotient of differences in float64, each base."""
    spec, generator = base.spec, torch.Generator().manual_seed(1)
    shape = (spec.channels, spec.latent_size, spec.latent_size)
    x0, draw = torch.randn(1, *shape, generator=generator), draws(0, 1, shape, 200, 600)
    kv, way = torch.randn(2, spec.tokens, spec.sites.packed_width, generator=generator)
    unet = copy.deepcopy(base.unet).double()

    def error(at: torch.Tensor) -> float:
        xt = spec.schedule.add_noise(x0.expand_as(draw.noise), draw.noise, draw.t)
        output = unet(xt.double(), draw.t, at[None], torch.zeros(2, dtype=torch.int64), *spec.sizes(xt))
        return float((draw.noise - spec.schedule.eps(output, xt, draw.t)).pow(2).sum())

    step = 1e-5 * way.double()
    rise = float((slope_of_error(eager, x0[0], draw, kv) * way).sum())
    assert rise == pytest.approx((error(kv + step) - error(kv - step)) / 2e-5, rel=1e-2)


def rows_of(engine: Engine) -> tuple[torch.Tensor, ...]:
    """Two rows of different latents, timesteps, K,V and targets."""
    spec, generator = engine.spec, torch.Generator().manual_seed(2)
    z, target = torch.randn(2, 2, spec.channels, spec.latent_size, spec.latent_size, generator=generator)
    kv = torch.randn(2, spec.tokens, spec.sites.packed_width, generator=generator)
    return z, torch.tensor([100.0, 500.0]), kv, target


def test_slopes_are_the_same_on_every_engine(engine: Engine, bases: dict[str, BaseModel]) -> None:
    """Rows of a bundle's graph, and of torch alone and among others, within float32's tolerance."""
    rows = rows_of(engine)
    with EagerEngine(bases["sdxl"]) as reference:
        expected = torch.cat([reference.slope(*(x[i : i + 1] for x in rows)) for i in range(2)])
    assert float((engine.slope(*rows) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_slopes_in_half_precision(bases: dict[str, BaseModel]) -> None:
    """The engine that compiles with torch takes them uncompiled, in its own precision."""
    with EagerEngine(bases["sdxl"]) as reference, CompileEngine(bases["sdxl"]) as engine:
        rows = rows_of(engine)
        expected = reference.slope(*rows)
        assert float((engine.slope(*rows) - expected).abs().max()) <= 0.1 * float(expected.abs().max())


def test_few_of_many_labels_are_judged(engine: Engine, adapter: Adapter) -> None:
    """Those kept are the likeliest by the slope at the labels' mean; the others have no probability, and cost nothing more."""
    pictures = images(3)
    texts = list(labels_of(adapter, FEW).values())
    bank, slots = engine.bank.packed([Prompt(text, adapter) for text in texts])
    kv, latents = bank[slots[:-1]], latents_of(engine, pictures)
    plan = draws_of(engine, FEW, latents)
    for answer, latent in zip(classify(engine, pictures, adapter, FEW), latents, strict=True):
        slope = slope_of_error(engine, latent, Draw(plan.t[:SLOPES], plan.noise[:SLOPES]), kv.mean(0))
        expected = (slope * (kv - kv.mean(0))).sum((1, 2)).argsort()[: FEW.kept]
        p = np.array(list(answer.probabilities.values()))
        assert set(np.flatnonzero(p[:-1])) <= set(expected.tolist())
        assert p.sum() == pytest.approx(1)
        assert answer.evaluations <= EVALUATIONS * SLOPES + FEW.draws * (FEW.kept + 1)


def test_an_answer_depends_on_no_neighbour_and_no_order(bases: dict[str, BaseModel], adapter: Adapter) -> None:
    """A picture alone and among others, concepts in one order and another: the same labels judged, and the same answer."""
    pictures, concepts = images(3), adapter.manifest.concepts
    turned = replace(adapter, manifest=structs.replace(adapter.manifest, concepts=concepts[::-1]))
    with EagerEngine(bases["sdxl"]) as engine:
        together = classify(engine, pictures, adapter, FEW)
        for answer, picture in zip(together, pictures, strict=True):
            for other in (classify(engine, [picture], a, FEW)[0] for a in (adapter, turned)):
                assert other.label == answer.label
                assert other.probabilities == pytest.approx(answer.probabilities, abs=1e-3)


@pytest.mark.parametrize("all_of_them", [{"kept": 0}, {"error": 0.0}])
def test_all_labels_may_be_judged(bases: dict[str, BaseModel], adapter: Adapter, all_of_them: dict[str, Any]) -> None:
    """Where all are kept, and where none may be ruled out: the same answer with slopes and without, all labels with a share."""
    judging = replace(FEW, **all_of_them)
    with EagerEngine(bases["sdxl"]) as engine:
        answer = classify(engine, images(1), adapter, judging)[0]
        engine.slopes = False
        assert classify(engine, images(1), adapter, judging)[0].probabilities == answer.probabilities
    assert all(answer.probabilities.values())


def test_without_slopes_few_see_another_draw(bases: dict[str, BaseModel], adapter: Adapter) -> None:
    """All labels and c_0 see the first draw, only those kept the others."""
    with EagerEngine(bases["sdxl"]) as engine:
        engine.slopes = False
        [answer] = classify(engine, images(1), adapter, replace(FEW, error=1e-6, none=False))
    assert all(answer.probabilities.values())
    assert len(NAMES) + 1 < answer.evaluations <= len(NAMES) + 1 + (FEW.draws - 1) * (FEW.kept + 1)


@given(st.integers(0, 2**16), st.integers(1, 5))
def test_the_likeliest_are_kept(seed: int, kept: int) -> None:
    """After the first draw so many labels go on and their equals, no likelier one is left out, and the answer so far is among
    them; later draws leave out none but equals, for what is out takes nobody's place.
    """
    rng, race = np.random.default_rng(seed), Race(5, 1024, error=1e-9, kept=kept)
    race.see(rng.uniform(3, 5, (5, 8, 8)), rng.uniform(3, 5, (8, 8)))
    p = race.probabilities
    assert (p > p[race.active].min()).sum() < kept
    assert race.active[race.label]
    assert p[race.active].min() >= np.sort(p)[-kept]
    for _ in range(3):
        race.see(rng.uniform(3, 5, (race.active.sum(), 8, 8)), rng.uniform(3, 5, (8, 8)))
        assert race.active.sum() >= kept


def test_slopes_that_are_no_numbers_are_refused(bases: dict[str, BaseModel], adapter: Adapter) -> None:
    """An overflow in half precision, say: no label is chosen by it."""

    class Overflowing(EagerEngine):
        def infer_slopes(self, rows: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
            return [slope * np.inf for slope in super().infer_slopes(rows)]

    with Overflowing(bases["sdxl"]) as engine, pytest.raises(EngineError, match="finite"):
        classify(engine, images(1), adapter, FEW)


def test_a_race_of_few_labels_is_theirs_alone() -> None:
    """Kept labels see what they would among themselves; the others' share is nothing, whatever none of these has."""
    rng, kept = np.random.default_rng(0), np.array([1, 3, 4])
    among, alone = Race(40, 1024, error=0.02, none=True), Race(3, 1024, error=0.02, none=True)
    among.keep(kept, 12)
    for _ in range(6):
        maps, generic = rng.uniform(3, 5, (3, 8, 8)), rng.uniform(3, 5, (8, 8))
        maps[:2] -= 0.3  # two that explain something
        for race, active in ((among, among.active[kept]), (alone, alone.active)):
            race.see(maps[active], generic)
        assert np.allclose(among.probabilities[[*kept, 40]], alone.probabilities)
        assert np.array_equal(among.active[kept], alone.active)
        assert not among.probabilities[[0, 2, *range(5, 40)]].any()
    assert 0 < alone.active.sum() < 3
    assert among.evaluations == 12 + alone.evaluations


def test_slopes_are_refused_where_there_are_none(bases: dict[str, BaseModel], bundles: dict[str, Path]) -> None:
    """By an engine whose bundle has none, for latents of another size, and after closing; the hint says what helps."""
    spec = bases["sdxl"].spec
    n = spec.latent_size
    row = (torch.zeros(1, spec.channels, n, n), torch.zeros(1), torch.zeros(1, spec.tokens, spec.sites.packed_width))
    with open_engine(bundle=bundles["sdxl"]) as engine, pytest.raises(EngineError, match="no slopes") as caught:
        engine.slope(*row, row[0])
    assert "--slopes" in caught.value.hint
    larger = torch.zeros(1, spec.channels, 2 * n, 2 * n)
    with EagerEngine(bases["sdxl"]) as eager, pytest.raises(EngineError, match=f"{n} by {n}"):
        eager.slope(larger, *row[1:], larger)
    with pytest.raises(EngineError, match="closed"):
        eager.slope(*row, row[0])
