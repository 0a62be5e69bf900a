"""Train text encoder and UNet together on the cached latents.

`python tools/emoji64/train.py [--until STEP] [--cooldown STEPS]` resumes from `$EMOJI64_WORK/model.pt`, saved every
few minutes; Ctrl-C loses nothing older. The rate is constant, so that training can go on for as long as there is time; a
run with `--cooldown N` decays it to zero over N steps and saves `cooled.pt` beside it, from which `write_model.py` ships.

On a CPU two processes of one thread outrun one process of two (small operations don't split well):
`OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tools/emoji64/train.py`; each takes BATCH rows, gradients are averaged.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from sources import WORK
from tokenizer import POSITIONS, load
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

BATCH, EMPTY_SHARE, WIDTH = 64, 0.1, 256
ADAM_RATE, MUON_RATE, WARM_UP = 1e-3, 1.5e-3, 200
EMA_HALF_LIFE = 800
SAVE_EVERY_S = 180
RANK, WORKERS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def new_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(96, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    unet.set_attn_processor(
        AttnProcessor()
    )  # on the CPU its backward pass is several times faster than the fused kernel's
    return unet


def new_text_encoder(vocabulary: int, end: int) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=POSITIONS, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=end, pad_token_id=end,
    ))  # fmt: skip


def new_scheduler() -> DDIMScheduler:
    """v-prediction; noisier at its end than Stable Diffusion's, so that the mean colour does not leak through."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip


class TextToImage(nn.Module):
    """Text encoder and UNet as one module, its loss the mean squared error of v."""

    def __init__(self, vocabulary: int, end: int) -> None:
        super().__init__()
        self.text = new_text_encoder(vocabulary, end)
        self.text.set_attn_implementation("eager")  # for the same reason as the UNet's processor
        self.unet = new_unet()
        self.register_buffer("abar", new_scheduler().alphas_cumprod, persistent=False)

    def forward(self, x0: torch.Tensor, ids: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        a = self.abar[t].view(-1, 1, 1, 1)
        xt, v = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
        with torch.autocast("cpu", torch.bfloat16):
            guess = self.unet(xt, t, self.text(ids).last_hidden_state).sample
        return (guess.float() - v).pow(2).mean((1, 2, 3))


def timesteps(quantiles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A quarter of the rows uniform over the schedule, the rest logit-normal: shapes are decided at middling noise."""
    normal = np.array([NormalDist().inv_cdf(q) for q in quantiles])
    middling = 1 / (1 + np.exp(-(0.2 + normal)))
    return (1000 * np.where(rng.random(len(quantiles)) < 0.25, quantiles, middling)).astype(np.int64).clip(0, 999)


@dataclass
class Data:
    """Latents of zero mean and unit variance by channel, and caption ids; row 0 of `ids` is the empty prompt's."""

    latents: np.ndarray
    ids: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A batch that depends on `step` alone; timesteps are stratified over the batch."""
        rng = np.random.default_rng((3, step, RANK))
        rows = rng.integers(len(self.latents), size=BATCH)
        x0 = (torch.from_numpy(self.latents[rows].astype(np.float32)) - self.mean) / self.std
        ids = self.ids[np.where(rng.random(BATCH) < EMPTY_SHARE, 0, rows + 1)]
        t = torch.from_numpy(timesteps((np.arange(BATCH) + rng.random(BATCH)) / BATCH, rng))
        return x0, ids, t, torch.from_numpy(rng.standard_normal(x0.shape, np.float32))


def load_data() -> Data:
    latents = np.load(WORK / "latents.npy")
    words = ["", *(WORK / "captions.txt").read_text().splitlines()]
    ids = load()(words, padding="max_length", truncation=True, max_length=POSITIONS, return_tensors="pt").input_ids
    mean, std = (
        torch.from_numpy(f(latents, (0, 2, 3), np.float64)).float().view(1, -1, 1, 1) for f in (np.mean, np.std)
    )
    return Data(latents, ids, mean, std)


class Optimiser:
    """Muon for the matrices inside (convolutions seen as matrices), AdamW for the rest."""

    def __init__(self, model: TextToImage) -> None:
        inner, outer = [], []
        for name, p in model.named_parameters():
            edge = any(k in name for k in ("conv_in", "conv_out", "embedding"))
            (outer if p.ndim < 2 or edge else inner).append(p)
        self._inner = inner
        self._views = [nn.Parameter(p.data.view(len(p), -1)) for p in inner]
        self.muon = torch.optim.Muon(self._views, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(outer, lr=ADAM_RATE, weight_decay=0.01, betas=(0.9, 0.99))

    def share_gradients(self) -> None:
        """Average gradients over the workers."""
        parameters = [*self._inner, *self.adam.param_groups[0]["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads]) / WORKERS
        torch.distributed.all_reduce(flat)
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))

    def step(self, factor: float) -> None:
        for view, p in zip(self._views, self._inner, strict=True):
            view.grad = p.grad.view(len(p), -1) if p.grad is not None else None
            p.grad = None
        for optimiser, rate in ((self.muon, MUON_RATE), (self.adam, ADAM_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad()

    def state_dict(self) -> dict[str, object]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        self.muon.load_state_dict(state["muon"]), self.adam.load_state_dict(state["adam"])


def save(path: Path, state: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--until", type=int, default=10**9)
    arguments.add_argument("--cooldown", type=int, default=0)
    asked = arguments.parse_args()
    torch.manual_seed(0)
    if WORKERS > 1:
        torch.distributed.init_process_group("gloo")
    data, tokenizer = load_data(), load()
    model = TextToImage(len(tokenizer), tokenizer.eos_token_id)
    optimiser = Optimiser(model)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    step = 0
    if (WORK / "model.pt").exists():
        state = torch.load(WORK / "model.pt", weights_only=True)
        model.load_state_dict(state["model"]), optimiser.load_state_dict(state["optimiser"])
        average, step = state["average"], state["step"]
    until = step + asked.cooldown if asked.cooldown else asked.until
    target = WORK / ("cooled.pt" if asked.cooldown else "model.pt")
    first, mean, began, saved, shown = step, None, time.time(), time.time(), time.time()
    while step < until:
        losses = model(*data.batch(step))
        losses.mean().backward()
        if WORKERS > 1:
            optimiser.share_gradients()
        left = (until - step) / asked.cooldown if asked.cooldown else 1.0
        optimiser.step(min(1.0, (step + 1) / WARM_UP) * left)
        step += 1
        half_life = min(EMA_HALF_LIFE, step / 4, *([asked.cooldown / 6] if asked.cooldown else []))
        keep = 0.5 ** (1 / half_life)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - keep) if value.is_floating_point() else average[name].copy_(value)
        mean = float(losses.detach().mean()) if mean is None else 0.99 * mean + 0.01 * float(losses.detach().mean())
        if RANK == 0 and (time.time() - shown > 20 or step == until):
            shown = time.time()
            print(
                f"step {step} loss {mean:.4f} {(step - first) * BATCH * WORKERS / (shown - began):.0f} pictures/s",
                flush=True,
            )
        if RANK == 0 and (time.time() - saved > SAVE_EVERY_S or step == until):
            saved = time.time()
            save(
                target,
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average,
                    "step": step,
                    "mean": data.mean,
                    "std": data.std,
                },
            )


if __name__ == "__main__":
    main()
