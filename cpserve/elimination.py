"""How likely each label is after a few looks, and which of them cost no more evaluations.

Every label of a picture sees the same (t, eps), so what counts is D, how far its error is behind the best one's. Where the best
label is the true one, D is the squared distance g of the two predictions and twice its product with the noise left unexplained:
its mean is g, and the variance of the product is in proportion to g. Besides, g differs by timestep and picture. So after n looks
D ~ N(g, SPREAD^2 g^2 + NOISE r g / n), r the unexplained noise an element; were the other label the true one, N(-g, the same). The
log odds between the two are 2 g D over that variance, and with D for the unknown g

    2 D / (SPREAD^2 D + NOISE r / n)

This is the softmax of diffusion-classifier scores with the temperature that the looks so far deserve. Were predictions perfect,
noise white and looks single, NOISE would be 4; a base's errors are correlated.

Whether the leading label is in the picture at all is another question. What lies beside it is predicted worse under a prompt
that does not name it than under c_0, which names nothing, so that the whole picture's error speaks for c_0 as soon as there
is clutter. Hence evidence counts by region: by how much the label's error is below c_0's where it is below, the map of their
difference smoothed. By chance and lookalikes that comes to some REGIONS r; what there is beyond is D in the odds above.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NOISE, SPREAD, REGIONS = 40.0, 0.3, 25.0  # fitted: tools/emoji64/fit_recognition.py
WIDTH = 3 / 16  # of the map's side: the standard deviation of the Gaussian that smooths


@dataclass(frozen=True, eq=False)
class Race:
    """One picture's errors so far, `[looks,labels]` float64, each summed over `elements`; NaN where a label was out before.

    With `evidence [looks,labels]`, of each label by regions, the last label is c_0, which stands for none of them.
    """

    errors: np.ndarray
    elements: int
    evidence: np.ndarray | None = None

    @property
    def active(self) -> np.ndarray:
        """`[labels]` bool: who was still in at the last look."""
        known: np.ndarray = ~np.isnan(self.errors[-1])
        return known

    @property
    def leader(self) -> int:
        """The label of the smallest mean error among those still in; c_0 leads nothing."""
        means = np.where(self.active, np.nanmean(self.errors, axis=0), np.inf)
        return int((means if self.evidence is None else means[:-1]).argmin())

    def probabilities(self) -> np.ndarray:
        """`[labels]`, summing to one; a label that is out is judged by the looks that it had."""
        best, looks = self.errors[:, [self.leader]], (~np.isnan(self.errors)).sum(0)
        behind = np.maximum(np.nanmean(self.errors - best, axis=0), 0)
        unexplained = best.mean() / self.elements
        if self.evidence is not None:
            behind[-1] = np.nanmean(self.evidence[:, self.leader]) - REGIONS * unexplained
        log_odds = -2 * behind / np.maximum(SPREAD**2 * np.abs(behind) + NOISE * unexplained / looks, 1e-30)
        odds = np.exp(log_odds - log_odds.max())
        p: np.ndarray = odds / odds.sum()
        return p


def by_region(below: np.ndarray) -> np.ndarray:
    """What maps `[N,h,w]` of c_0's error less a label's come to where they are above zero, smoothed: `[N]`."""
    rows, columns = (_smoothing(side) for side in below.shape[1:])
    evidence: np.ndarray = np.maximum(rows @ below @ columns, 0).sum((1, 2))
    return evidence


def _smoothing(side: int) -> np.ndarray:
    """`[side,side]`: a Gaussian about each cell; what lies outside is zero."""
    distance = np.subtract.outer(np.arange(side), np.arange(side)) / (WIDTH * side)
    kernel: np.ndarray = np.exp(-(distance**2) / 2) / (WIDTH * side * np.sqrt(2 * np.pi))
    return kernel


def ruled_out(race: Race, error: float) -> np.ndarray:
    """`[labels]` bool: whom to leave out from now on, so that the true label is among them at a rate of at most `error`."""
    gone: np.ndarray = (race.probabilities() < error / max(1, len(race.active) - 1)) | ~race.active
    return gone
