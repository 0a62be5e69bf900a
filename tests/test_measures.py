"""Laws of the measures."""

from __future__ import annotations

import numpy as np
import pytest

from cpserve.measures import alignment, forgetting, mmd2


def cloud(seed: int, centre: float, count: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 16)) + centre


def test_equal_distributions_have_no_discrepancy() -> None:
    """MMD^2 of two samples of one distribution is near 0 on either side of it; of two distributions it is far above."""
    equal = [mmd2(cloud(seed, 0.5), cloud(seed + 100, 0.5)) for seed in range(20)]
    assert abs(np.mean(equal)) < 0.01
    assert min(equal) < 0 < max(equal)
    assert mmd2(cloud(0, 0.5), cloud(1, -0.5)) > 0.1


def test_discrepancy_agrees_with_the_definition() -> None:
    """On three rows against two, summed by hand."""
    x, y = np.eye(3), np.eye(3)[:2]
    within = 1.0  # all pairs of different rows are orthogonal: (0 + 1)^3
    across = np.mean([8.0 if i == j else 1.0 for i in range(3) for j in range(2)])
    assert mmd2(x, y) == pytest.approx(2 * within - 2 * across)


def test_a_set_is_no_farther_from_itself_than_from_its_like() -> None:
    """Rows of one place may be dependent: of a set and itself, the discrepancy is what the estimator's noise allows."""
    x = cloud(0, 0.5)
    assert abs(mmd2(x, x)) < 0.01


def test_alignment_ignores_length() -> None:
    """Pictures along one direction align wholly, whatever their features' length; opposite ones not at all."""
    rows = np.array([[1.0, 0.0], [5.0, 0.0]])
    assert alignment(rows, 3 * rows) == pytest.approx(1)
    assert alignment(rows, -rows) == pytest.approx(-1)


def test_forgetting_is_the_drop_since_learned() -> None:
    """The mean over earlier concepts of what was lost between learning and the end."""
    assert forgetting({0: {0: 0.9}, 1: {0: 0.8, 1: 0.7}, 2: {0: 0.6, 1: 0.6, 2: 0.5}}) == pytest.approx((0.3 + 0.1) / 2)
    assert forgetting({0: {0: 0.9}}) == 0
