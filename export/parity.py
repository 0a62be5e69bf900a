"""Does a compiled engine compute what torch computes? Asked of every graph before a bundle is let out.

A float16 graph is asked where it runs: ONNX Runtime's CPU kernels compute it in float32, so that there its rounded weights are
checked, and numbers too large for float16 are not noticed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpserve.bundle import Precision
from cpserve.engine import Engine
from cpserve.errors import EngineError

# Largest absolute difference; outputs beyond one are held to it relatively, since CLIP's text states reach 30. The
# limits are some fifteen units in the last place of each precision's significand: a UNet adds up a hundred roundings.
LIMITS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}


def check_parity(reference: Engine, candidate: Engine, precision: Precision = "float32") -> dict[str, float]:
    """Each graph's largest absolute difference on seeded inputs; rows mix prompts and timesteps.

    Raises:
        EngineError: one is above the precision's limit, or not a number.
    """
    limit = LIMITS[precision]
    step, sizes = reference.spec.multiple, candidate.signature.sizes
    side = (sizes[0], sizes[0]) if sizes else (2 * step, 4 * step)
    ours, theirs = (_outputs(engine, reference, side) for engine in (reference, candidate))
    figures = {name: float((ours[name] - theirs[name]).abs().max()) for name in theirs}
    for name, figure in figures.items():
        if not figure <= limit * max(1.0, float(ours[name].abs().max())):  # so that NaN fails, too
            raise EngineError(
                f"the compiled {name} differs from torch by {figure:.1e}, more than {limit:.0e}",
                hint="nothing was written; report it with the base model's name and the output of: cpserve doctor",
            )
    return figures


def _outputs(engine: Engine, reference: Engine, side: tuple[int, int]) -> dict[str, Tensor]:
    """Every graph of `engine`, on the CPU, on inputs that depend on `reference` alone: no difference hides another."""
    spec = reference.spec
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(spec.tokenizer) + 2, (3, spec.tokens), generator=draw)
    extra = torch.randn(2, spec.sites.weight.shape[1], generator=draw)
    rows, (h, w) = 5, side
    latents = torch.randn(rows, spec.channels, h, w, generator=draw)
    pictures = 2 * torch.rand(2, 3, h * spec.vae_factor, w * spec.vae_factor, generator=draw) - 1
    timestep = torch.linspace(0, spec.schedule.steps - 1, rows).round()
    bank = spec.sites.project(reference.encode_text(ids, extra).cpu())
    inputs = (latents, timestep, bank, torch.arange(rows) % len(bank), *spec.sizes(latents))
    outputs = {
        "unet": engine.infer(*(x.to(engine.device) for x in inputs)),
        "text_encoder": engine.encode_text(ids, extra),
        "vae_encoder": engine.encode_pictures(pictures),
        "vae_decoder": engine.decode(latents[:2].to(engine.device)),
    }
    if engine.slopes:
        own = torch.randn(2, spec.channels, spec.latent_size, spec.latent_size, generator=draw)
        outputs["kv_slope"] = engine.slope(*(x.to(engine.device) for x in (own, timestep[:2], bank[:2], own.flip(0))))
    return {name: output.cpu() for name, output in outputs.items()}
