"""Sequential elimination: labels that a paired test has ruled out cost no more evaluations.

Every label of a picture sees the same (t, eps), so what counts is the difference to the leader, whose variance is a fraction of
each error's. After every look a label goes when its mean difference is too large to be chance, at an error rate shared
(Bonferroni) among labels and looks. Draws come in antithetic pairs; a pair is one observation.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

SMALLEST = 1e-6  # error rate; beyond it the quantile is no more than a guess


@dataclass(frozen=True, eq=False)
class Race:
    """One picture's errors so far, `[pairs, labels]` float64; NaN where a label was ruled out before."""

    errors: np.ndarray

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

    def with_pair(self, errors: np.ndarray) -> Race:
        """After one more pair, `[labels]` with NaN for those left out."""
        return Race(np.vstack([self.errors, errors[None]]))

    def margins(self) -> np.ndarray:
        """Each label's mean difference to the leader in standard errors, `[labels]`: 0 for the leader, inf for those ruled out.

        The variance of a difference is pooled over the labels still in: a few pairs alone would tell too little about it. Of one
        pair nothing is known of it, and the median difference stands in.
        """
        active = self.active
        difference = self.errors[:, active] - self.errors[:, [self.leader]]
        n, labels = difference.shape
        if n > 1:
            spread = float(np.sqrt(difference.var(axis=0, ddof=1).sum() / max(1, labels - 1) / n))
        else:
            spread = float(np.median(difference))
        margins = np.full(len(active), np.inf)
        margins[active] = difference.mean(axis=0) / max(spread, 1e-30)
        return margins


def ruled_out(race: Race, error: float, looks: int) -> np.ndarray:
    """`[labels]` bool: whom to leave out from now on, with the error rate `error` over all labels and `looks`."""
    active = int(race.active.sum())
    degrees = (len(race.errors) - 1) * max(1, active - 1)
    if len(race.errors) < 2 or degrees < 3 or active < 2:
        return ~race.active
    gone: np.ndarray = race.margins() > student_quantile(1 - max(error, SMALLEST) / (looks * (active - 1)), degrees)
    return gone


def student_quantile(p: float, degrees: float) -> float:
    """Student's t for 0.5 <= p <= 0.9999 from 3 degrees of freedom on, within a tenth (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))
