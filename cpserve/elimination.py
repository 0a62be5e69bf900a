"""How likely each label is after a few looks, and which of them cost no more evaluations.

Every label of a picture sees the same (t, eps), so what counts is D, how far its error is behind the best one's. Where the best
label is the true one, D is the squared distance g of the two predictions and twice its product with the noise left unexplained:
its mean is g, and the variance of the product is in proportion to g. Besides, g differs by timestep and picture. So after n looks
D ~ N(g, SPREAD^2 g^2 + NOISE r g / n), r the unexplained noise an element; were the other label the true one, N(-g, the same). The
log odds between the two are 2 g D over that variance, and with D for the unknown g

    2 D / (SPREAD^2 D + NOISE r / n)

This is the softmax of diffusion-classifier scores with the temperature that the looks so far deserve. Were predictions perfect,
noise white and looks single, NOISE would be 4; a base's errors are correlated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NOISE, SPREAD = 40.0, 0.3  # fitted: tools/emoji64/fit_recognition.py


@dataclass(frozen=True, eq=False)
class Race:
    """One picture's errors so far, `[looks,labels]` float64, each summed over `elements`; NaN where a label was out before."""

    errors: np.ndarray
    elements: int

    @property
    def active(self) -> np.ndarray:
        """`[labels]` bool: who was still in at the last look."""
        known: np.ndarray = ~np.isnan(self.errors[-1])
        return known

    @property
    def leader(self) -> int:
        """The label of the smallest mean error among those still in."""
        means = np.where(self.active, np.nanmean(self.errors, axis=0), np.inf)
        return int(means.argmin())

    def probabilities(self) -> np.ndarray:
        """`[labels]`, summing to one; a label that is out is judged by the looks that it had."""
        best, looks = self.errors[:, [self.leader]], (~np.isnan(self.errors)).sum(0)
        behind = np.maximum(np.nanmean(self.errors - best, axis=0), 0)
        noise = NOISE * best.mean() / self.elements / looks
        odds = np.exp(-2 * behind / np.maximum(SPREAD**2 * behind + noise, 1e-30))
        p: np.ndarray = odds / odds.sum()
        return p


def ruled_out(race: Race, error: float) -> np.ndarray:
    """`[labels]` bool: whom to leave out from now on, so that the true label is among them at a rate of at most `error`."""
    gone: np.ndarray = (race.probabilities() < error / max(1, len(race.active) - 1)) | ~race.active
    return gone
