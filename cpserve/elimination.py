"""How likely each label is after a few draws, and which of them cost no more evaluations.

Every label of a picture sees the same (t, eps), so what counts is D, by how much its error is behind the best one's. Where the
best label is the true one, D is the squared distance g of the two predictions and twice its product with the noise left
unexplained: its mean is g, and the variance of the product is in proportion to g. Besides, g differs by timestep and picture. So
after n draws D ~ N(g, spread^2 g^2 + noise r g / n), r the unexplained noise an element; were the other label the true one,
N(-g, the same). The log odds between the two are 2 g D over that variance, and with D for the unknown g

    2 D / (spread^2 D + noise r / n)

This is the softmax of diffusion-classifier scores with the temperature that the draws so far deserve. Were predictions perfect and
noise white, the constant would be 4; a base's errors are correlated.

A picture shows more than the concept, and what lies beside it says nothing of which concept it is. So labels are judged by
region: each label's map of by how much its error is below that of c_0, which names nothing, is smoothed, and D counts where
either of two labels is above zero there. What the best label's own map comes to above zero, in units of r, tells whether
any of them is in the picture at all: the odds of some concept to none are

    ((evidence / r + offset) / (even + even_at_first / n)) ^ power

where there are about as many pictures of concepts never taught as of known ones. By the whole picture, as in the papers, errors
count as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

WIDTH = 3 / 16  # of the map's side: the standard deviation of the Gaussian that smooths
NOISE_OF_WHOLE = 80.0  # of the whole picture


@dataclass(frozen=True, kw_only=True)
class Odds:
    """The constants above, searched by likelihood on concepts that nothing else is measured on; `spread` and `noise` are kept
    smaller than the likeliest, which cost more evaluations (tools/emoji64/fit_recognition.py, LOG.md).
    """

    spread: float = 0.3
    noise: float = 55.0
    power: float = 2.5
    offset: float = 5.0
    even: float = 24.0
    even_at_first: float = 14.0


class Race:
    """The labels of one picture: `active [labels]` bool says whom to ask in the next draw, `probabilities` sum to one, `label` is
    the answer so far.

    With `none` the last probability and label is that of no concept at all. A label is ruled out below a share of `error` / 2, and
    what has 1 - `error` ends the race; 0: nothing does. At most the `kept` likeliest see another draw; 0: all may. `whole`: by
    the whole picture, without c_0 and without such an end, since clutter makes odds too sure.
    """

    def __init__(
        self,
        labels: int,
        elements: int,
        *,
        error: float,
        kept: int = 0,
        none: bool = False,
        whole: bool = False,
        odds: Odds = Odds(),
    ) -> None:
        self.active = np.ones(labels, bool)
        self.probabilities = np.full(labels + none, 1 / (labels + none))
        self.label = 0
        self.over = False
        self.evaluations = 0
        self._kept, self._judged = kept or labels, labels
        self._elements, self._error, self._none, self._whole, self._odds = elements, error, none, whole, odds
        self._draws = np.zeros(labels, int)
        self._errors, self._behind = np.zeros((2, labels))
        self._better = np.zeros((labels, 1, 1))

    def keep(self, labels: np.ndarray, evaluations: int) -> None:
        """Judge only `labels`, indices that took so many `evaluations` to find; the others' probability is nothing."""
        self.active[:] = False
        self.active[labels] = True
        self._judged = len(labels)
        self.evaluations += evaluations

    def see(self, errors: np.ndarray, generic: np.ndarray | None = None, draws: int = 1) -> None:
        """Look at the active labels' error maps `[active,h,w]`, and c_0's `[h,w]`, each the mean of `draws`."""
        self.evaluations += draws * (len(errors) + (generic is not None))
        better = -errors.sum((1, 2), keepdims=True) if generic is None else smoothed(generic - errors)
        if not self._draws.any():
            self._better = np.zeros((len(self.active), *better.shape[1:]))
        self._better[self.active] += draws * better
        self._errors[self.active] += draws * errors.sum((1, 2))
        self._draws[self.active] += draws
        self._judge()
        self._rule_out()

    def _judge(self) -> None:
        draws, c = self._draws.max(), self._odds
        better = self._better[self.active] / draws
        evidence = (better if self._whole else np.maximum(better, 0)).sum((1, 2))
        best = int((evidence if evidence.any() else better.sum((1, 2))).argmax())  # a tie is the nearest one's
        self.label = int(np.flatnonzero(self.active)[best])
        ahead = better[best] - better
        if not self._whole:
            ahead *= np.maximum(better, better[best]) > 0
        self._behind[self.active] = np.maximum(ahead.sum((1, 2)), 0)  # another may be ahead by region; then they share
        unexplained = self._errors[self.label] / draws / self._elements
        noise = (NOISE_OF_WHOLE if self._whole else c.noise) * unexplained / np.maximum(self._draws, 1)
        odds = np.exp(-2 * self._behind / np.maximum(c.spread**2 * self._behind + noise, 1e-30)) * (self._draws > 0)
        self.probabilities = odds / odds.sum()
        if self._none:
            even = (c.even + c.even_at_first / draws) * unexplained
            some = float((evidence[best] + c.offset * unexplained) / max(even, 1e-30)) ** c.power
            self.probabilities = np.append(self.probabilities * some, 1) / (some + 1)
            if self.probabilities.argmax() == len(self.active):
                self.label = len(self.active)

    def _rule_out(self) -> None:
        p, labels = self.probabilities, len(self.active)
        self.active &= p[:labels] >= self._error / 2 / max(1, self._judged + self._none - 1)
        if self.active.sum() > self._kept:  # equals go on together
            self.active &= p[:labels] >= np.sort(p[:labels][self.active])[-self._kept]
        sure = not self._whole and p.max() > 1 - self._error
        self.over = bool(sure) or (not self._none and self.active.sum() == 1)


def smoothed(maps: np.ndarray) -> np.ndarray:
    """Maps `[N,h,w]`, each cell the mean about it by a Gaussian; what lies outside is zero."""
    rows, columns = (_gaussian(side) for side in maps.shape[1:])
    made: np.ndarray = rows @ maps @ columns
    return made


@cache
def _gaussian(side: int) -> np.ndarray:
    """`[side,side]`: the weights about each cell."""
    distance = np.subtract.outer(np.arange(side), np.arange(side)) / (WIDTH * side)
    kernel: np.ndarray = np.exp(-(distance**2) / 2) / (WIDTH * side * np.sqrt(2 * np.pi))
    return kernel
