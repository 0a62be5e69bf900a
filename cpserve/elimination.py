"""Sequential elimination: labels that a paired test has ruled out cost no more evaluations.

Every label of a picture sees the same (t, eps), so what counts is the difference to the leader, whose variance is a fraction of
each error's. After every look a label goes when its mean difference is too large to be chance, at an error rate shared
(Bonferroni) among labels and looks. Draws come in antithetic pairs; a pair is one observation.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

PRIOR = 2  # pairs' worth of the pooled variance
FEWEST = 3  # degrees of freedom
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

        Each difference's variance counts with that pooled over the labels still in, as if PRIOR more pairs had shown the latter
        (a moderated t, Smyth 2004): a few pairs tell too little about one label's, and labels differ. Of one pair nothing is
        known of it, and the median difference stands in.
        """
        active = self.active
        difference = self.errors[:, active] - self.errors[:, [self.leader]]
        n, labels = difference.shape
        if n > 1:
            own = difference.var(axis=0, ddof=1)
            pooled = own.sum() / max(1, labels - 1)
            spread = np.sqrt(((n - 1) * own + PRIOR * pooled) / (n - 1 + PRIOR) / n)
        else:
            spread = np.full(labels, np.median(difference))
        margins = np.full(len(active), np.inf)
        margins[active] = difference.mean(axis=0) / np.maximum(spread, 1e-30)
        return margins


def ruled_out(race: Race, error: float, looks: int) -> np.ndarray:
    """`[labels]` bool: whom to leave out from now on, with the error rate `error` over all labels and `looks`."""
    active = int(race.active.sum())
    more = len(race.errors) - 1
    degrees = min(more + PRIOR, more * (active - 1))  # of two labels there is nothing to pool
    if active < 2 or degrees < FEWEST:
        return ~race.active
    gone: np.ndarray = race.margins() > student_quantile(1 - max(error, SMALLEST) / (looks * (active - 1)), degrees)
    return gone


def student_quantile(p: float, degrees: float) -> float:
    """Student's t for 0.5 <= p <= 0.9999 from FEWEST degrees of freedom on, within a tenth (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))
