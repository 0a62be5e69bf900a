"""How well concepts are drawn and kept, from image features. Pure functions; which encoder made them is the caller's business.

Features are `[n,d]` float, one row a picture. Measures of one encoder never stand in a table with another's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Features = np.ndarray


def unit(features: Features) -> Features:
    """Rows, along the last axis, of norm 1."""
    scaled: Features = features / np.linalg.norm(features, axis=-1, keepdims=True).clip(1e-12)
    return scaled


def alignment(real: Features, generated: Features) -> float:
    """The mean cosine over all pairs of a real and a generated picture, -1 to 1; higher is better."""
    return float(unit(real).mean(0) @ unit(generated).mean(0))


def mmd2(x: Features, y: Features) -> float:
    """The squared maximum mean discrepancy of two sets of at least two rows each; lower is nearer, about 0 for equal ones.

    Unbiased estimators (Gretton et al. 2012), so it may be below 0: eq. 3, or for equally many rows eq. 4, which leaves out
    pairs of one place and so allows them to be dependent (pictures of one seed). Kernel `(cos + 1)^3`, which is KID's
    (Binkowski et al. 2018) `(x . y / d + 1)^3` on features of mean square 1.
    """
    x, y = unit(x), unit(y)
    n, m = len(x), len(y)
    xx, yy, xy = ((a @ b.T + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    across = (xy.sum() - np.trace(xy)) / (n * (n - 1)) if n == m else xy.mean()
    return float(within - 2 * across)


def forgetting(matrix: Mapping[int, Mapping[int, float]]) -> float:
    """The mean drop since each concept was learned: `mean_{i<N} m[i][i] - m[N][i]`, `m[j][i]` concept i after j concepts.

    0 where there is one concept.
    """
    last = max(matrix)
    drops = [matrix[i][i] - matrix[last][i] for i in matrix if i < last]
    return float(np.mean(drops)) if drops else 0.0
