"""Laws of telling labels apart: draws, elimination, answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cpserve import recognition
from cpserve.base import BaseModel, load_base
from cpserve.elimination import Race, ruled_out, student_quantile
from cpserve.engines.eager import EagerEngine
from cpserve.recognition import FITTED, NONE, Judging, classify, judging_for
from cpserve.score import draws
from tests.lessons import QUICK, learned


def test_draws_are_spread_and_antithetic() -> None:
    """Any first 2^k pairs hold one timestep in each of 2^k equal parts, cyclically; noise comes in pairs that cancel."""
    draw = draws(3, 16, (4, 8, 8), 100, 740)
    assert float((draw.noise[0::2] + draw.noise[1::2]).abs().max()) == 0
    assert torch.equal(draw.t[0::2], draw.t[1::2])
    for count in (2, 4, 8, 16):
        within = sorted((draw.t[: 2 * count : 2] - 100).tolist())
        gaps = np.diff([*within, within[0] + 640])
        assert gaps.max() <= 640 / count + 1


def test_students_quantile_agrees_with_the_tables() -> None:
    """Against printed values, within a tenth."""
    table = {
        (0.975, 5): 2.571,
        (0.995, 3): 5.841,
        (0.999, 4): 7.173,
        (0.9995, 4): 8.610,
        (0.999, 10): 4.144,
        (0.9999, 3): 22.204,
    }
    for (p, degrees), value in table.items():
        assert student_quantile(p, degrees) == pytest.approx(value, rel=0.1)


def race(seed: int, gaps: list[float], pairs: int, error: float, noise: float = 1.0) -> tuple[bool, int]:
    """Whether label 0, truly the best, survived a race of noisy errors with a common part, and the evaluations spent.

    Label 0 is `noise` times as noisy as the others.
    """
    rng, spent = np.random.default_rng(seed), 0
    now, active = Race(np.zeros((0, len(gaps)))), np.ones(len(gaps), bool)
    for _ in range(pairs):
        own = rng.normal(size=len(gaps)) * np.array([noise, *[1.0] * (len(gaps) - 1)])
        errors = 100 + 10 * rng.normal() + np.array(gaps) + own
        now = now.with_pair(np.where(active, errors, np.nan))
        active = now.active & ~ruled_out(now, error, pairs)
        spent += int(now.active.sum())
        if active.sum() == 1:
            break
    return bool(active[0]), spent


@pytest.mark.parametrize(
    ("gaps", "noise"),
    [([0.0, *[0.05] * 3], 1.0), ([0.0, *[0.05] * 9], 5.0), ([0.0, 0.1], 5.0), ([0.0, 0.0, *[3.0] * 4], 1.0)],
)
def test_the_best_label_is_seldom_ruled_out(gaps: list[float], noise: float) -> None:
    """In 800 seeded races at a stated error of 5 % the best label is lost in at most 5 % and three standard errors more."""
    lost = np.mean([not race(seed, gaps, 12, 0.05, noise)[0] for seed in range(800)])
    assert lost <= 0.05 + 3 * (0.05 * 0.95 / 800) ** 0.5


def test_what_is_far_behind_costs_little() -> None:
    """With nine labels far behind, a race costs less than a third of all evaluations."""
    spent = [race(seed, [0.0, *[8.0] * 9], 16, 0.01)[1] for seed in range(100)]
    assert np.mean(spent) < 16 * 10 / 3


@given(st.permutations(range(4)), st.integers(0, 2**16))
def test_the_order_of_labels_does_not_matter(order: list[int], seed: int) -> None:
    """Permuted labels have permuted margins and verdicts."""
    errors = np.random.default_rng(seed).normal(size=(5, 4)) + np.array([0, 1, 2, 9])
    straight, turned = Race(errors), Race(errors[:, order])
    assert np.allclose(straight.margins()[order], turned.margins())
    assert (ruled_out(straight, 0.01, 8)[order] == ruled_out(turned, 0.01, 8)).all()


def test_answers_do_not_depend_on_the_batch(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """With elimination on, a picture has the same label, evaluations and nearly the same probabilities alone and among others."""
    base = bases["sd21"]
    adapter = learned(base, tmp_path, QUICK, "dog", "cat", "rex")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]
    judging = Judging(draws=12, error=0.2)
    with EagerEngine(base) as engine:
        together = classify(engine, images, adapter, judging)
        alone = [classify(engine, [image], adapter, judging)[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert (one.label, one.evaluations) == (other.label, other.evaluations)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-2)
    assert all(4 * 4 <= a.evaluations <= 12 * 4 for a in together)


def test_what_was_fitted_holds_for_those_weights_alone(bases: dict[str, BaseModel]) -> None:
    """Another base is judged by the defaults; what ships beside the built-in base speaks of that very model."""
    assert judging_for(bases["sd21"].spec) == Judging()
    builtin = load_base().spec
    for path in Path(recognition.__file__).parent.glob(FITTED):
        said = json.loads(path.read_text())
        assert said["weights"] == builtin.entry.fingerprint.weights
        assert judging_for(builtin) == Judging(**said["judging"])


def test_none_of_these_is_as_likely_as_it_is_scaled(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    """With its errors counted for nothing every picture shows none of these, counted tenfold no picture does."""
    base = bases["sd21"]
    adapter = learned(base, tmp_path, QUICK, "dog", "cat")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    with EagerEngine(base) as engine:
        said = [classify(engine, [image], adapter, Judging(draws=4, none_scale=s))[0].label for s in (0.0, 10.0)]
    assert said[0] == NONE
    assert said[1] != NONE
