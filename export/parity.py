"""Does a compiled engine compute what torch computes? Asked of every graph before a bundle is let out."""

from __future__ import annotations

import torch
from torch import Tensor

from cpserve.engine import Engine
from cpserve.errors import EngineError

# float32, largest absolute difference; outputs beyond one are held to it relatively, since CLIP's text states reach 30
LIMIT = 1e-4


def check_parity(reference: Engine, candidate: Engine) -> dict[str, float]:
    """Each graph's largest absolute difference on seeded inputs; rows mix prompts and timesteps.

    Raises:
        EngineError: one is above `LIMIT`, or not a number.
    """
    ours, theirs = (_outputs(engine, reference) for engine in (reference, candidate))
    figures = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    for name, figure in figures.items():
        if not figure <= LIMIT * max(1.0, float(ours[name].abs().max())):  # so that NaN fails, too
            raise EngineError(
                f"the compiled {name} differs from torch by {figure:.1e}, more than {LIMIT:.0e}",
                hint="nothing was written; report it with the base model's name and the output of: cpserve doctor",
            )
    return figures


def _outputs(engine: Engine, reference: Engine) -> dict[str, Tensor]:
    """Every graph of `engine` on inputs that depend on `reference` alone, so that no difference hides another."""
    spec = reference.spec
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(spec.tokenizer) + 2, (3, spec.tokens), generator=draw)
    extra = torch.randn(2, spec.sites.weight.shape[1], generator=draw)
    rows, h, w = 5, 2 * spec.multiple, 4 * spec.multiple
    latents = torch.randn(rows, spec.channels, h, w, generator=draw)
    pictures = 2 * torch.rand(2, 3, h * spec.vae_factor, w * spec.vae_factor, generator=draw) - 1
    timestep = torch.linspace(0, spec.schedule.steps - 1, rows).round()
    bank = spec.sites.project(reference.encode_text(ids, extra))
    return {
        "unet": engine.infer(latents, timestep, bank, torch.arange(rows) % len(bank)),
        "text_encoder": engine.encode_text(ids, extra),
        "vae_encoder": engine.encode_pictures(pictures),
        "vae_decoder": engine.decode(latents[:2]),
    }
