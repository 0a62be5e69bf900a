"""EWC-DC's Fisher loss: the denoising loss plus diffusion-classifier cross-entropies (Jha et al., ICLR 2025).

`L_denoise + delta (CE(p, c_n) - sum_{j != n} CE(p, c_j))`, p the DC scores over the sampled concepts: minimised for the true
concept, maximised for the others. The unbounded terms enter through the Fisher's gradient only, never as a training loss.
With the mean over the others, in place of the sum, the softmax would cancel.
"""

from __future__ import annotations

from torch import Tensor

from cpserve.score import log_scores


def fisher_loss(error: Tensor, denoise_loss: Tensor, tau: float, delta: float) -> Tensor:
    """A scalar from errors `[1,N]` whose first label is the true concept."""
    log_p = log_scores(error, tau)[0]
    return denoise_loss + delta * (-log_p[0] + log_p[1:].sum())
