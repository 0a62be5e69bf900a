"""Laws of judging whether two concepts are in one picture, on scores made by hand."""

from __future__ import annotations

from collections import Counter
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("efficientnet_lite_pytorch")
pairs = import_module("benchmarks.pairs")


def looked(*seen: tuple[int, int, float]) -> np.ndarray:
    """Scores of three classes: (window, class, score), class 2 at 0.1 in every other window."""
    scores = np.full((6, 3), -1.0)
    scores[:, 2] = 0.1
    for window, own, score in seen:
        scores[window] = -1.0
        scores[window, own] = score
    return scores


def test_both_count_only_on_different_sides() -> None:
    """The weaker of the two decides, whichever is left; two on one side are not told apart, and one alone is not two."""
    assert pairs.pair_score(looked((0, 0, 0.8), (4, 1, 0.5)), 0, 1) == 0.5
    assert pairs.pair_score(looked((0, 1, 0.5), (4, 0, 0.8)), 0, 1) == 0.5
    assert pairs.pair_score(looked((0, 0, 0.8), (1, 1, 0.5)), 0, 1) == -np.inf
    assert pairs.pair_score(looked((0, 0, 0.8), (4, 0, 0.8)), 0, 1) == -np.inf


def test_a_threshold_lets_through_its_share_at_most() -> None:
    """Also where most false scores are -inf, as they are when a second concept is the nearest class nowhere."""
    false = [-np.inf] * 90 + [i / 10 for i in range(10)]
    bar = pairs.threshold(false, 0.05)
    assert 0.03 <= np.mean(np.array(false) > bar) <= 0.05
    assert pairs.threshold([-np.inf] * 20, 0.05) == -np.inf


def test_pairs_are_asked_for_evenly() -> None:
    """No concept with itself; counts of ordered pairs differ by one at most."""
    counts = Counter(pairs.asked_pairs(4, 30))
    assert len(counts) == 12
    assert all(a != b for a, b in counts)
    assert set(counts.values()) == {2, 3}


def test_windows_see_one_half_each() -> None:
    """A picture black on the left and white on the right: three dark windows, then three light ones."""
    page = Image.new("L", (64, 64))
    page.paste(255, (32, 0, 64, 64))
    means = [np.asarray(window).mean() for window in pairs.windows(page)]
    assert max(means[:3]) < 64
    assert min(means[3:]) > 191
